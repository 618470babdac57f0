"""Modules taken out of a model's tree, put into another, or replaced by nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn


def empty_others(model: nn.Module, keep: set[str]) -> None:
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
                setattr(module, name, EmptyModule(child))

    walk(model, "")


class EmptyModule(nn.Module):
    """Owns nothing. Who asks for an attribute, as a model's own initialisation may, gets one without memory."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "before", module)  # on the meta device, and no submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "before"), name)


def outside(model: nn.Module, absent: tuple[str, ...]) -> set[str]:
    """The largest modules around `absent` that hold none of it."""
    ancestors = {name[:n] for name in absent for n in range(len(name)) if name[n] == "."}
    names = set()

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            full = f"{prefix}{name}"
            if full in ancestors:
                walk(child, full + ".")
            elif full not in absent:
                names.add(full)

    walk(model, "")
    return names


def take(
    model: nn.Module, names: Sequence[str], local: frozenset[str]
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a tree with the modules `names` under their own names, and the weights that had to be untied.

    A weight that both sides use gets a copy at the model party: no weight has two owners.
    """
    inside = {id(p) for name in names for p in model.get_submodule(name).parameters()}
    prefixes = tuple(name + "." for name in names if name not in local)
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
        if name in local:
            module = copy.deepcopy(module)
            untied += [f"{name}.{key}" for key, _ in module.named_parameters()]
        for key, parameter in list(module.named_parameters(remove_duplicate=False)):
            if id(parameter) in shared:
                parent, _, leaf = key.rpartition(".")
                setattr(module.get_submodule(parent), leaf, copy.deepcopy(parameter))
                untied.append(f"{name}.{key}")
        plant(held, name, module)
    return held, tuple(untied)


def plant(tree: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module into a tree of modules under its dotted name."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in tree._modules:
            tree.add_module(part, nn.Module())
        tree = tree._modules[part]  # type: ignore[assignment]
    tree.add_module(leaf, module)


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


def hollow(model: nn.Module) -> None:
    """Give every weight the value 0 and the memory of one number, so that the model runs where meta cannot."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in made:
                    zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                    made[id(tensor)] = nn.Parameter(zeros) if held is module._parameters else zeros
                if tensor is not None:
                    held[name] = made[id(tensor)]


def owners(weights: Iterable[str]) -> set[str]:
    """Names of the modules that own weights of these names."""
    return {name.rpartition(".")[0] for name in weights}


def inside(name: str, modules: Sequence[str]) -> bool:
    """Whether a weight or module of this name lies in one of `modules`."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module in the place of the one of this name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def names_by_weight(model: nn.Module) -> list[list[str]]:
    """All names of each weight: one, or several where weights are tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())
