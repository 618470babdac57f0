"""What calls of modules take, estimated from what they are given before they are made. Nothing that a peer says of it counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attrs import define, frozen
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from vflair_core.communication.program import tensors_of
from vflair_core.errors import ProtocolError
from vflair_core.parties.model_party.caps import Caps

VALUES = 17  # that a block keeps for its backward, for each one of its output (arXiv 2205.05198, equation 1)
SCORES = (
    2.5  # and for each pair of positions and each head, unless its attention is fused (the same)
)
FUSED = frozenset(["sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"])


@frozen
class Costs:
    """What the blocks of a model are like: bytes of a number, heads, and what a position takes in a layer of a cache."""

    itemsize: int
    heads: int  # whose scores are kept; 0 where attention is fused, or there is none
    cached: int  # bytes that a position of one row takes in one layer of a cache
    model: nn.Module

    @classmethod
    def of(cls, model: nn.Module, config: PreTrainedConfig | None) -> Costs:
        """Of `model`, the modules that are held here; `config` is the whole model's."""
        text = config.get_text_config(decoder=True) if config is not None else None
        itemsize = max((weight.dtype.itemsize for weight in model.parameters()), default=4)
        heads, width = _number(text, "num_attention_heads"), _number(text, "hidden_size")
        each = _number(text, "head_dim") or (width // heads if heads else width)
        states = 2 * each * (_number(text, "num_key_value_heads") or heads or 1)
        fused = getattr(text, "_attn_implementation", None) in FUSED
        return cls(itemsize, 0 if fused else heads, states * itemsize, model)

    @property
    def checkpoints(self) -> bool:
        """Whether blocks compute their activations again in the backward."""
        return any(
            isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing
            for m in self.model.modules()
        )


@frozen
class Call:
    """Bytes that one call of a block leaves behind."""

    graph: int
    cache: int


@define
class Meter:
    """Counts what one forward takes, call by call, against what it may."""

    costs: Costs
    caps: Caps
    graph_room: int | None  # bytes that its graph may hold; None: there is none
    past: int = 0  # positions in the cache
    cache_room: int | None = None  # bytes by which the cache may grow; None: there is none
    graph: int = 0  # bytes that its graph holds so far
    cache: int = 0  # bytes that it has put in the cache
    _checkpoints: bool | None = None
    _seen: tuple[Any, ...] | None = None  # what the call before was given
    _call: Call = Call(0, 0)

    def before(self, first: Any, beside: Sequence[Any], width: int = 0) -> None:
        """See that a call on the hidden states `first` may be made, with other arguments `beside` them.

        `width` is that of what comes out, where it is wider.

        Raises:
            ProtocolError: It would take too much.
        """
        if not isinstance(first, Tensor) or first.dim() < 2:
            return
        # Blocks are given the same tensors, one after the other.
        parts = tuple(tuple(map(id, b)) if type(b) is tuple else id(b) for b in beside)
        if (first.shape, parts, width) != self._seen:
            self._call = self._measured(first, tensors_of(list(beside)), width)
            self._seen = (first.shape, parts, width)
        if self.graph_room is not None:
            self.graph += self._call.graph
            self._check("graph_bytes", self.graph, self.graph_room, "graphs that wait")
        if self.cache_room is not None:
            self.cache += self._call.cache
            self._check("cache_bytes", self.cache, self.cache_room, "the caches of all sessions")

    def _measured(self, first: Tensor, others: Sequence[Tensor], width: int) -> Call:
        rows, positions, keys = self._extent(first, others)
        if max(positions, keys) > self.caps.positions:
            raise ProtocolError(
                f"{max(positions, keys)} positions came in one row; the model party takes {self.caps.positions} (its limit "
                "positions)."
            )
        if rows > self.caps.cache_rows and self.cache_room is not None:
            raise ProtocolError(
                f"{rows} rows came for a cache; the model party takes {self.caps.cache_rows} (its limit cache_rows)."
            )
        size = self.costs.itemsize
        values = rows * positions * first.shape[-1] * size
        scores = int(SCORES * self.costs.heads * rows * positions * keys) * size
        wide = rows * positions * width * size
        self._check("step_bytes", VALUES * values + scores + wide, self.caps.step_bytes, "a call")
        graph = 0
        if self.graph_room is not None:
            if self._checkpoints is None:
                self._checkpoints = self.costs.checkpoints
            graph = values if self._checkpoints else VALUES * values + scores
        return Call(graph, self.costs.cached * rows * positions)

    def _extent(self, first: Tensor, others: Sequence[Tensor]) -> tuple[int, int, int]:
        """Rows, positions and keys, as attention spreads what it is given."""
        positions = first.shape[-2]
        rows = first.numel() // max(first.shape[-1] * positions, 1)
        keys, apart = positions + self.past, rows * max(self.costs.heads, 1)
        for other in others:
            if not other.is_floating_point() and other.dtype.itemsize > 1:
                continue  # positions and lengths
            if other.dim() == 4:  # a mask or a bias
                rows, positions = max(rows, other.shape[0]), max(positions, other.shape[2])
                keys = max(keys, other.shape[3])
            elif other.dim() in (2, 3) and other.shape[0] != apart:
                rows = max(rows, other.shape[0])
                keys = max(keys, other.shape[1])
        return rows, positions, keys

    def _check(self, limit: str, wanted: int, room: int, of: str) -> None:
        if wanted > room:
            raise ProtocolError(
                f"About {wanted} bytes would be taken by {of}, and {max(room, 0)} are left at the model party (its limit "
                f"{limit}). Use smaller batches, shorter texts, torch.no_grad() where no backward comes, or gradient "
                "checkpointing at the model party; delete unused caches."
            )


def _number(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    return value if type(value) is int else 0
