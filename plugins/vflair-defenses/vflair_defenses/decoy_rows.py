"""Send rows of public text among the private ones, alike in every way that crosses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field, validators
from torch import Tensor

from vflair_core import Defense, DefenseError, Exchange
from vflair_defenses.rows import classes_of, public_ids

if TYPE_CHECKING:
    from vflair_core import Party

OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")


@define(slots=False)
class DecoyRows(Defense):
    """Add `count` rows of public text to each batch, at random places, and drop their outputs again.

    After the split-learning audit of arXiv 2609.04382, where the loss left decoys out, their gradients were exactly
    zero, and the zeros gave all real rows away. So here decoys enter the loss: a decoy of a language model learns
    its own text, one of a classifier a random class, and both parties train on them as on the others. Decoys take
    the mask of a random real row, and the special tokens where it has some. Whoever can tell public from private text
    still tells them apart, and public text is public: decoys that are read can be looked up.

    Attributes:
        count: Decoys in each batch; 0 adds none.
    """

    count: int = field(default=4, validator=validators.ge(0))
    _stream: Tensor = field(init=False, factory=lambda: torch.empty(0, dtype=torch.int64), eq=False)
    _special: Tensor = field(
        init=False, factory=lambda: torch.empty(0, dtype=torch.int64), eq=False
    )
    _classes: int = field(init=False, default=0)

    covers = frozenset({"gradients"})
    supports = frozenset(
        {
            ("*", task, phase)
            for task in ("causal-lm", "classification")
            for phase in ("train", "eval")
        }
    )

    def prepare(self, public_texts: Sequence[str], data_party: Party) -> None:
        """Keep the tokens of public text, one after the other, to cut decoys from."""
        if self.count:
            ids = public_ids("DecoyRows", public_texts, data_party)
            assert data_party.tokenizer is not None  # there are ids
            stream = torch.cat([some.flatten() for some in ids])
            special = data_party.tokenizer.all_special_ids  # type: ignore[attr-defined]
            self._special = torch.tensor(special, dtype=torch.int64)
            self._stream = stream[~torch.isin(stream, self._special)]
        self._classes = classes_of(data_party)

    def expand(
        self, batch: dict[str, Tensor], exchange: Exchange
    ) -> dict[str, Tensor]:  # (B, ...) -> (B + count, ...)
        if not self.count:
            return batch
        ids, generator = batch.get("input_ids"), exchange.generator
        if ids is None or not len(self._stream):
            raise DefenseError(
                "DecoyRows makes decoys of token ids from public text: call prepare(public_texts, data_party) "
                "first, and pass input_ids."
            )
        rows, length = ids.shape
        twins = torch.randint(rows, (self.count,), generator=generator).to(ids.device)
        order = torch.randperm(rows + self.count, generator=generator).to(ids.device)
        starts = torch.randint(len(self._stream), (self.count, 1), generator=generator)
        text = self._stream[(starts + torch.arange(length)) % len(self._stream)].to(ids.device)
        # Padding of the twin stays padding, and where it begins with a special token so does the decoy.
        kept = torch.isin(ids[twins], self._special.to(ids.device))
        if (mask := batch.get("attention_mask")) is not None:
            kept |= ~mask[twins].bool()
        text = torch.where(kept, ids[twins], text)
        decoys = {name: value[twins] for name, value in batch.items()}
        decoys["input_ids"] = text
        if (labels := batch.get("labels")) is not None:
            decoys["labels"] = self._labels(labels, twins, text, generator)
        exchange.memo[f"kept {id(self)}"] = order.argsort()[:rows]
        return {name: torch.cat([batch[name], decoys[name]])[order] for name in batch}

    def _labels(
        self, labels: Tensor, twins: Tensor, text: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """A random class, or the decoy's own tokens where its twin is labelled."""
        if labels.dim() == 2:
            return torch.where(labels[twins] != -100, text, -100)
        classes = torch.randint(self._classes, (self.count,), generator=generator)
        return classes.to(labels.device, labels.dtype)

    def contract(self, outputs: Any, exchange: Exchange) -> Any:
        """Drop the decoys and restore the order; the loss stays the mean over all rows that were sent."""
        if not self.count:
            return outputs
        for name in OUTPUTS:
            if isinstance(outputs.get(name), Tensor):
                outputs[name] = outputs[name][exchange.memo[f"kept {id(self)}"]]
        if outputs.get("past_key_values") is not None or outputs.get("hidden_states") is not None:
            raise DefenseError(
                "DecoyRows cannot take its rows out of a cache or of hidden states: call the model with "
                "use_cache=False and without output_hidden_states."
            )
        return outputs

    def state(self) -> dict[str, Tensor]:
        return {
            "stream": self._stream,
            "special": self._special,
            "classes": torch.tensor(self._classes),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._stream, self._special = state["stream"], state["special"]
        self._classes = int(state["classes"])
