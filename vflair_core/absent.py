"""Stand-ins for the modules a data party does not hold: their attributes, none of their weights."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from vflair_core.recorder import Recorder


class Absent(nn.Module):
    """Stands where the model party's module `name` was. It has its attributes, none of its weights."""

    def __init__(self, name: str, module: nn.Module, recorder: Recorder) -> None:
        super().__init__()
        # Past nn.Module's bookkeeping: neither the skeleton nor the recorder is a submodule.
        object.__setattr__(self, "skeleton", on_meta(module))
        object.__setattr__(self, "recorder", recorder)
        self.name = name
        self.layers = frozenset(
            index
            for part in module.modules()
            if isinstance(index := getattr(part, "layer_idx", None), int)
        )
        signature = inspect.signature(module.forward)
        self.parameter_names = [
            p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        self.training = module.training

    def __getattr__(self, name: str) -> Any:
        if name in ("skeleton", "recorder", "name") or name.startswith("__"):
            raise AttributeError(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.skeleton, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.recorder.call(self, args, kwargs)


def on_meta(module: nn.Module) -> nn.Module:
    """Copy a module without its data: same structure and attributes, weights on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    twin = copy.deepcopy(module, memo).requires_grad_(False)
    for part in twin.modules():
        # Experts by grouped matrix products need bfloat16 on the meta device; batched ones have its shapes.
        if getattr(getattr(part, "config", None), "_experts_implementation", None) == "grouped_mm":
            part.config._experts_implementation = "batched_mm"  # type: ignore[union-attr]
    return twin
