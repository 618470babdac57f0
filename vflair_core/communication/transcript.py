"""Everything that crossed, in order, as a file that can be attacked later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
from attrs import define, field, frozen
from torch import Tensor

from vflair_core.communication.channel import Direction
from vflair_core.communication.message import Kind, Message, Phase, Role
from vflair_core.errors import ProtocolError


@frozen(eq=False)
class Record:
    """One tensor that crossed, as the model party saw it."""

    kind: Kind
    direction: Direction
    role: Role
    name: str
    phase: Phase
    step: int
    exchange: int
    tensor: Tensor


@define
class Transcript:
    """Everything that crossed while it tapped a channel, in order; it can be saved and read back."""

    messages: list[Record] = field(factory=list)

    def __call__(self, message: Message, direction: Direction, _seconds: float, /) -> None:
        about = (message.phase, message.step, message.exchange)
        self.messages.extend(
            Record(message.kind, direction, crossing.role, crossing.name, *about, crossing.tensor)
            for crossing in message.tensors
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; names and roles are in its metadata."""
        import json

        from safetensors.torch import save_file

        facts = [
            attrs.asdict(record, filter=lambda attribute, _: attribute.name != "tensor")
            for record in self.messages
        ]
        tensors = {f"{n:06d}": r.tensor.contiguous() for n, r in enumerate(self.messages)}
        save_file(tensors, path, metadata={"vflair_transcript": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> Transcript:
        """Read what `save` wrote."""
        import json

        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            if "vflair_transcript" not in metadata:
                raise ProtocolError(f"{path} is not a transcript: it lacks the vflair metadata.")
            facts = json.loads(metadata["vflair_transcript"])
            return cls(
                [Record(**f, tensor=file.get_tensor(f"{n:06d}")) for n, f in enumerate(facts)]
            )
