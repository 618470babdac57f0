"""What is trained: whole slices, or adapters in them; each party decides it for the weights it holds.

    tune(data_party, ["head", "tail"], adapters=Lora(r=8))
    tune(model_party, ["body"])

An adapter starts from a random stream of its own, seeded by the name of its module in the whole model. So it
starts equal in a whole model and in its halves, in whatever order they are made.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from attrs import field, frozen, validators
from torch import nn
from transformers.pytorch_utils import Conv1D

from vflair_core.errors import ExperimentError, alternatives
from vflair_core.partition.adapters import check_peft, inject_adapter
from vflair_core.partition.slices import Slices, check_names

if TYPE_CHECKING:
    from peft import PeftConfig


EVERYTHING = ("data_party", "model_party")


def _names_of_slices(_instance: object, _attribute: Any, value: Sequence[str]) -> None:
    check_names(value)


@frozen
class Lora:
    """Low-rank adapters: `r` columns beside each chosen linear layer, whose own weights stay as they are.

    Attributes:
        r: Rank of the adapters; 0 trains the weights themselves.
        alpha: The adapter's output is scaled by alpha / r.
        dropout: Probability of dropping an input of an adapter.
        target_modules: Names of layers, or ends of names; empty takes every linear layer inside the blocks.
        full: Slices whose weights are trained themselves, beside the adapters, e.g. a new task_head.
    """

    r: int = field(default=0, validator=validators.ge(0))
    alpha: float = field(default=16.0, validator=validators.gt(0))
    dropout: float = field(default=0.0, validator=[validators.ge(0), validators.lt(1)])
    target_modules: tuple[str, ...] = field(default=(), converter=tuple)
    full: tuple[str, ...] = field(default=(), converter=tuple, validator=_names_of_slices)

    def config(self) -> PeftConfig | None:
        """Return the same as a config of peft; None without adapters.

        Raises:
            VflairError: peft is not installed.
        """
        if not self.r:
            return None
        check_peft()
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=list(self.target_modules) or None,
        )


class Owner(Protocol):
    """A data party or a model party."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def slices(self) -> Slices: ...


def tune(
    owner: Owner | nn.Module,
    trainable: Sequence[str] = EVERYTHING,
    *,
    adapters: Lora | PeftConfig | None = None,
    full: Sequence[str] = (),
    seed: int = 0,
    slices: Slices | None = None,
) -> list[str]:
    """Choose what is trained of the weights that `owner` holds, and return their names. The rest is frozen.

    Args:
        owner: A data party or a model party, or a whole model, which needs `slices`. Say the same to both parties.
        trainable: Slices to train, as in ``["head", "body", "blocks.7"]``; a slice that the other party holds is
            the other party's business.
        adapters: Train adapters in these slices instead: a `Lora`, or a config of peft that puts modules
            into a model (LoRA, IA3, LoHa, …).
        full: Slices whose weights are trained themselves beside the adapters.
        seed: Where the adapters' first weights come from, with the name of each module.
        slices: Of a whole model: `data_party.slices`.

    Raises:
        ExperimentError: There is no such slice, or no layer of the chosen name in it.
        VflairError: Adapters are asked for, and peft is not installed.
    """
    model = owner if isinstance(owner, nn.Module) else owner.model
    if slices is None:
        if isinstance(owner, nn.Module):
            raise ExperimentError("A whole model needs slices=data_party.slices of how it is cut.")
        slices = owner.slices
    if isinstance(adapters, Lora):
        full, adapters = (*full, *adapters.full), adapters.config()
    slices.check((*trainable, *full))
    whole = set(full) if adapters is not None else {*trainable, *full}
    added: set[int] = set()
    if adapters is not None:
        held = {id(weight) for weight in model.parameters()}
        fitted = _fitted(adapters, model, slices, set(trainable) - set(full), whole)
        if fitted is not None:
            inject_adapter(model, fitted, seed)
        added = {id(p) for p in model.parameters() if p.requires_grad and id(p) not in held}
    chosen = {
        id(weight)
        for name, weight in model.named_parameters(remove_duplicate=False)
        if slices.of(name) & whole
    }
    for weight in model.parameters():
        weight.requires_grad_(id(weight) in added or id(weight) in chosen)
    return [name for name, weight in model.named_parameters() if weight.requires_grad]


def _fitted(
    config: PeftConfig, model: nn.Module, slices: Slices, wanted: set[str], whole: set[str]
) -> PeftConfig | None:
    """The config with the full names of the layers it means in the `wanted` slices; None if that is none."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if not hasattr(config, "target_modules") or config.is_prompt_learning:
        raise ExperimentError(
            f"{type(config).__name__} puts nothing into layers, so it cannot be cut into slices. Use "
            "peft.get_peft_model(data_party.model, config)."
        )
    if getattr(config, "modules_to_save", None):
        raise ExperimentError(
            "Say full=['task_head'] (or another slice) instead of modules_to_save."
        )
    inside = {
        name: module
        for name, module in model.named_modules()
        if name and module._parameters and slices.of(name) & wanted and not slices.of(name) & whole
    }
    linear = {
        name
        for name, module in inside.items()
        if isinstance(module, (nn.Linear, Conv1D)) and _in_block(slices.of(name))
    }
    if config.target_modules in (None, "all-linear"):
        chosen = linear
    else:
        chosen = {name for name in inside if check_target_module_exists(config, name)}
    if inside and not chosen:
        leaves = sorted({name.rpartition(".")[2] for name in inside})
        asked = config.target_modules or "every linear layer"
        asked = asked if isinstance(asked, str) else ", ".join(sorted(asked))
        raise ExperimentError(
            f"No layer in {', '.join(sorted(wanted))} of this party goes by {asked!r}."
            f"{alternatives(asked, leaves)} A slice in which nothing is "
            "meant can be left out of `trainable`."
        )
    if not chosen:
        return None
    fitted = copy.deepcopy(config)
    fitted.target_modules = chosen
    return fitted


def _in_block(slices: frozenset[str]) -> bool:
    return any(name.startswith("blocks.") for name in slices)
