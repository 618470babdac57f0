"""Watch runs in trackio, on this machine.

    pip install trackio
    vflair run experiment.toml --plugin examples/trackers/to_trackio.py
    trackio show

Runs go into the project `vflair` in trackio's folder, or the folder that TRACKIO_DIR names. Nothing is sent to a Space:
where trackio is set up to do that, no run is written.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

from attrs import frozen

from vflair_core import Tracker

if TYPE_CHECKING:
    import trackio

if importlib.util.find_spec("trackio") is None:
    raise ImportError("trackio is not installed: pip install trackio.")

ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_DATASET_ID", "TRACKIO_BUCKET_ID")


@frozen
class Recorded:
    """One run in trackio's database."""

    run: trackio.Run

    def write(self, series: str, figures: Mapping[str, float], step: int) -> None:
        """Write figures, whose names begin with the series."""
        self.run.log({f"{series}/{name}": value for name, value in figures.items()}, step=step)

    def close(self, status: str, error: str) -> None:
        """Write how the run ended."""
        self.run.log({"status": f"{status} {error}".strip()})
        with redirect_stdout(sys.stderr):
            import trackio

            trackio.finish()


def open_run(name: str, settings: Mapping[str, str | float]) -> Recorded:
    """Begin a run, with the settings as its config."""
    import trackio

    if set_up := [variable for variable in ELSEWHERE if os.environ.get(variable)]:
        raise RuntimeError(
            f"trackio would send this run elsewhere, as {', '.join(set_up)} says, and this plugin writes on this "
            "machine only. Unset that, or write a plugin of your own."
        )
    with redirect_stdout(sys.stderr), _without_the_hub():
        run = trackio.init(
            "vflair",
            group=name,
            config=dict(settings),
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
    return Recorded(run)


@contextmanager
def _without_the_hub() -> Iterator[None]:
    """Whoever is logged in at Hugging Face is asked for by name there, which would tell it of the run."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


plugin = Tracker(open_run)
