"""Where the blocks of a model lie, and which modules a cut gives to the model party.

A *stack* is a list of blocks that the model calls one after the other; a cut goes through every stack: one
for most models, two (encoder and decoder) for sequence-to-sequence ones. A *stage* is what the model party
runs for one stack: its middle blocks and, in HT, the modules after them.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vflair_core.absent import on_meta
from vflair_core.errors import PartitionError
from vflair_core.plugins import decide

if TYPE_CHECKING:
    import pluggy

    from vflair_core.partition import Partition


@frozen
class Stage:
    """What the model party runs in one exchange.

    Args:
        blocks: Names of the blocks in the order of their calls.
        rest: Names of the modules it holds after them (HT): norm, pooler, head.
    """

    blocks: tuple[str, ...]
    rest: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Everything in the order of the calls."""
        return self.blocks + self.rest

    def ends_with(self, called: tuple[str, ...]) -> bool:
        """Whether `called` is the whole stage, or the last of `rest` after what went before."""
        return called == self.names or bool(called and called == self.rest[-len(called) :])

    def allows(self, called: tuple[str, ...]) -> bool:
        """Whether `called` may be asked for at once: all blocks and what follows, or a piece of `rest`.

        The data party may need a value between two modules of `rest`, to pick the last token for example.
        """
        if called[: len(self.blocks)] == self.blocks:
            return called == self.names[: len(called)]
        starts = [n for n, name in enumerate(self.rest) if name == called[0]]
        return any(called == self.rest[n : n + len(called)] for n in starts)


