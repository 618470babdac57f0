"""What an adaptive attacker is told of the defenses of a run: their mechanisms, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from vflair_core.attacks.attack import Launch
from vflair_core.defenses.defense import Defense
from vflair_core.defenses.mechanism import ComposedMechanism, Mechanism, Replacement
from vflair_core.errors import AttackError
from vflair_core.offers import load_target

Side = Literal[
    "mechanism", "gradient_mechanism", "replacement"
]  # of hidden states; of the gradient; of words
ONE_REPLACES = "defenses of this run replace words; an attacker is told of one. Attack them one by one, or grant no `replacement`."
Spec = Mapping[str, Any]  # a defense as `evidence.py` writes it down: target and options


def has_mechanism(specs: Sequence[Spec], side: Side) -> bool:
    """Whether knowing the defenses could help: what has no mechanism there leaves nothing to know."""
    return all(specs) and any(
        getattr(load_target(spec["target"]), side) is not getattr(Defense, side) for spec in specs
    )


def rebuilt_mechanism(
    specs: Sequence[Spec], side: Side, state: Mapping[str, Tensor] | None
) -> Mechanism:
    """Build the defenses again and return their mechanisms as one; `state` is what they calibrated, if it is known."""
    parts = []
    for number, defense in enumerate(_rebuilt(specs)):
        if state is not None:
            prefix = f"{number}."
            defense.load_state(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )
        if (part := getattr(defense, side)()) is not None:
            parts.append(part)
    return ComposedMechanism(parts)


def rebuilt_replacement(
    specs: Sequence[Spec], tokenizer: Any, embeddings: Tensor, public_texts: Sequence[str]
) -> Replacement | None:
    """Build the defense that replaces words again and return how it does; None if it changes nothing.

    Raises:
        AttackError: Several do, one after the other.
    """
    each = [d.replacement(tokenizer, embeddings, public_texts) for d in _rebuilt(specs)]
    replacements = [replacement for replacement in each if replacement is not None]
    if len(replacements) > 1:
        raise AttackError(f"{len(replacements)} {ONE_REPLACES}")
    return replacements[0] if replacements else None


def check_one_replaces(defenses: Sequence[Defense], launches: Sequence[Launch]) -> None:
    """See that an attacker who is to be told how words are replaced can be told.

    Raises:
        AttackError: Several defenses replace words, one after the other.
    """
    several = [d for d in defenses if type(d).replacement is not Defense.replacement]
    asking = [launch.name for launch in launches if "replacement" in launch.asked]
    if len(several) > 1 and asking:
        raise AttackError(f"{len(several)} {ONE_REPLACES}")


def _rebuilt(specs: Sequence[Spec]) -> list[Defense]:
    return [load_target(spec["target"])(**spec["options"]) for spec in specs]
