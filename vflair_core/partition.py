"""Where a model is cut, and the cut itself.

HT (head | tail): the data party holds the embeddings and the first `head` blocks; the model party holds
everything after them and returns logits. HBT (head | body | tail): the model party holds only middle
blocks; the last `tail` blocks, the final norm and the task head stay with the data party.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import field, frozen
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vflair_core.absent import on_meta
from vflair_core.assembly import assemble, open_channel
from vflair_core.data_party import DataParty
from vflair_core.errors import PartitionError
from vflair_core.fingerprint import fingerprint, sample_digest
from vflair_core.model_party import ModelParty
from vflair_core.plugins import decide, observe
from vflair_core.wrapping import refuse_wrapped

if TYPE_CHECKING:
    import pluggy
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from vflair_core.defense import Defense


def _not_negative(_instance: object, attribute: Any, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise PartitionError(
            f"{attribute.name} must be a whole number of blocks >= 0, not {value!r}; "
            "try Partition(head=2, tail=2)."
        )


@frozen
class Partition:
    """How many blocks the data party keeps at either end.

    Args:
        head: Blocks after the embeddings.
        tail: Blocks before the final norm; 0 gives norm and task head to the model party (HT).
        disclose: Names of tensors that depend on the text and may cross all the same, although they are
            not hidden states. Everything of that sort is refused unless named here, and the name is recorded.
    """

    head: int = field(default=2, validator=_not_negative)
    tail: int = field(default=2, validator=_not_negative)
    disclose: tuple[str, ...] = field(default=(), converter=tuple)

    @property
    def kind(self) -> Literal["HT", "HBT"]:
        """HT when the model party holds the end of the model, HBT when it holds only the middle."""
        return "HBT" if self.tail else "HT"


@frozen
class Blocks:
    """The list of blocks of a model: its dotted name, e.g. ``"transformer.h"``."""

    name: str


def split(
    model: PreTrainedModel,
    partition: Partition | None = None,
    *,
    defenses: Sequence[Defense] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    channel: str = "local:",
    wire: bool = False,
    devices: Sequence[str] = (),
    seed: int | None = None,
    plugins: pluggy.PluginManager | None = None,
) -> tuple[DataParty, ModelParty]:
    """Cut `model` in two. Its weights move into the parties: do not use it afterwards.

    Args:
        model: Any transformers model with a list of blocks.
        partition: The cut; by default two blocks at either end.
        defenses: Applied in this order on the way out, in reverse on the way back.
        tokenizer: Needed for `DataParty.encode` and `ask` only.
        channel: Where messages go: ``"local:"``, or a URL that a plugin opens.
        wire: Pass every message through the codec, as a remote channel would.
        devices: Where the model party computes; with more than one, a plugin places it.
        seed: Seed of the defenses' noise; None draws it from the operating system.
        plugins: Asked for the blocks of a model whose blocks cannot be found.

    Raises:
        PartitionError: The blocks cannot be found, or the cut leaves the legal range.
    """
    partition = partition or Partition()
    refuse_wrapped(model)
    blocks = locate_blocks(model, plugins)
    names = absent_names(model, blocks, partition)
    order = tuple(name for name, _ in model.named_parameters())
    agreed = fingerprint(
        type(model).__name__, model.config, partition, sample_digest(model), dtype=model.dtype
    )
    held, untied = _take(model, names)
    model_party = ModelParty(held, names, agreed)
    _place(model_party, devices, plugins)
    data_party = assemble(
        model,
        partition,
        open_channel(channel, plugins, wire=wire, handle=model_party.handle),
        {name: held.get_submodule(name) for name in names},
        agreed,
        order=order,
        untied=untied,
        defenses=defenses,
        tokenizer=tokenizer,
        seed=seed,
    )
    observe(
        plugins,
        "vflair_model_partitioned",
        partition=partition,
        data_party_weights=sum(p.numel() for p in data_party.parameters()),
        model_party_weights=sum(p.numel() for p in model_party.parameters()),
    )
    return data_party, model_party


def _place(
    model_party: ModelParty, devices: Sequence[str], plugins: pluggy.PluginManager | None
) -> None:
    if len(devices) == 1:
        model_party.model.to(devices[0])
    if len(devices) > 1:
        facts = {"model_party": model_party.model, "devices": list(devices)}
        if not (plugins and decide(plugins, "vflair_place", **facts)):
            raise PartitionError(
                f"No plugin places the model party on {', '.join(devices)}. Give one device, or install a "
                "plugin that answers vflair_place(model_party, devices)."
            )


def locate_blocks(model: nn.Module, plugins: pluggy.PluginManager | None = None) -> Blocks:
    """Find the list of blocks that a cut goes through.

    Raises:
        PartitionError: There is none, or more than one; a plugin can say by `vflair_locate_blocks`.
    """
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
        ):
            found.append(name)
    if len(found) != 1 and plugins is not None:
        answer = decide(plugins, "vflair_locate_blocks", model=model)
        if answer is not None:
            return answer  # type: ignore[no-any-return]
    if len(found) != 1:
        raise PartitionError(
            f"Cannot tell where the blocks of {type(model).__name__} lie: found "
            f"{', '.join(found) or 'no list of blocks'}. A plugin can say so with the hook "
            "vflair_locate_blocks(model) -> Blocks('dotted.name')."
        )
    return Blocks(found[0])


def absent_names(model: nn.Module, blocks: Blocks, partition: Partition) -> tuple[str, ...]:
    """Return the names of the modules that go to the model party, in the order the model calls them."""
    depth = len(model.get_submodule(blocks.name))  # type: ignore[arg-type]
    if partition.head + partition.tail > depth - 1:
        raise PartitionError(
            f"Cannot give {partition.head} + {partition.tail} of {depth} blocks to the data party. "
            f"head + tail must lie between 0 and {depth - 1}; try Partition(head=1, tail=1)."
        )
    middle = [f"{blocks.name}.{n}" for n in range(partition.head, depth - partition.tail)]
    if partition.tail:
        return tuple(middle)
    order = _calls(model, _units(model, blocks))
    start = order.index(middle[0])
    return tuple(order[start:])


def _units(model: nn.Module, blocks: Blocks) -> list[str]:
    """Largest modules with weights that are not around the blocks; each block is one."""
    units = []

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            full = f"{prefix}{name}"
            if blocks.name == full or blocks.name.startswith(full + "."):
                walk(child, full + ".")
            elif any(True for _ in child.parameters()):
                units.append(full)

    walk(model, "")
    return units


def _calls(model: nn.Module, units: list[str]) -> list[str]:
    """Names of `units` in the order of their first call, found without data, or with a little if need be."""
    inputs = {key: value[:1, :4] for key, value in model.dummy_inputs.items()}  # type: ignore[union-attr,operator]
    shadow = on_meta(model).eval()
    try:
        return _trace(shadow, units, {key: value.to("meta") for key, value in inputs.items()})
    except Exception:  # noqa: BLE001 - any operation may lack a meta kernel; the real model has them all
        device = next(model.parameters()).device
        training = {module: module.training for module in model.modules()}
        try:
            ones = {key: torch.ones_like(value, device=device) for key, value in inputs.items()}
            return _trace(model.eval(), units, ones)
        finally:
            for module, flag in training.items():
                module.training = flag


def _trace(model: nn.Module, units: list[str], inputs: dict[str, torch.Tensor]) -> list[str]:
    order: dict[str, None] = {}

    def note(name: str) -> Any:
        return lambda *_: order.setdefault(name)

    hooks = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in units]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return list(order)


def _take(model: nn.Module, names: tuple[str, ...]) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a tree with the modules `names` under their own names, and the weights that had to be untied.

    A weight that both sides use gets a copy at the model party: no weight has two owners.
    """
    inside = {id(p) for name in names for p in model.get_submodule(name).parameters()}
    prefixes = tuple(name + "." for name in names)
    outside = {
        id(p)
        for name, p in model.named_parameters(remove_duplicate=False)
        if not name.startswith(prefixes)
    }
    shared = inside & outside
    held, untied = nn.Module(), []
    held.training = model.training  # what `ModelParty` compares a request with
    for name in names:
        module = model.get_submodule(name)
        for key, parameter in list(module.named_parameters(remove_duplicate=False)):
            if id(parameter) in shared:
                parent, _, leaf = key.rpartition(".")
                setattr(module.get_submodule(parent), leaf, copy.deepcopy(parameter))
                untied.append(f"{name}.{key}")
        _plant(held, name, module)
    return held, tuple(untied)


def _plant(tree: nn.Module, name: str, module: nn.Module) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if part not in tree._modules:
            tree.add_module(part, nn.Module())
        tree = tree._modules[part]  # type: ignore[assignment]
    tree.add_module(leaf, module)
