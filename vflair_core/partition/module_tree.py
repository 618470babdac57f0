"""Making room in a model that is about to be loaded: what the other party holds is put out of its tree."""

from __future__ import annotations

from typing import Any

from torch import nn


def vacate(model: nn.Module, keep: set[str]) -> None:
    """Put empty modules where there is nothing to keep. What modules on the way own themselves stays."""
    ancestors = {name[:n] for name in keep for n in range(len(name)) if name[n] == "."}

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            full = f"{prefix}{name}"
            if full in keep:
                continue
            if full in ancestors:
                walk(child, full + ".")
            elif any(True for _ in child.parameters()):
                setattr(module, name, Vacant(child))

    walk(model, "")


class Vacant(nn.Module):
    """Owns nothing. Who asks for an attribute, as a model's own initialisation may, gets one without memory."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "before", module)  # on the meta device, and no submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "before"), name)


def outside(model: nn.Module, absent: tuple[str, ...]) -> set[str]:
    """The largest modules around `absent` that hold none of it."""
    ancestors = {name[:n] for name in absent for n in range(len(name)) if name[n] == "."}
    found = set()

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            full = f"{prefix}{name}"
            if full in ancestors:
                walk(child, full + ".")
            elif full not in absent:
                found.add(full)

    walk(model, "")
    return found
