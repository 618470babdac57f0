"""What a model party runs, whatever a message asks for: the modules of each stage, in their order."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from vflair_core.communication.cache_kinds import layers_of
from vflair_core.communication.program import ALLOWED, MIXING, Program, Step, sources
from vflair_core.errors import ProtocolError, shown
from vflair_core.parties.model_party.costs import Meter
from vflair_core.partition.stages import Stage

OPERATIONS_PER_CALL = 64  # between the calls of modules; the models of transformers have a few


class HeldStage:
    """The held modules of `model` that make up one stage."""

    def __init__(self, model: nn.Module, stage: Stage) -> None:
        self.stage = stage
        self.model = model
        modules = {name: model.get_submodule(name) for name in stage.names}
        self._arguments = {
            name: tuple(inspect.signature(module.forward).parameters)
            for name, module in modules.items()
        }
        self._paths = {name: name.split(".") for name in modules}
        self.layers = sorted(frozenset().union(*map(layers_of, modules.values())))

    def call(
        self, name: str, args: list[Any], kwargs: dict[str, Any], meter: Meter | None = None
    ) -> Any:
        """Call the module that goes by `name` now, if `meter` allows: adapters may have taken the place of the first one.

        The first argument goes by position: an adapter gives it another name, and reentrant checkpointing
        sees no gradient in a named one.
        """
        first = self._arguments[name][0]
        if first in kwargs:
            args = [*args, kwargs.pop(first)]
        module = self.model
        for part in self._paths[name]:  # as `get_submodule`, which takes longer than some blocks
            module = module._modules[part]  # type: ignore[assignment]
        if meter is not None:
            beside = [*args[1:], *kwargs.values()]
            meter.before(args[0] if args else None, beside, getattr(module, "out_features", 0))
        return module(*args, **kwargs)

    def check(self, program: Program) -> None:
        """See that each module is called as often as it should be, in order, fed by the one before it.

        Raises:
            ProtocolError: The program asks for anything else.
        """
        if not self.stage.allows(program.modules):
            raise _no_stage(program, [self])
        if program.store and self.stage.rest:
            raise ProtocolError(
                "What blocks share is sent back only to blocks of the data party that follow; in HT there are none."
            )
        calls = len(program.modules)
        if len(program.steps) - calls > OPERATIONS_PER_CALL * (calls + 1):
            raise ProtocolError(
                f"{len(program.steps) - calls} operations came for {calls} calls of modules; "
                f"{OPERATIONS_PER_CALL} beside each are allowed."
            )
        reached: list[int] = []  # of each step, how many blocks what it gives has been through
        blocks = 0  # that were called so far, each on what the one before it gave
        for number, step in enumerate(program.steps):
            self._check_step(step)
            used = sources(step)
            if any(source >= number for source in used):
                raise ProtocolError(
                    f"Step {number} ({step[1]}) uses an output that does not exist yet."
                )
            if number and not used:
                raise ProtocolError(
                    f"Step {number} ({step[1]}) does not use the output of a step before."
                )
            behind = max((reached[source] for source in used), default=0)
            if step[0] == "module" and step[1] in self.stage.blocks:
                if behind != blocks:
                    raise ProtocolError(
                        f"Step {number} ({step[1]}) does not use the output of the block before."
                    )
                blocks = behind = blocks + 1
            reached.append(behind)

    def _check_step(self, step: Step) -> None:
        """An operation takes one value and numbers, so that nothing it gives is larger; a call, known names.

        Between the parts of a block, a second value may be added or multiplied; that it fits is seen when it is run.
        """
        kind, name, args, kwargs = step
        if kind == "module":
            known = ALLOWED.union(self._arguments[name])
            if "cache" in self._arguments[name]:
                known -= {"past_key_values"}  # the old name of the same argument
            unknown = [key for key, _ in kwargs if key not in known]
            if unknown or args:
                raise ProtocolError(
                    f"{name} is called by name, and with nothing like {shown(unknown)}."
                )
            return
        others = [*args[1:], *(tree for key, tree in kwargs if (key, tree) not in _SPELT_OUT)]
        if name == "getitem" and len(args) == 2 and args[1][0] == "tuple":
            others = [tree for tree in args[1][1:] if tree[0] not in ("leaf", "tuple")]
            if any(tree[0] == "tuple" for tree in args[1][1:]):
                raise ProtocolError("An index is flat: it holds no tuple.")
        if name in MIXING and len(args) == 2 and args[1][0] in ("out", "leaf"):
            others = others[1:]
        if not args or args[0][0] not in ("out", "leaf") or not all(map(_is_number, others)):
            raise ProtocolError(f"Operation {name!r} takes one tensor, then numbers.")


_SPELT_OUT = [("approximate", ("value", name)) for name in ("none", "tanh")]  # of gelu


def matching(program: Program, held: Sequence[HeldStage]) -> HeldStage:
    """Return the stage that `program` calls.

    Raises:
        ProtocolError: It calls none of them.
    """
    for stage in held:
        if program.modules and stage.stage.allows(program.modules):
            return stage
    raise _no_stage(program, held)


def _no_stage(program: Program, held: Sequence[HeldStage]) -> ProtocolError:
    stages = [one.stage.names for one in held]
    possible = " or ".join(f"{names[0]} … {names[-1]}" for names in stages)
    called = [*program.modules[:4], *(["…"] if len(program.modules) > 4 else [])]
    return ProtocolError(
        f"A program must call {possible}, all in order. This one calls {', '.join(called)}."
    )


def _is_number(tree: Any) -> bool:
    if tree[0] == "tuple":
        return all(map(_is_number, tree[1:]))
    return tree[0] in ("dtype", "slice", "ellipsis") or (
        tree[0] == "value" and not isinstance(tree[1], str)
    )
