"""The data party's halves as an attacker holds them: the head and the tail as functions of their input."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from attrs import define
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from vflair_core.communication.cache_kinds import cache_argument
from vflair_core.errors import AttackError
from vflair_core.parties.data_party.party import DataParty
from vflair_core.parties.split import split
from vflair_core.partition.partition import Partition


@define(eq=False)
class Head:
    """The head: tokens or embeddings in, undefended smashed data (B, T, D) out, with gradients."""

    _party: DataParty

    def __call__(
        self,
        input_ids: Tensor | None = None,  # (B, T)
        *,
        inputs_embeds: Tensor | None = None,  # (B, T, D)
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        if attention_mask is None:
            shape = input_ids.shape if input_ids is not None else inputs_embeds.shape[:2]  # type: ignore[union-attr]
            attention_mask = torch.ones(shape, dtype=torch.long, device=self.device)
        given = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
        }
        inputs = {key: value for key, value in given.items() if value is not None}
        return self._party.smashed(**inputs, **{"use_cache": False, **options})

    def returned(self, body: nn.Module, *, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Run the head and the model party's modules: what would come back, (B, T, D) or logits, with gradients.

        Raises:
            AttackError: The model has two stacks.
        """
        if len(self._party.stages) > 1:
            raise AttackError(
                f"{type(self._party.model).__name__} asks the model party {len(self._party.stages)} times in a forward; "
                "it cannot be run as one chain."
            )
        inputs = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        return self._party.calls.dry_runs.returned({**inputs, "use_cache": False}, body)

    @property
    def partition(self) -> Partition:
        """The cut."""
        return self._party.partition

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The data party's weights, the local tail's too, by the names they have in the whole model."""
        return self._party.named_parameters()

    def get_submodule(self, name: str) -> nn.Module:
        """Return a module by the name it has in the whole model."""
        return self._party.model.get_submodule(name)

    @property
    def embeddings(self) -> Tensor:
        """The token embedding table (V, D)."""
        return self._party.model.get_input_embeddings().weight  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Where the head's weights are; what it is given must be there."""
        return self.embeddings.device

    def vectors(self) -> Tensor:
        """What goes into `inputs_embeds` for every token: the table (V, D), scaled where the family scales it."""
        table = self._party.model.get_input_embeddings()
        return table(torch.arange(len(self.embeddings), device=self.device)).detach()  # type: ignore[no-any-return]

    def cache(self) -> Cache:
        """Return an empty cache for the head's own layers."""
        return DynamicCache(config=self._party.model.config)

    def try_tokens(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Return the smashed row of each candidate as the next token, all in one pass: (B, C) → (B, C, D).

        Each candidate attends to the cached prefix and to itself only; the cache stays as it was.
        """
        past, (batch, width) = cache.get_seq_length(), tokens.shape
        dtype = self.embeddings.dtype
        lowest = torch.finfo(dtype).min
        alone = torch.full((width, width), lowest, dtype=dtype, device=self.device)
        seen = torch.zeros(width, past, dtype=dtype, device=self.device)
        mask = torch.cat([seen, alone.fill_diagonal_(0.0)], dim=1)
        # An empty cache would stay bound to this batch size, so it is left untouched.
        scratch = cache if past else self.cache()
        rows = self._extend(
            tokens, scratch, mask.expand(batch, 1, width, past + width), repeated=True
        )
        scratch.crop(-width)
        return rows

    def append(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Add one token to each prefix in the cache: (B, 1) → (B, 1, D)."""
        shape = len(tokens), cache.get_seq_length() + tokens.shape[1]
        everything = torch.ones(shape, dtype=torch.long, device=self.device)
        return self._extend(tokens, cache, everything, repeated=False)

    def _extend(self, tokens: Tensor, cache: Cache, mask: Tensor, *, repeated: bool) -> Tensor:
        past = cache.get_seq_length()
        step = (
            torch.zeros(tokens.shape[1], dtype=torch.long, device=self.device)
            if repeated
            else torch.arange(tokens.shape[1], device=self.device)
        )
        positions = (past + step).expand(tokens.shape)
        return self._party.smashed(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{cache_argument(self._party.model): cache},
        )

    def is_causal(self) -> bool:
        """Whether a smashed row depends on earlier tokens only, found by trying."""
        ids = torch.arange(3, 11, device=self.device)[None] % len(self.embeddings)  # (1, 8)
        changed = ids.clone()
        changed[0, -1] = (ids[0, -1] + 1) % len(self.embeddings)
        with torch.no_grad():
            return torch.equal(self(ids)[:, :-1], self(changed)[:, :-1])


@define(eq=False)
class Tail:
    """The local tail of an HBT partition: returned states (B, T, D) in, logits out, with gradients."""

    _party: DataParty

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The data party's modules by the names they have in the whole model, in its order."""
        return self._party.model.named_modules()

    def is_of(self, head: Head) -> bool:
        """Whether head and tail are halves of the same weights, and not of two times of one model."""
        return self._party is head._party  # noqa: SLF001 - the two are made together

    @property
    def device(self) -> torch.device:
        """Where the tail's weights are; what it is given must be there."""
        return self._party.model.device

    def __call__(self, returned: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:
            attention_mask = torch.ones(
                returned.shape[:2], dtype=torch.long, device=returned.device
            )
        # Decoder classifiers look for the last token that is no padding.
        pad = self._party.model.config.get_text_config().pad_token_id or 0
        ids = torch.where(attention_mask.bool(), int(pad == 0), pad)
        outputs = self._party.complete(
            returned, input_ids=ids, attention_mask=attention_mask, use_cache=False
        )
        return outputs["logits"]  # type: ignore[no-any-return]


def halves(
    model: PreTrainedModel, partition: Partition, device: torch.device | str | None = None
) -> tuple[Head, Tail | None]:
    """Cut a copy of `model` and return its head and, in HBT, its tail, in eval mode and frozen.

    With a `device` they are moved there; what they are given must be there too, and so is what they return.

    Raises:
        AttackError: The model has no weights to give.
    """
    if next(model.parameters(), None) is None:
        raise AttackError("This model has no weights, so it has no halves.")
    party, _ = split(copy.deepcopy(model), partition)
    party.model.eval().requires_grad_(False)
    if device is not None:
        party.model.to(device)  # type: ignore[arg-type]
    return Head(party), Tail(party) if partition.tail else None
