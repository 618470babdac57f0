"""In which order a model calls its modules, found without data, or with a little if need be."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from vflair_core.absent import on_meta
from vflair_core.errors import PartitionError


def has_two_stacks(model: nn.Module) -> bool:
    """Whether a stack of the model reads and another writes."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))


def text_config(model: nn.Module) -> Any:
    """The part of the config that is about text; None without a config."""
    config = getattr(model, "config", None)
    return config.get_text_config() if config is not None else None


def calls_of(model: nn.Module, names: list[str], inner: Sequence[str] = ()) -> list[str]:
    """Return `names` in the order of their calls, each as often as it is called.

    A model that needs more than text may have an `inner` one that does not (the first that runs is taken): then what
    the inner one calls is all there is, and the output layer, which comes last.

    Raises:
        PartitionError: The model cannot be run on text alone.
    """
    try:
        return _calls(model, names)
    except Exception as error:
        for name in inner:
            found = _calls_of_part(model, name, names)
            if found:
                return found
        raise PartitionError(
            f"{type(model).__name__} cannot be run on text alone, so the order of its modules is not known: "
            f"{type(error).__name__}: {error}. Use a partition with tail >= 1, which needs no such run."
        ) from error


def _calls_of_part(model: nn.Module, part: str, names: list[str]) -> list[str]:
    own = [name.removeprefix(f"{part}.") for name in names if name.startswith(f"{part}.")]
    try:
        order = [f"{part}.{name}" for name in _calls(model.get_submodule(part), own)]
    except Exception:  # noqa: BLE001 - the whole model's reason is the one to tell
        return []
    ask: Callable[[], Any] | None = getattr(model, "get_output_embeddings", None)
    output = ask() if ask else None
    last = [name for name in names if output is not None and model.get_submodule(name) is output]
    return order + [name for name in last if name not in order]


def _calls(model: nn.Module, names: list[str]) -> list[str]:
    given: dict[str, Any] = model.dummy_inputs  # type: ignore[assignment]
    inputs = {key: value[:1, :4] for key, value in given.items() if torch.is_tensor(value)}
    if has_two_stacks(model):
        inputs.setdefault("decoder_input_ids", inputs["input_ids"])
    shadow = on_meta(model).eval()
    try:
        return _trace(shadow, names, {key: value.to("meta") for key, value in inputs.items()})
    except Exception:  # noqa: BLE001 - any operation may lack a meta kernel; the real model has them all
        # The weights are shared, not copied; what the run may set on its modules stays with the twin.
        twin = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
        device = next(model.parameters()).device
        texts = {key: _plain(model, value.to(device)) for key, value in inputs.items()}
        return _trace(twin.eval(), names, texts)


def _plain(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Words of one sort with an end of text: some classifiers look for it."""
    end = getattr(text_config(model), "eos_token_id", None)
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
