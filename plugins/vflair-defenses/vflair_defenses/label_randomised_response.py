"""Randomised response on class labels: label differential privacy, once for each example."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from attrs import define, field, validators
from torch import Tensor

from vflair_core import Defense, DefenseError, Exchange, Guarantee, Mechanism
from vflair_defenses.rows import classes_of

if TYPE_CHECKING:
    from vflair_core import Party


@define(slots=False)
class LabelRandomisedResponse(Defense):
    """Keep a label with probability e^ε / (e^ε + K − 1), else take one of the other K − 1 classes.

    Warner, JASA 60 (1965); for training: Ghazi et al., "Deep Learning with Label Differential Privacy", NeurIPS
    2021, arXiv 2102.06062. The answer of an example is drawn once and kept (RAPPOR's permanent response, arXiv
    1407.6981), so that epochs cost nothing more. An example is known by its text before any defense: of two with
    equal text the second gets the answer of the first.

    Attributes:
        epsilon: ε of one label; inf keeps all labels.
    """

    epsilon: float = field(default=2.0, validator=validators.ge(0))
    _classes: int = field(init=False, default=0)
    _answers: dict[bytes, int] = field(init=False, factory=dict, eq=False)

    covers = frozenset({"labels"})
    supports = frozenset({("*", "classification", phase) for phase in ("train", "eval")})

    def prepare(self, public_texts: Sequence[str], data_party: Party) -> None:
        """Ask the model how many classes there are."""
        self._classes = classes_of(data_party)

    def on_labels(self, labels: Tensor, exchange: Exchange) -> Tensor:  # (B,)
        if labels.dim() != 1 or labels.is_floating_point():
            raise DefenseError(
                f"LabelRandomisedResponse takes class labels of shape (B,), not {tuple(labels.shape)} of "
                f"{labels.dtype}. For text, use a defense on text."
            )
        if not self._classes:
            raise DefenseError(
                "LabelRandomisedResponse does not know the number of classes yet: call prepare([], data_party)."
            )
        if math.isinf(self.epsilon):
            return labels
        if exchange.batch.get("inputs_embeds") is not None:
            raise DefenseError(
                "LabelRandomisedResponse answers once for each text, and embeddings do not say which text they are of: one that is "
                "moved a little would be answered anew. Call the model with input_ids."
            )
        fresh = self._respond(labels.cpu(), exchange.generator)
        pairs = zip(exchange.examples, fresh.tolist(), strict=True)
        kept = [self._answers.setdefault(example, answer) for example, answer in pairs]
        return torch.tensor(kept, dtype=labels.dtype, device=labels.device)

    def _respond(self, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        keep = 1 / (1 + (self._classes - 1) * math.exp(-self.epsilon))
        kept = torch.rand(labels.shape, generator=generator) < keep
        shift = torch.randint(1, max(self._classes, 2), labels.shape, generator=generator)
        return torch.where(kept, labels, (labels + shift) % self._classes)

    def gradient_mechanism(self) -> Mechanism:
        """The gradient is that of the answer, and the answer the likeliest label: there is no more to know."""
        return Mechanism()

    def state(self) -> dict[str, Tensor]:
        """The number of classes. The answers are randomness, which nobody is told."""
        return {"classes": torch.tensor(self._classes)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._classes = int(state["classes"])

    def private_state(self) -> dict[str, Tensor]:
        """The answers: a run that is resumed gives them again, and pays no second ε."""
        if not self._answers:
            return {}
        keys = torch.frombuffer(bytearray(b"".join(self._answers)), dtype=torch.uint8)
        return {"keys": keys.view(-1, 32), "answers": torch.tensor(list(self._answers.values()))}

    def load_private_state(self, state: Mapping[str, Tensor]) -> None:
        self._answers = {}
        if state:
            rows = zip(state["keys"], state["answers"].tolist(), strict=True)
            self._answers = {bytes(key.tolist()): answer for key, answer in rows}

    def guarantee(
        self, releases: int, messages: int = 0, gradients: int | None = None
    ) -> Guarantee:
        """One release a label, however many gradients are computed from it."""
        if math.isinf(self.epsilon):
            return Guarantee()
        return Guarantee(
            mechanism="permanent randomised response on labels",
            adjacency="replace the label of one example; its text stays",
            delta=0.0,
            epsilon_per_release=self.epsilon,
            releases=1,
            epsilon=self.epsilon,
            excluded="the text, from which a label may be guessed",
            randomness="the data party's torch generator: from the operating system unless seeded",
        )
