"""Where attacks compute: the name that was asked for, and the device that is there for it."""

from __future__ import annotations

from typing import Any

import torch

from vflair_core.errors import ExperimentError


def attack_device(asked: str) -> torch.device:
    """The device that a name means here; "auto" is CUDA where torch has it, else the CPU.

    Raises:
        ExperimentError: torch does not know such a device, or it is not there.
    """
    if asked == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = None
    if device is None or (device.index or 0) >= _count(device.type):
        what = "torch knows no such device" if device is None else "it is not there"
        raise ExperimentError(
            f"Attacks were asked to compute on {asked!r}, and {what}. Possible here: auto, "
            f"{', '.join(_there())}. Set attack_device (or --device) to one of these."
        )
    return device


def hint_of(device: str, error: str) -> str:
    """What to do if an attack that moves no tensors failed because its models were on another `device`."""
    if device == "cpu" or "device" not in error:
        return ""
    return f' Its models were on {device}: if it moves no tensors to them, set attack_device = "cpu" (--device cpu).'


def _count(kind: str) -> int:
    """How many devices of a kind are there; 0 of a kind that does not compute."""
    module: Any = getattr(torch, kind, None)
    return int(module.device_count()) if hasattr(module, "device_count") else 0


def _there() -> list[str]:
    kinds = [kind for kind in ("cuda", "xpu", "mps") if _count(kind)]
    return ["cpu", *(f"{kind}:{n}" for kind in kinds for n in range(_count(kind)))]
