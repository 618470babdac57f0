"""What guesses about one arm are held against. It stays with the data party, in memory or in a file of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import frozen
from torch import Tensor

from vflair_core.experiments.grading.truth import Truth


@frozen(eq=False)
class AnswerKey:
    """The truth about the victims of one arm, and which of them are for what.

    Args:
        truth: What really was there.
        subset: Victims that crossed again with the defense bypassed.
        control: What really was there then; None in an arm without defenses.
        prior: (T,) the best guess of someone who knows the public text and saw no message.
        development: Last victims, which choose among attacks and are not reported.
        update_batch: Victims that share an update.
    """

    truth: Truth
    subset: tuple[int, ...]
    control: Truth | None = None
    prior: Tensor | None = None
    development: int = 0
    update_batch: int = 1

    @property
    def reported(self) -> range:
        """Victims whose grades are told."""
        return range(len(self.truth.tokens) - self.development)

    @property
    def apart(self) -> range:
        """Victims that only choose among attacks."""
        return range(len(self.reported), len(self.truth.tokens))

    def of_responses(self) -> AnswerKey:
        """The same, about answers instead of prompts."""
        control = self.control and self.control.of_responses()
        return attrs.evolve(self, truth=self.truth.of_responses(), control=control)

    def for_updates(self) -> AnswerKey:
        """The same, for guesses made from updates: of victims that share one the guesses are in no order."""
        truth, control = self.truth, self.control
        return attrs.evolve(
            self,
            truth=attrs.evolve(truth, update_batch=self.update_batch),
            control=control and attrs.evolve(control, update_batch=self.update_batch),
        )

    def save(self, path: Path) -> None:
        """Write all of it as JSON: private text, in clear, in a file that nobody else may read."""
        plain = {
            "truth": _plain(self.truth),
            "subset": list(self.subset),
            "control": None if self.control is None else _plain(self.control),
            "prior": None if self.prior is None else self.prior.tolist(),
            "development": self.development,
            "update_batch": self.update_batch,
        }
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(json.dumps(plain))
        path.chmod(0o600)  # one that was there keeps its mode

    @classmethod
    def load(cls, path: Path) -> AnswerKey:
        """Read what `save` wrote."""
        plain = json.loads(path.read_text())
        return cls(
            _truth(plain["truth"]),
            tuple(plain["subset"]),
            None if plain["control"] is None else _truth(plain["control"]),
            None if plain["prior"] is None else torch.tensor(plain["prior"]),
            plain["development"],
            plain["update_batch"],
        )


def _plain(truth: Truth) -> dict[str, Any]:
    return {name.name: _values(getattr(truth, name.name)) for name in attrs.fields(Truth)}


def _values(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_values(item) for item in value]
    return sorted(value) if isinstance(value, frozenset) else value


def _truth(plain: dict[str, Any]) -> Truth:
    kinds = {
        "tokens": torch.long,
        "originals": torch.long,
        "private": torch.bool,
        "answers": torch.bool,
    }
    rows: dict[str, Any] = {
        name: [torch.tensor(row, dtype=kind) for row in plain[name]] for name, kind in kinds.items()
    }
    whole: dict[str, Any] = {
        name: None if plain[name] is None else torch.tensor(plain[name])
        for name in ("labels", "members")
    }
    secrets = [tuple(each) for each in plain["secrets"]]
    return Truth(
        **rows,
        **whole,
        texts=plain["texts"],
        secrets=secrets,
        known=frozenset(plain["known"]),
        update_batch=plain["update_batch"],
    )
