"""The digest of a part of a checkpoint: of its facts, and of the name, type, shape and bytes of every tensor."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

METHOD = "sha256"


class PartDigest:
    """Grows tensor by tensor, in the order of their names, and reads each where it lies."""

    def __init__(self, facts: str) -> None:
        self._hash = hashlib.sha256(b"vflair part 1")
        self._add(facts.encode())

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in a tensor that lies in the host's memory."""
        about = [name, str(tensor.dtype), list(tensor.shape)]
        self._add(json.dumps(about).encode())
        flat = tensor.detach().contiguous().reshape(-1)
        self._add(flat.view(torch.uint8).numpy().data if flat.numel() else b"")

    def _add(self, content: bytes | memoryview) -> None:
        self._hash.update(len(content).to_bytes(8, "little"))  # or what follows could belong to it
        self._hash.update(content)

    def text(self) -> str:
        """The digest of all that was taken in, as it is written down."""
        return self._hash.hexdigest()
