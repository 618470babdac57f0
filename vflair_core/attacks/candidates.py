"""What candidates for the next token would give, many in one pass: for attacks that find a text from left to right."""

from __future__ import annotations

from typing import Any

import torch
from attrs import define
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from vflair_core.communication.cache_kinds import cache_argument
from vflair_core.parties.data_party import remote_cache
from vflair_core.parties.data_party.party import DataParty

SHORTEST = 8  # positions of the first proof
AT_ONCE = 16384  # positions that are read together, where beginnings are read again
WIDEST = 1024  # candidates of one sequence: the mask between them grows with their square


@define(eq=False)
class Prefix:
    """The beginnings of B texts as a head has read them: tokens (B, t), and what its layers keep of them if they do."""

    tokens: Tensor | None
    states: Cache | None

    @property
    def length(self) -> int:
        """Tokens of each text."""
        return 0 if self.tokens is None else self.tokens.shape[1]

    def batch_select_indices(self, rows: Tensor) -> None:
        """Keep these texts, in this order, some perhaps twice."""
        if self.tokens is None:
            return
        self.tokens = self.tokens[rows]
        if self.states is not None:
            self.states.batch_select_indices(rows)

    def of(self, rows: Tensor) -> Prefix:
        """Return a copy of these texts."""
        states = None if self.states is None else remote_cache.copied(self.states)
        chosen = Prefix(self.tokens, states)
        chosen.batch_select_indices(rows)
        return chosen


@define(eq=False)
class Candidates:
    """Tries candidates after the prefixes of a head.

    All of a text are one sequence behind its prefix: they have the same position, and a mask lets each see the prefix and
    itself only, so that what is kept of the prefix is neither read again nor copied. Some heads cannot be told so (alibi takes
    distances from the mask, windows count places in the sequence, recurrent layers have no mask). That is found by
    trying, for as many positions as are needed; where it does not hold, each candidate is read after its whole prefix.
    """

    party: DataParty
    proven: int = 0  # positions, of prefix and candidates together, for which one sequence is right
    ended: bool = False  # whether it is wrong beyond

    def nothing(self) -> Prefix:
        """Return the prefix of no token."""
        return Prefix(None, self._no_states() if self._reach(SHORTEST) else None)

    def tried(self, tokens: Tensor, prefix: Prefix) -> Tensor:
        """Return the smashed row of each candidate as the next token: (B, C) → (B, C, D). The prefix stays as it was."""
        width = min(tokens.shape[1], WIDEST)
        room = self._reach(prefix.length + width) - prefix.length
        if prefix.states is None or room < 1:
            return self._read_again(tokens, prefix)
        # Without a token a cache would stay bound to this batch size.
        states = prefix.states if prefix.length else self._no_states()
        rows = [
            self._in_one_sequence(part, states, prefix.length)
            for part in tokens.split(min(room, WIDEST), 1)
        ]
        return torch.cat(rows, dim=1)

    def append(self, tokens: Tensor, prefix: Prefix) -> Tensor:
        """Add one token to each text: (B, 1) → (B, 1, D)."""
        longer = tokens if prefix.tokens is None else torch.cat([prefix.tokens, tokens], dim=1)
        rows = (
            self._whole(longer)[:, -1:]
            if prefix.states is None
            else self._extend(tokens, prefix.states, torch.ones_like(longer), longer.shape[1] - 1)
        )
        prefix.tokens = longer
        return rows

    def _no_states(self) -> Cache:
        return DynamicCache(config=self.party.model.config)

    def _in_one_sequence(self, tokens: Tensor, states: Cache, past: int) -> Tensor:
        batch, width = tokens.shape
        dtype = next(self.party.parameters()).dtype
        lowest = torch.finfo(dtype).min
        alone = torch.full((width, width), lowest, dtype=dtype, device=tokens.device)
        seen = torch.zeros(width, past, dtype=dtype, device=tokens.device)
        mask = torch.cat([seen, alone.fill_diagonal_(0.0)], dim=1)
        rows = self._extend(tokens, states, mask.expand(batch, 1, width, past + width), past)
        layers: list[Any] = states.layers
        for layer in layers:
            if layer.get_seq_length():  # those of the tail hold nothing
                layer.crop(-width)
        return rows

    def _extend(self, tokens: Tensor, states: Cache, mask: Tensor, position: int) -> Tensor:
        return self.party.smashed(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=torch.full_like(tokens, position),
            use_cache=True,
            **{cache_argument(self.party.model): states},
        )

    def _read_again(self, tokens: Tensor, prefix: Prefix) -> Tensor:
        batch, width = tokens.shape
        last = tokens.reshape(-1, 1)
        if prefix.tokens is not None:
            last = torch.cat([prefix.tokens.repeat_interleave(width, dim=0), last], dim=1)
        parts = last.split(max(AT_ONCE // last.shape[1], 1))
        rows = torch.cat([self._whole(part)[:, -1] for part in parts])
        return rows.unflatten(0, (batch, width))

    def _whole(self, tokens: Tensor) -> Tensor:
        return self.party.smashed(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False
        )

    def _reach(self, wanted: int) -> int:
        """Return for how many positions one sequence is proven, and prove it for `wanted` if that can be done."""
        while self.proven < wanted and not self.ended:
            further = max(2 * self.proven, SHORTEST)
            if self._holds(further):
                self.proven = further
            else:
                self.ended = True
        return self.proven

    @torch.no_grad()
    def _holds(self, positions: int) -> bool:
        """Whether the candidates nearest and farthest behind two tokens give what they give alone, and leave no trace."""
        table: Tensor = self.party.model.get_input_embeddings().weight  # type: ignore[assignment]
        ids = torch.arange(3, 3 + positions, device=table.device)[None] % len(table)
        before, tried, last = ids[:, :2], ids[:, 2:], ids[:, -1:]
        try:
            prefix = Prefix(None, self._no_states())
            for token in before.split(1, dim=1):
                self.append(token, prefix)
            assert prefix.states is not None
            rows = self._in_one_sequence(tried, prefix.states, 2)[0]
            found = torch.stack([rows[0], rows[-1], self.append(last, prefix)[0, 0]])
        except Exception:  # noqa: BLE001 - models refuse such a mask or cache in ways of their own
            return False
        alone = self._read_again(ids[:, [2, -1, -1]], Prefix(before, None))[0]
        off = (found - alone).norm(dim=-1) / alone.norm(dim=-1)
        return bool((off < torch.finfo(alone.dtype).eps ** 0.5).all())
