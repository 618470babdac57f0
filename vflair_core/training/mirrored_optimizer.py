"""The data party's optimizer, described so that the model party builds the same over its own weights.

The options of each group are known; which of the model party's weights belong to which group is not. One of these
rules says it, the first that puts the data party's own weights where they are:

- the function that the user gave, from a weight's name to the number of its group;
- only one group holds weights of the model, and the others what lies beside it: all are its;
- the rule of transformers' `Trainer`: norms and biases are not decayed;
- what a weight is, wherever its block: ``layers.0.mlp.up_proj.weight`` and ``layers.7.mlp.up_proj.weight`` are alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from vflair_core.communication.optimizers import OPTIMIZERS, names_by_decay, options_of
from vflair_core.errors import ProtocolError

if TYPE_CHECKING:
    from vflair_core.parties.data_party.party import DataParty

GroupOf = Callable[[str], int]


def mirrored(
    optimizer: Optimizer, party: DataParty, theirs: Sequence[str], group_of: GroupOf | None = None
) -> dict[str, Any]:
    """Describe `optimizer` as the model party should build it (`make_optimizer`).

    Args:
        optimizer: The data party's, over its own weights.
        party: The data party.
        theirs: Names of what the model party trains.
        group_of: From the name that a weight has in the whole model to the number of its group.

    Raises:
        ProtocolError: The model party cannot build this optimizer, or no rule says which group a weight belongs to.
    """
    names = {kind: name for name, kind in OPTIMIZERS.items()}
    if type(optimizer) not in names:
        raise ProtocolError(
            f"The model party cannot build a {type(optimizer).__name__}; it knows {', '.join(OPTIMIZERS)}. Use "
            "e.g. TrainingArguments(optim='adamw_torch')."
        )
    name, options = names[type(optimizer)], options_of(optimizer)
    held = {id(weight): key for key, weight in party.named_parameters()}
    ours = [
        [held[id(w)] for w in group["params"] if id(w) in held] for group in optimizer.param_groups
    ]
    _check_all_held(party, ours)
    if group_of is not None:
        _check_rule(group_of, ours)
    elif len(ours) == 1:
        return {"name": name, **options[0]}
    elif (only := _only_group(optimizer, ours)) is not None:
        group_of = dict.fromkeys(theirs, only).__getitem__
    elif list(map(sorted, ours)) == list(map(sorted, names_by_decay(party.model))):
        return {"name": name, "groups": options, "exempt": True}
    else:
        group_of = _by_kind(ours, theirs)
    weights: list[list[str]] = [[] for _ in options]
    for key in theirs:
        weights[_number(group_of, key, len(ours))].append(key)
    return {
        "name": name,
        "groups": [{"weights": own, **group} for own, group in zip(weights, options, strict=True)],
    }


def _only_group(optimizer: Optimizer, ours: Sequence[Sequence[str]]) -> int | None:
    """The group that holds weights of the model, where all others hold weights beside it."""
    filled = [number for number, own in enumerate(ours) if own]
    beside = all(group["params"] for group in optimizer.param_groups)
    return filled[0] if len(filled) == 1 and beside else None


def _check_all_held(party: DataParty, ours: Sequence[Sequence[str]]) -> None:
    held = {name for own in ours for name in own}
    trained = [name for name, weight in party.named_parameters() if weight.requires_grad]
    if left := [name for name in trained if name not in held]:
        raise ProtocolError(
            f"The optimizer leaves out {len(left)} weights that can be trained, {left[0]} among them, and which of the model party's "
            "it would leave out cannot be told. Freeze them at both parties: tune(data_party, [...]), tune(model_party, [...]) "
            "or weight.requires_grad_(False)."
        )


def _check_rule(group_of: GroupOf, ours: Sequence[Sequence[str]]) -> None:
    for number, own in enumerate(ours):
        for name in own:
            if (said := _number(group_of, name, len(ours))) != number:
                raise ProtocolError(
                    f"group_of({name!r}) is {said}, and the optimizer has this weight in group {number}: its rule would "
                    "put the model party's weights elsewhere too. Make both agree."
                )


def _number(group_of: GroupOf, name: str, count: int) -> int:
    number = group_of(name)
    if not isinstance(number, int) or not 0 <= number < count:
        raise ProtocolError(
            f"group_of({name!r}) is {number!r}; the groups of the optimizer are 0 to {count - 1}."
        )
    return int(number)


def _by_kind(ours: Sequence[Sequence[str]], theirs: Sequence[str]) -> GroupOf:
    """The group of a weight is that of the weights of other blocks that are the same in theirs."""
    group_of_kind: dict[str, int] = {}
    for number, own in enumerate(ours):
        for name in own:
            if group_of_kind.setdefault(_kind(name), number) != number:
                raise _unknown(name, "weights like it in other blocks are in another group")
    for name in theirs:
        if _kind(name) not in group_of_kind:
            raise _unknown(name, "the data party holds none like it")
    return lambda name: group_of_kind[_kind(name)]


def _kind(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _unknown(name: str, why: str) -> ProtocolError:
    return ProtocolError(
        f"The optimizer has several groups, and which one {name} of the model party's weights would belong to cannot be "
        f"told: {why}. Say it: SplitCallback(data_party, group_of=lambda name: ...), from the name of a weight of the "
        "whole model to the number of its group."
    )
