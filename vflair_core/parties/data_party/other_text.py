"""Other content of the same form: what a probe gives the model in place of the text at hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from attrs import define, field
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from vflair_core.communication.cache_kinds import parts_of


@define(eq=False)
class OtherText:
    """Draws other content for the inputs of a call.

    With `keeps_form`, padding stays where it is and rows keep their number of end tokens: some models read masks
    from these. Otherwise words are drawn everywhere, and every other time from the special ones.

    Args:
        config: Of the model.
        generator: Of the words.
        keeps_form: Whether padding and end tokens stay.
        fixes_embeddings: Words are drawn, and what the model is given instead of words, or computed before, is not:
            one vector stands everywhere.
    """

    config: Any
    generator: torch.Generator
    keeps_form: bool = True
    fixes_embeddings: bool = False
    drawn: Counter[str] = field(factory=Counter)  # words that were free to differ, by input
    longest: dict[str, int] = field(factory=dict)  # most of them in one row, by input

    def of(self, key: str, value: Any) -> Any:
        """Other content of equal form for an input that carries text; anything else as it is."""
        if isinstance(value, ModelOutput):
            if self.fixes_embeddings:
                return value
            return type(value)(**{k: self.of(key, item) for k, item in value.items()})
        if isinstance(value, (tuple, list)):
            return type(value)(self.of(key, item) for item in value)
        if not isinstance(value, Tensor):
            return value
        if not is_text(key, value):
            return value.clone()
        if key.endswith("inputs_embeds") and self.fixes_embeddings:
            return one_vector(value)
        if value.is_floating_point():
            return self._values(key, value)
        if key == "labels" and value.dim() < 2:  # classes
            size = max(int(value.max()) + 1, 1)
            classes = torch.randint(size, value.shape, generator=self.generator).to(value.device)
            return torch.where(value < 0, value, classes)
        return torch.where(value < 0, value, self._ids(key, value))

    def cache(self, cache: Cache) -> None:
        """Replace what a copied cache holds locally: it came of text too."""
        if self.fixes_embeddings:
            return
        for layer in (layer for part in parts_of(cache) for layer in part.layers):
            for name, held in list(vars(layer).items()):
                if isinstance(held, Tensor) and held.is_floating_point() and not held.is_meta:
                    setattr(layer, name, self._noise(held))

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(like)

    def _values(self, key: str, value: Tensor) -> Tensor:
        if key != "labels":
            self._count(key, torch.ones(value.shape[:-1], dtype=torch.bool))
        return torch.where(_places_in(value), value, self._noise(value)).requires_grad_()

    def _ids(self, key: str, ids: Tensor) -> Tensor:
        """Random tokens; places of images stay."""
        text: Any = self.config.get_text_config()
        size = getattr(text, "vocab_size", None) or int(ids.max()) + 1
        fixed, pad = _places(self.config) | _places(text), getattr(text, "pad_token_id", None)
        if self.keeps_form and pad is not None:
            fixed |= {pad}
        stays = _among(ids, fixed)
        ends, end = torch.zeros_like(stays), _end_of(text, size)
        other = torch.randint(size, ids.shape, generator=self.generator).to(ids.device)
        if not self.keeps_form:
            other = torch.where(self._coins(ids), self._special(text, size, ids), other)
        elif end is not None and end not in fixed and ids.dim() > 1:
            ends, fixed = self._ends(ids == end, stays), fixed | {end}
        free = next(token for token in range(size) if token not in fixed)
        other = other.masked_fill(_among(other, fixed), free)
        self._count(key, ~(stays | ends) & (ids >= 0))
        return torch.where(stays, ids, torch.where(ends, end or 0, other))

    def _ends(self, at_hand: Tensor, stays: Tensor) -> Tensor:
        """Where ends go: as many in a row as the first has, one at least, if most of its words stay free to differ."""
        count = max(int(at_hand[0].sum()), 1)
        count = min(count, stays.shape[1])
        scores = torch.rand(stays.shape, generator=self.generator).to(stays.device)
        places = scores.masked_fill(stays, -1).topk(count, dim=1).indices
        roomy = (~stays).sum(1, keepdim=True) >= 2 * count
        return torch.zeros_like(stays).scatter(1, places, True) & roomy

    def _coins(self, ids: Tensor) -> Tensor:
        return (torch.rand(ids.shape, generator=self.generator) < 0.5).to(ids.device)

    def _special(self, text: Any, size: int, ids: Tensor) -> Tensor:
        """Tokens with a meaning of their own, drawn for every place."""
        special = torch.tensor(_special(text, size), dtype=ids.dtype)
        return special[torch.randint(len(special), ids.shape, generator=self.generator)].to(
            ids.device
        )

    def _count(self, key: str, free: Tensor) -> None:
        self.drawn[key] += int(free.sum())
        rows = free.sum(-1) if free.dim() else free.long()
        self.longest[key] = max(self.longest.get(key, 0), int(rows.max()) if rows.numel() else 0)


def is_text(key: str, value: Any) -> bool:
    """Whether an input of a call carries content, and not only the form of it."""
    if isinstance(value, Tensor):
        carries = value.is_floating_point() and "mask" not in key
        return carries or key.endswith("input_ids") or key == "labels"
    return isinstance(value, (ModelOutput, tuple, list))


def one_vector(like: Tensor) -> Tensor:
    """The same vector at every position of embeddings (B, T, D)."""
    vector = torch.randn(like.shape[-1], generator=torch.Generator().manual_seed(0))
    return vector.to(like).expand_as(like).clone().requires_grad_()


def _among(ids: Tensor, tokens: set[Any]) -> Tensor:
    found = torch.zeros_like(ids, dtype=torch.bool)
    for token in tokens:
        found |= ids == token
    return found


def _end_of(text: Any, size: int) -> int | None:
    """The end token; configs name ends that have no word."""
    end = getattr(text, "eos_token_id", None)
    end = end[0] if isinstance(end, (list, tuple)) else end
    return end if end is not None and end < size else None


def _special(text: Any, size: int) -> list[int]:
    """Tokens with a meaning of their own, by the names that configs give them; 0 if there are none."""
    named = [value for name, value in text.to_dict().items() if name.endswith("token_id")]
    each = [token for value in named for token in (value if isinstance(value, list) else [value])]
    return sorted({token for token in each if isinstance(token, int) and 0 <= token < size}) or [0]


def _places_in(value: Tensor) -> Tensor:
    """Columns of whole numbers beside others: patches come with their row and column, which are form, not content."""
    whole = (
        (value == value.round()).flatten(0, -2).all(0) if value.dim() > 1 else torch.tensor(True)
    )
    return (whole & ~whole.all()).to(value.device)


def _places(config: Any) -> set[int]:
    """Tokens that stand for an image, a video or sound: where they are is form, not content."""
    senses = ("image", "video", "audio", "vision")
    return {
        value
        for name, value in config.to_dict().items()
        if isinstance(value, int) and "token" in name and name.startswith(senses)
    }
