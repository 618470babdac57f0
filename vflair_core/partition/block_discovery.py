"""Finding the stacks of blocks in any model: by what its lists hold, by how they are called, or by a small table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vflair_core.errors import PartitionError
from vflair_core.partition.partition import Blocks
from vflair_core.partition.tracing import has_two_stacks, text_config, trace
from vflair_core.plugins import decide

if TYPE_CHECKING:
    import pluggy

# Model types with several lists of blocks, and the one that a cut goes through: it ends with this name.
ROWS: dict[str, str] = {
    "blt": "global_transformer.layers",  # the others read and write bytes
    "funnel": "encoder.blocks.0",  # at full length, before the states are pooled
    "lxmert": "encoder.layer",  # language alone, before it meets the picture
}


def locate_blocks(
    model: nn.Module, plugins: pluggy.PluginManager | None = None
) -> tuple[Blocks, ...]:
    """Find the stacks that a cut goes through, in the order in which the model calls them.

    Raises:
        PartitionError: There is none, or more than one where one is expected; a plugin can say by
            `vflair_locate_blocks`.
    """
    if known := _known(model):
        return known
    lists = _lists_of_blocks(model) or _lists_of_blocks(model, _name_of(model, "get_decoder"))
    wanted = 2 if has_two_stacks(model) else 1
    chosen = _narrowed(model, lists, wanted)
    if wanted == 2 and len(chosen) == 1 and _encoder_sees(model):
        wanted = 1
    if len(chosen) != wanted and plugins is not None:
        answer = decide(plugins, "vflair_locate_blocks", model=model)
        if answer is not None:
            return (answer,) if isinstance(answer, Blocks) else tuple(answer)
    if len(chosen) == wanted:
        return tuple(Blocks(name) for name in chosen)
    shared = _by_calls(model) if not lists else ()
    if len(shared) == wanted:
        return shared
    raise PartitionError(
        f"Cannot tell where the blocks of {type(model).__name__} lie: found "
        f"{', '.join(lists) or 'no list of blocks'}. A plugin can say so with the hook "
        "vflair_locate_blocks(model) -> Blocks('dotted.name')."
    )


def _known(model: nn.Module) -> tuple[Blocks, ...]:
    """The stack that the table has for this type of model."""
    row = ROWS.get(getattr(getattr(model, "config", None), "model_type", ""))
    names = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    return tuple(Blocks(name) for name in names if row and f".{name}".endswith(f".{row}"))


def _lists_of_blocks(model: nn.Module, under: str | None = None) -> list[str]:
    """Names of the outermost lists that hold nothing but blocks: all `under` a part, or none of other senses' towers."""
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
            and (name.startswith(f"{under}.") if under else not _sees_or_hears(model, name))
        ):
            found.append(name)
    return found


def _sees_or_hears(model: nn.Module, name: str) -> bool:
    """Whether the list belongs to a tower that takes pixels or sound instead of text."""
    *path, _ = name.split(".")
    towers = [model.get_submodule(".".join(path[: n + 1])) for n in range(len(path))]
    inputs = [getattr(tower, "main_input_name", "input_ids") for tower in towers]
    return any(word.startswith(("pixel", "input_f", "input_v", "audio")) for word in inputs)


def _encoder_sees(model: nn.Module) -> bool:
    """Whether the stack that would be the first reads no text: the cut goes through the second alone."""
    encoder = _name_of(model, "get_encoder")
    return encoder is not None and _sees_or_hears(model, f"{encoder}.blocks")


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
    depth = getattr(text_config(model), "num_hidden_layers", None)
    deep = [name for name in found if len(model.get_submodule(name)) == depth]  # type: ignore[arg-type]
    return deep if len(found) > wanted and len(deep) >= wanted else found


def _name_of(model: nn.Module, question: str) -> str | None:
    """Dotted name of the part that `model.get_decoder()` or `get_encoder()` returns; None for none."""
    ask: Callable[[], Any] | None = getattr(model, question, None)
    part = ask() if ask else None
    return next((name for name, module in model.named_modules() if module is part and name), None)


def _by_calls(model: nn.Module) -> tuple[Blocks, ...]:
    """Lists whose entries are called `num_hidden_layers` times in all.

    One list whose blocks share weights has few entries. Several lists next to each other whose entries of equal number
    are called in turn are one stack: each block is the entries of one number.
    """
    depth = getattr(text_config(model), "num_hidden_layers", None)
    lists = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    outer = [n for n in lists if not any(n.startswith(other + ".") for other in lists)]
    entries = {f"{n}.{k}" for n in outer for k, _ in model.get_submodule(n).named_children()}
    if not entries or (depth is None and len(outer) > 1):
        return ()
    try:
        calls = trace(model, sorted(entries)).calls
    except PartitionError:
        return ()
    counts = Counter(map(_list_of, calls))
    deep = [name for name in outer if counts[name] and counts[name] == (depth or counts[name])]
    if len(deep) > 1 and (together := _called_in_turn(deep, calls)):
        return (together,)
    return tuple(
        Blocks(name, tuple(call for call in calls if _list_of(call) == name)) for name in deep
    )


def _called_in_turn(lists: Sequence[str], calls: Sequence[str]) -> Blocks | None:
    """One stack of `lists` whose entries of equal number are called together; None if they are not."""
    ours = [call for call in calls if _list_of(call) in lists]
    size = len(lists)
    blocks = [tuple(ours[n : n + size]) for n in range(0, len(ours), size)]
    first = [_list_of(call) for call in blocks[0]]
    alike = all(
        [_list_of(call) for call in block] == first
        and len({call.rpartition(".")[2] for call in block}) == 1
        for block in blocks
    )
    together = alike and len({name.rpartition(".")[0] for name in lists}) == 1
    return Blocks(first[0], tuple(blocks)) if together and len(set(first)) == size else None


def _list_of(entry: str) -> str:
    return entry.rpartition(".")[0]
