"""Defenses for split learning of language models: the table of contents.

| name | file | promises |
|---|---|---|
| gaussian-noise | gaussian_noise.py | (ε, δ)-DP per row, composed over all rows of an example |
"""

from vflair_core import hookimpl


@hookimpl
def vflair_defenses() -> dict[str, str]:
    """Offer all defenses; each is imported on first use."""
    return {"gaussian-noise": "vflair_defenses.gaussian_noise:GaussianNoise"}
