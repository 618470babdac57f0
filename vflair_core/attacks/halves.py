"""The data party's halves as an attacker holds them: the head and the tail as functions of their input."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn
from transformers import PreTrainedModel

from vflair_core.attacks.candidates import Candidates, Prefix
from vflair_core.errors import AttackError
from vflair_core.parties.data_party.party import DataParty
from vflair_core.parties.split import split
from vflair_core.partition.partition import Partition


@define(eq=False)
class Head:
    """The head: tokens or embeddings in, undefended smashed data (B, T, D) out, with gradients."""

    _party: DataParty
    _candidates: Candidates = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._candidates = Candidates(self._party)

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

    def cache(self) -> Prefix:
        """Return the beginning of texts of which no token is known yet."""
        return self._candidates.nothing()

    def try_tokens(self, tokens: Tensor, cache: Prefix) -> Tensor:
        """Return the smashed row of each candidate as the next token: (B, C) → (B, C, D).

        Each candidate sees the beginning and itself only; the beginning stays as it was.
        """
        return self._candidates.tried(tokens, cache)

    def append(self, tokens: Tensor, cache: Prefix) -> Tensor:
        """Add one token to each beginning: (B, 1) → (B, 1, D)."""
        return self._candidates.append(tokens, cache)

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
