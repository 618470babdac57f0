"""What an attack is, and how its parameter names are matched with what the attacker may know.

An attack is a callable; a frozen record when it has options. Its parameters name what it needs
(`knowledge.py`); one with a default is given only if it was granted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

from attrs import field, frozen
from torch import Tensor

from vflair_core.attacks.knowledge import PRESETS, VOCABULARY, granted, names_of
from vflair_core.errors import AttackError, alternatives

Attack = Callable[..., "Guess"]
GUESSED = ("tokens", "labels", "scores", "answers", "members")


@frozen(eq=False)
class Guess:
    """What an attack believes. Only the core, which knows the truth, grades it.

    Args:
        tokens: (N, T) token ids; -1 where the attack has no guess.
        labels: (N,) class indices.
        scores: (N,) higher means more likely to be class `positive`; orientation fixed by the attack.
        positive: The class that `scores` speak of, against all others.
        answers: (N, T) bool: which positions hold an answer that the model learns.
        members: (M,) one number per candidate, above 0 if it is taken for one of the victims.
        budget: What it spent, e.g. ``{"forwards": 1200}``.
    """

    tokens: Tensor | None = None
    labels: Tensor | None = None
    scores: Tensor | None = None
    positive: int = 1
    answers: Tensor | None = None
    members: Tensor | None = None
    budget: Mapping[str, float] | None = None

    def __attrs_post_init__(self) -> None:
        if not self.tensors:
            raise AttackError("A Guess must hold tokens, labels, scores, answers or members.")
        if self.tokens is not None and (self.tokens.dim() != 2 or self.tokens.is_floating_point()):
            raise AttackError(
                f"Guess.tokens must be whole numbers of shape (N, T), not {self.tokens.dtype} of shape "
                f"{tuple(self.tokens.shape)}."
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is guessed, by name."""
        named = {name: getattr(self, name) for name in GUESSED}
        return {name: value for name, value in named.items() if value is not None}

    def of(self, rows: Sequence[int]) -> Guess:
        """What is guessed of some victims, in the order of `rows`; candidates stay as they are.

        Raises:
            AttackError: It has no row for one of them.
        """
        for name, value in self.tensors.items():
            if name != "members" and rows and max(rows) >= len(value):
                raise AttackError(
                    f"The attack guessed {name} for {len(value)} victims; victim {max(rows)} is missing."
                )
        chosen = {
            name: value if name == "members" else value[list(rows)]
            for name, value in self.tensors.items()
        }
        return Guess(**chosen, positive=self.positive, budget=self.budget)


def wants(attack: Attack) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names an attack cannot do without, and the names it can use.

    Raises:
        AttackError: A parameter is not in the vocabulary of knowledge.
    """
    parameters = list(inspect.signature(attack).parameters.values())
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            raise AttackError(
                f"{_name(attack)} takes *{parameter.name}: an attack must name what it needs to know."
            )
    return (
        tuple(p.name for p in parameters if p.default is p.empty),
        tuple(p.name for p in parameters if p.default is not p.empty),
    )


@frozen(eq=False, slots=False)
class Launch:
    """One attack of a run: the callable, what it may know, and the seed of its random stream.

    With `opening` it is the attack's method `adversary` that is called, before anything crosses.
    """

    name: str
    attack: Callable[..., Any]
    knowledge: tuple[str, ...] = field(default=("K4",), converter=names_of)
    seed: int = 0
    opening: bool = False

    @property
    def called(self) -> Callable[..., Any]:
        """What is called with knowledge."""
        return self.attack.adversary if self.opening else self.attack  # type: ignore[attr-defined, no-any-return]

    @cached_property
    def required(self) -> tuple[str, ...]:
        """Names the attack cannot do without."""
        return wants(self.called)[0]

    @cached_property
    def optional(self) -> tuple[str, ...]:
        """Names the attack can use."""
        return wants(self.called)[1]

    @cached_property
    def granted(self) -> frozenset[str]:
        """All names the attack may use."""
        return granted(self.knowledge)

    @property
    def asked(self) -> frozenset[str]:
        """Names the attack asks for and may use."""
        return self.granted.intersection((*self.required, *self.optional))

    def check(self) -> None:
        """See that the attack asks for nothing it is not granted; raises `AttackError`."""
        check(self.called, self.granted)


def check(
    attack: Attack, allowed: Collection[str], vocabulary: Collection[str] = VOCABULARY
) -> None:
    """See that an attack asks for nothing it is not granted.

    Raises:
        AttackError: It asks for a name that does not exist, or for more than granted.
    """
    needed, optional = wants(attack)
    for name in (*needed, *optional):
        if name not in vocabulary:
            raise AttackError(
                f"{_name(attack)} asks for {name!r}, which is not knowledge.{alternatives(name, vocabulary)} "
                "Options belong in fields, not in arguments."
            )
    missing = [name for name in needed if name not in allowed]
    if missing:
        by_name = [name for name in missing if name in vocabulary and name not in PRESETS["K4"]]
        hint = "Raise the attacker's knowledge"
        if by_name:
            hint += f" (no preset holds {', '.join(by_name)}: name it, as in {['K4', *by_name]})"
        raise AttackError(
            f"{_name(attack)} needs {', '.join(missing)}, which it is not granted. Granted: "
            f"{', '.join(sorted(allowed))}. {hint} or choose another attack."
        )


def launch(attack: Attack, knowledge: Mapping[str, Any]) -> Guess:
    """Call `attack` with what it asks for of `knowledge` (name → value).

    Raises:
        AttackError: It asks for more than there is, or returns something else than a `Guess`.
    """
    guess = call(attack, knowledge)
    if not isinstance(guess, Guess):
        raise AttackError(
            f"{_name(attack)} returned a {type(guess).__name__}; it must return a Guess."
        )
    return guess


def call(attack: Callable[..., Any], knowledge: Mapping[str, Any]) -> Any:
    """Call whatever names what it needs with what it asks for of `knowledge` (name → value).

    Raises:
        AttackError: It asks for more than there is.
    """
    check(attack, knowledge.keys(), {*VOCABULARY, *knowledge})
    needed, optional = wants(attack)
    arguments = {name: knowledge[name] for name in needed}
    arguments |= {name: knowledge[name] for name in optional if name in knowledge}
    return attack(**arguments)


def _name(attack: Attack) -> str:
    return getattr(attack, "__qualname__", type(attack).__name__)
