"""What an adaptive attacker is told of the defenses of a run: their mechanisms, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from attrs import define
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
ON_HIDDEN, ON_EMBEDDINGS = ("expected", "log_likelihood", "sample"), ("sample_embeddings",)
Spec = Mapping[str, Any]  # a defense as `evidence.py` writes it down: target and options


class WatchedMechanism(ComposedMechanism):
    """Notes in `used` when it is asked something that the defenses of the run have an answer of their own to.

    To be told of a mechanism is not to use it: a search that asks for the expected row learns nothing of a defense that
    adds noise to embeddings.
    """

    def __init__(self, parts: list[Mechanism], used: Callable[[], None]) -> None:
        super().__init__(parts)
        self._used = used

    def _asked(self, group: tuple[str, ...]) -> None:
        if answers(self.parts, group) or not answers(self.parts, (*ON_HIDDEN, *ON_EMBEDDINGS)):
            self._used()  # where no question has an answer, there is no more to know

    def expected(self, hidden: Tensor) -> Tensor:
        self._asked(ON_HIDDEN)
        return super().expected(hidden)

    def log_likelihood(self, observed: Tensor, hidden: Tensor) -> Tensor:
        self._asked(ON_HIDDEN)
        return super().log_likelihood(observed, hidden)

    def sample(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        self._asked(ON_HIDDEN)
        return super().sample(hidden, generator)

    def sample_embeddings(self, embeddings: Tensor, generator: torch.Generator) -> Tensor:
        self._asked(ON_EMBEDDINGS)
        return super().sample_embeddings(embeddings, generator)


def answers(parts: Sequence[Mechanism], names: Sequence[str]) -> bool:
    """Whether one of the mechanisms has an answer of its own to one of these questions."""
    inherited = [(name, getattr(Mechanism, name)) for name in names]
    return any(
        getattr(type(part), name, base) is not base for part in parts for name, base in inherited
    )


@define
class WatchedReplacement(Replacement):
    """The same of how words are replaced."""

    told: Replacement
    used: Callable[[], None]

    @property
    def words(self) -> Sequence[str]:  # type: ignore[override]
        """Those of what is told."""
        return self.told.words

    def log_probabilities(self, numbers: Tensor) -> Tensor:
        self.used()
        return self.told.log_probabilities(numbers)


class WatchedList(list[Any]):
    """The same of what came through the defense."""

    used: Callable[[], None] = staticmethod(lambda: None)

    def __iter__(self) -> Iterator[Any]:
        self.used()
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        self.used()
        return super().__getitem__(index)


def watched(known: Any, used: Callable[[], None]) -> Any:
    """What an adaptive attacker is told, so that `used` is called when it asks it something."""
    match known:
        case ComposedMechanism():
            return WatchedMechanism(known.parts, used)
        case Replacement():
            return WatchedReplacement(known, used)
        case list():
            found = WatchedList(known)
            found.used = used  # type: ignore[method-assign]
            return found
        case _:
            return known


def has_mechanism(specs: Sequence[Spec], side: Side) -> bool:
    """Whether knowing the defenses could help: what has no mechanism there leaves nothing to know."""
    return all(specs) and any(
        getattr(load_target(spec["target"]), side) is not getattr(Defense, side) for spec in specs
    )


def rebuilt_mechanism(
    specs: Sequence[Spec], side: Side, state: Mapping[str, Tensor] | None
) -> ComposedMechanism:
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
