"""Stand-ins for the modules a data party does not hold: their attributes, none of their weights."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from vflair_core.communication.cache_kinds import layers_of
from vflair_core.errors import PartitionError

if TYPE_CHECKING:
    from vflair_core.parties.data_party.recorder import Recorder
from vflair_core.partition.module_tree import on_meta

# What may be set on a stand-in: its own facts, and what only concerns the party where the block is run.
_OWN = frozenset({"name", "layers", "parameter_names", "training", "gradient_checkpointing"})


class ModuleStub(nn.Module):
    """Stands where the model party's module `name` was. It has its attributes, none of its weights."""

    def __init__(self, name: str, module: nn.Module, recorder: Recorder) -> None:
        super().__init__()
        # Past nn.Module's bookkeeping: neither the skeleton nor the recorder is a submodule.
        object.__setattr__(self, "skeleton", on_meta(module))
        object.__setattr__(self, "recorder", recorder)
        self.name = name
        self.layers = layers_of(module)
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
            value = getattr(self.skeleton, name)
        if inspect.ismethod(value):
            raise PartitionError(
                f"The model calls {name}() of {self.name}, which the model party holds: what that changes would "
                "not reach it. Set it before the model is cut, by its config."
            )
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in _OWN:
            raise PartitionError(
                f"The model sets {name!r} of {self.name}, which the model party holds: it would not reach it. "
                "Set it before the model is cut, by its config."
            )
        super().__setattr__(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.recorder.call(self, args, kwargs)


def call_here_and_there(module: nn.Module, absent: ModuleStub, here: tuple[bool, ...]) -> None:
    """Let call number n of `module` run here if ``here[n]``, else be recorded: for blocks that share weights."""
    original = type(module)
    recorder = absent.recorder

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        number = recorder.calls[absent.name]
        recorder.calls[absent.name] += 1
        if here[number]:
            return original.forward(self, *args, **kwargs)
        absent.training = self.training
        return absent(*args, **kwargs)

    module.__class__ = type(original.__name__, (original,), {"forward": forward})
