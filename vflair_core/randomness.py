"""Named random streams, and the random state of the process."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def stream_seed(seed: int, name: str) -> int:
    """The seed of a named random stream: adding a stream changes no other."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "little")


def generator_from(seed: int | str | None, index: int) -> torch.Generator:
    """A stream whose whole state comes from a digest: `manual_seed` would keep 32 bits of it."""
    material = os.urandom(32) if seed is None else f"defense {index} {seed}".encode()
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()  # a header of 24 bytes, then 624 words of 32 bits in 64
    words = np.frombuffer(hashlib.shake_256(material).digest(624 * 4), "<u4").astype("<u8")
    state[24 : 24 + 624 * 8] = torch.from_numpy(words.view("u1").copy())
    generator.set_state(state)
    return generator


def adapter_seed(seed: int, name: str) -> int:
    """Seed of the adapter of one module, whichever party holds it."""
    digest = hashlib.sha256(f"adapter {seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def random_states(device: torch.device) -> Sequence[Tensor]:
    """Return the global random states that a forward on `device` draws from."""
    if device.type == "cuda":
        return torch.get_rng_state(), *torch.cuda.get_rng_state_all()
    return (torch.get_rng_state(),)


def set_random_states(states: Sequence[Tensor]) -> None:
    """Take up the states that `random_states` returned."""
    if states:
        torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])
