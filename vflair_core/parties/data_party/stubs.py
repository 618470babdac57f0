"""What stands where the model party's modules were: their attributes, none of their weights."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from vflair_core.communication.cache_kinds import layers_of
from vflair_core.communication.program import ALLOWED
from vflair_core.errors import LeakError, PartitionError
from vflair_core.partition.module_tree import on_meta, replace_module

# What may be set on a stand-in: its own facts, and what only concerns the party where the block is run.
_OWN = frozenset(
    {"name", "layers", "parameter_names", "accepted", "training", "gradient_checkpointing"}
)

# Arguments that transformers threads through every block and that no block computes with.
DROPPED = frozenset(
    [
        "input_ids",
        "decoder_input_ids",
        "labels",
        "shift_labels",
        "num_items_in_batch",
        "logits_to_keep",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "output_router_logits",
    ]
)

Record = Callable[["ModuleStub", tuple[Any, ...], dict[str, Any]], Any]  # a recorder's `call`


class ModuleStub(nn.Module):
    """Stands where the model party's module `name` was. It has its attributes, none of its weights."""

    def __init__(self, name: str, module: nn.Module, record: Record) -> None:
        super().__init__()
        # Past nn.Module's bookkeeping: the skeleton is no submodule.
        object.__setattr__(self, "skeleton", on_meta(module))
        object.__setattr__(self, "record", record)
        self.name = name
        self.layers = layers_of(module)
        signature = inspect.signature(module.forward)
        self.parameter_names = [
            p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        self.accepted = ALLOWED.union(self.parameter_names)
        self.training = module.training

    def __getattr__(self, name: str) -> Any:
        if name in ("skeleton", "record", "name") or name.startswith("__"):
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

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        if theirs := [key for key in state if key.startswith(prefix)]:
            raise PartitionError(
                f"These weights are of the whole model: {theirs[0]} is the model party's, and would be lost here. An adapter "
                "of the whole model is loaded into both halves by load_adapter(data_party, model_party, folder); a "
                "checkpoint, by load_data_party and load_model_party."
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.record(self, args, kwargs)  # type: ignore[no-any-return]


def named_arguments(
    absent: ModuleStub, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call of an absent module by their names, without those that no block computes with.

    Raises:
        LeakError: One is not known to be something that blocks take.
    """
    named = dict(zip(absent.parameter_names, args, strict=False))
    named.update(_checked(absent, kwargs))
    return named


def _checked(absent: ModuleStub, kwargs: dict[str, Any]) -> dict[str, Any]:
    if absent.accepted.issuperset(kwargs):
        return kwargs
    accepted = {}
    for key, value in kwargs.items():
        if key in absent.accepted:
            accepted[key] = value
        elif (
            key not in DROPPED
            and value is not None
            and not isinstance(value, PreTrainedTokenizerBase)
        ):
            raise LeakError(
                f"{absent.name} was called with {key!r}, which is not an argument a block is known to take. "
                f"It stays with the data party. Known: {', '.join(sorted(ALLOWED))} and the block's own "
                f"{', '.join(absent.parameter_names)}."
            )
    return accepted


def put_stubs(
    model: nn.Module,
    absent: Mapping[str, nn.Module],
    local: Mapping[str, tuple[bool, ...]],
    record: Record,
    calls: Counter[str],
) -> dict[str, ModuleStub]:
    """Put stubs where the modules `absent` are or were, and return them by name.

    Args:
        model: Keeps all other modules.
        absent: The modules by name; only their structure is used.
        local: Blocks that both parties need: for each call, whether it is made here.
        record: What a stub calls in its forward.
        calls: Counts the calls of blocks that both parties need.
    """
    stubs = {name: ModuleStub(name, module, record) for name, module in absent.items()}
    for name, stub in stubs.items():
        if name in local:
            call_here_and_there(model.get_submodule(name), stub, calls, local[name])
        else:
            replace_module(model, name, stub)
    return stubs


def call_here_and_there(
    module: nn.Module, stub: ModuleStub, calls: Counter[str], here: tuple[bool, ...]
) -> None:
    """Let call number n of `module` run here if ``here[n]``, else be recorded: for blocks that share weights.

    `calls` counts the calls since the model was last called.
    """
    original = type(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        number = calls[stub.name]
        calls[stub.name] += 1
        if here[number]:
            return original.forward(self, *args, **kwargs)
        stub.training = self.training
        return stub(*args, **kwargs)

    module.__class__ = type(original.__name__, (original,), {"forward": forward})