@frozen
class Blocks:
    """A stack of blocks.

    Args:
        name: Dotted name of the list, e.g. ``"transformer.h"``.
        calls: Names of the blocks in the order of their calls; a shared block is named once for each call.
            Left out, each entry of the list is called once, in order.
    """

    name: str
    calls: tuple[str, ...] = ()

    def called(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the blocks in the order in which `model` calls them."""
        depth = len(model.get_submodule(self.name))  # type: ignore[arg-type]
        return self.calls or tuple(f"{self.name}.{n}" for n in range(depth))


def locate_blocks(
    model: nn.Module, plugins: pluggy.PluginManager | None = None
) -> tuple[Blocks, ...]:
    """Find the stacks that a cut goes through, in the order in which the model calls them.

    Raises:
        PartitionError: There is none, or more than one where one is expected; a plugin can say by
            `vflair_locate_blocks`.
    """
    found = _lists_of_blocks(model)
    wanted = 2 if _has_two_stacks(model) else 1
    chosen = _narrowed(model, found, wanted)
    if len(chosen) != wanted and plugins is not None:
        answer = decide(plugins, "vflair_locate_blocks", model=model)
        if answer is not None:
            return (answer,) if isinstance(answer, Blocks) else tuple(answer)
    if len(chosen) == wanted:
        return tuple(Blocks(name) for name in chosen)
    shared = _by_calls(model) if not found else ()
    if len(shared) == wanted:
        return shared
    raise PartitionError(
        f"Cannot tell where the blocks of {type(model).__name__} lie: found "
        f"{', '.join(found) or 'no list of blocks'}. A plugin can say so with the hook "
        "vflair_locate_blocks(model) -> Blocks('dotted.name')."
    )


def stages(model: nn.Module, stacks: Sequence[Blocks], partition: Partition) -> tuple[Stage, ...]:
    """Return the modules that go to the model party, in the order the model calls them.

    Raises:
        PartitionError: The cut leaves the legal range.
    """
    middles = [_middle(stack.called(model), partition) for stack in stacks]
    if partition.tail:
        return tuple(Stage(middle) for middle in middles)
    roots = _roots(stacks)
    units = _units(model, stacks)
    blocks = [name for stack in stacks for name in stack.called(model)]
    order = list(dict.fromkeys(_calls(model, [*units, *dict.fromkeys(blocks)])))
    found = []
    for n, middle in enumerate(middles):
        start = order.index(middle[0])
        end = order.index(middles[n + 1][0]) if n + 1 < len(middles) else len(order)
        own = (roots[n] + ".") if len(stacks) > 1 and n + 1 < len(stacks) else ""
        rest = [name for name in order[start:end] if name in units and name.startswith(own)]
        found.append(Stage(middle, tuple(rest)))
    return tuple(found)


def _middle(calls: tuple[str, ...], partition: Partition) -> tuple[str, ...]:
    depth = len(calls)
    if partition.head + partition.tail > depth - 1:
        raise PartitionError(
            f"Cannot give {partition.head} + {partition.tail} of {depth} blocks to the data party. "
            f"head + tail must lie between 0 and {depth - 1}; try Partition(head=1, tail=1)."
        )
    return calls[partition.head : depth - partition.tail]


def _has_two_stacks(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))


def _lists_of_blocks(model: nn.Module) -> list[str]:
    """Names of the outermost lists that hold nothing but blocks, towers of other senses aside."""
    no_split = set(getattr(model, "_no_split_modules", None) or ())

    def is_block(module: nn.Module) -> bool:
        return isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in no_split

    found: list[str] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(outer + ".") for outer in found)
        if (
            isinstance(module, nn.ModuleList)
            and len(module)
            and not nested
            and all(map(is_block, module))
            and not _sees_or_hears(model, name)
        ):
            found.append(name)
    return found


def _sees_or_hears(model: nn.Module, name: str) -> bool:
    """Whether the list belongs to a tower that takes pixels or sound instead of text."""
    *path, _ = name.split(".")
    towers = [model.get_submodule(".".join(path[: n + 1])) for n in range(len(path))]
    inputs = [getattr(tower, "main_input_name", "input_ids") for tower in towers]
    return any(word.startswith(("pixel", "input_f", "input_v", "audio")) for word in inputs)


def _narrowed(model: nn.Module, found: list[str], wanted: int) -> list[str]:
    """Of several lists, those under the model's own decoder (and encoder), and as deep as the config says."""
    if len(found) <= wanted:
        return found
    homes = [_name_of(model, "get_decoder")]
    if wanted == 2:
        homes.insert(0, _name_of(model, "get_encoder"))
    inside = [name for name in found if any(home and name.startswith(f"{home}.") for home in homes)]
    if len(inside) >= wanted:
        found = inside
    depth = getattr(_text_config(model), "num_hidden_layers", None)
    deep = [name for name in found if len(model.get_submodule(name)) == depth]  # type: ignore[arg-type]
    return deep if len(found) > wanted and len(deep) >= wanted else found


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config.get_text_config() if config is not None else None


def _name_of(model: nn.Module, question: str) -> str | None:
    """Dotted name of the part that `model.get_decoder()` or `get_encoder()` returns; None for none."""
    ask: Callable[[], Any] | None = getattr(model, question, None)
    part = ask() if ask else None
    return next((name for name, module in model.named_modules() if module is part and name), None)


def _by_calls(model: nn.Module) -> tuple[Blocks, ...]:
    """Lists whose entries are called `num_hidden_layers` times in all; blocks that share weights are few."""
    depth = getattr(_text_config(model), "num_hidden_layers", None)
    lists = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    outer = [n for n in lists if not any(n.startswith(other + ".") for other in lists)]
    entries = {f"{n}.{k}" for n in outer for k, _ in model.get_submodule(n).named_children()}
    if depth is None or not entries:
        return ()
    try:
        calls = [name for name in _calls(model, sorted(entries)) if name in entries]
    except PartitionError:
        return ()
    counts = Counter(name.rpartition(".")[0] for name in calls)
    return tuple(
        Blocks(name, tuple(call for call in calls if call.startswith(name + ".")))
        for name in outer
        if counts[name] == depth
    )


def _roots(stacks: Sequence[Blocks]) -> list[str]:
    """The part of the model that belongs to each stack alone: longest prefix no other stack has."""
    roots = []
    for stack in stacks:
        path = stack.name.split(".")
        others = [other.name + "." for other in stacks if other is not stack]
        prefixes = [".".join(path[: n + 1]) for n in range(len(path))]
        alone = [p for p in prefixes if not any(o.startswith(p + ".") for o in others)]
        roots.append(alone[0])
    return roots


def _units(model: nn.Module, stacks: Sequence[Blocks]) -> list[str]:
    """Largest modules with weights that are not around the blocks."""
    units = []

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            full = f"{prefix}{name}"
            if any(stack.name == full for stack in stacks):
                continue
            if any(stack.name.startswith(full + ".") for stack in stacks):
                walk(child, full + ".")
            elif any(True for _ in child.parameters()):
                units.append(full)

    walk(model, "")
    return units


def _calls(model: nn.Module, names: list[str]) -> list[str]:
    """Names in the order of their calls, found without data, or with a little if need be."""
    given: dict[str, Any] = model.dummy_inputs  # type: ignore[assignment]
    inputs = {key: value[:1, :4] for key, value in given.items() if torch.is_tensor(value)}
    if _has_two_stacks(model):
        inputs.setdefault("decoder_input_ids", inputs["input_ids"])
    shadow = on_meta(model).eval()
    try:
        return _trace(shadow, names, {key: value.to("meta") for key, value in inputs.items()})
    except Exception:  # noqa: BLE001 - any operation may lack a meta kernel; the real model has them all
        # The weights are shared, not copied; what the run may set on its modules stays with the twin.
        twin = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
        device = next(model.parameters()).device
        texts = {key: _plain(model, value.to(device)) for key, value in inputs.items()}
        try:
            return _trace(twin.eval(), names, texts)
        except Exception as error:
            raise PartitionError(
                f"{type(model).__name__} cannot be run on text alone, so the order of its modules is not known: "
                f"{type(error).__name__}: {error}. Use a partition with tail >= 1, which needs no such run."
            ) from error


def _plain(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Words of one sort with an end of text: some classifiers look for it."""
    end = getattr(_text_config(model), "eos_token_id", None)
    words = torch.ones_like(ids)
    if end is not None:
        words[:, -1] = end[0] if isinstance(end, (list, tuple)) else end
    return words


def _trace(model: nn.Module, names: list[str], inputs: dict[str, torch.Tensor]) -> list[str]:
    order: list[str] = []
    modules = {name: model.get_submodule(name) for name in names}

    def noting(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def noted(*args: Any, **kwargs: Any) -> Any:
            order.append(name)
            return forward(*args, **kwargs)

        return noted

    # Not by hooks: some models call `forward` itself.
    for name, module in modules.items():
        module.forward = noting(name, module.forward)
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for module in modules.values():
            del module.forward
    return order
