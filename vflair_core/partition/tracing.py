"""In which order a model calls its modules, found without data, or with a little if need be."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn

from vflair_core.communication.program import tensors_of
from vflair_core.errors import PartitionError
from vflair_core.partition.module_tree import on_meta


def has_two_stacks(model: nn.Module) -> bool:
    """Whether a stack of the model reads and another writes."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))


def text_config(model: nn.Module) -> Any:
    """The part of the config that is about text; None without a config."""
    config = getattr(model, "config", None)
    return config.get_text_config() if config is not None else None


@define
class Trace:
    """Which modules a model called.

    Args:
        calls: Their names in the order of the calls, each as often as it was called.
        lasting: Those whose output was needed after the next one had been called: by a later one, or as an output of
            the model.
    """

    calls: list[str] = field(factory=list)
    lasting: set[str] = field(factory=set)
    _givers: dict[int, tuple[str, Tensor]] = field(
        factory=dict
    )  # who gave a tensor; kept, so that ids are unique

    def takes(self, values: Any) -> None:
        """Note who gave the tensors that are taken now."""
        for tensor in tensors_of(values):
            giver, _ = self._givers.get(id(tensor), (None, None))
            if giver is not None and giver != self.calls[-1]:
                self.lasting.add(giver)

    def gives(self, name: str, values: Any) -> None:
        """Note what `name` gave; what it only handed on remains somebody else's."""
        for tensor in tensors_of(values):
            self._givers.setdefault(id(tensor), (name, tensor))

    def within(self, part: str) -> Trace:
        """Return the same with the names that the modules of `part` have in the whole model."""
        return Trace([f"{part}.{n}" for n in self.calls], {f"{part}.{n}" for n in self.lasting})


def trace(model: nn.Module, names: list[str], inner: Sequence[str] = ()) -> Trace:
    """Find out in which order `model` calls the modules `names`.

    A model that needs more than text may have an `inner` one that does not (the first that runs is taken): then what
    the inner one calls is all there is, and the output layer, which comes last.

    Raises:
        PartitionError: The model cannot be run on text alone.
    """
    try:
        return _traced(model, names)
    except Exception as error:
        for name in inner:
            if found := _traced_part(model, name, names):
                return found
        raise PartitionError(
            f"{type(model).__name__} cannot be run on text alone, so the order of its modules is not known: "
            f"{type(error).__name__}: {error}. Use a partition with tail >= 1, which needs no such run."
        ) from error


def _traced_part(model: nn.Module, part: str, names: list[str]) -> Trace | None:
    inner = [name.removeprefix(f"{part}.") for name in names if name.startswith(f"{part}.")]
    try:
        found = _traced(model.get_submodule(part), inner).within(part)
    except Exception:  # noqa: BLE001 - the whole model's reason is the one to tell
        return None
    ask: Callable[[], Any] | None = getattr(model, "get_output_embeddings", None)
    output = ask() if ask else None
    last = [name for name in names if output is not None and model.get_submodule(name) is output]
    found.calls += [name for name in last if name not in found.calls]
    return found


def _traced(model: nn.Module, names: list[str]) -> Trace:
    given: dict[str, Any] = model.dummy_inputs  # type: ignore[assignment]
    inputs = {key: value[:1, :4] for key, value in given.items() if torch.is_tensor(value)}
    if has_two_stacks(model):
        inputs.setdefault("decoder_input_ids", inputs["input_ids"])
    shadow = on_meta(model).eval()
    try:
        return _run(shadow, names, {key: value.to("meta") for key, value in inputs.items()})
    except Exception:  # noqa: BLE001 - any operation may lack a meta kernel; the real model has them all
        # The weights are shared, not copied; what the run may set on its modules stays with the twin.
        twin = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
        device = next(model.parameters()).device
        texts = {key: _plain(model, value.to(device)) for key, value in inputs.items()}
        return _run(twin.eval(), names, texts)


def _plain(model: nn.Module, ids: Tensor) -> Tensor:
    """Words of one sort with an end of text: some classifiers look for it."""
    end = getattr(text_config(model), "eos_token_id", None)
    words = torch.ones_like(ids)
    if end is not None:
        words[:, -1] = end[0] if isinstance(end, (list, tuple)) else end
    return words


def _run(model: nn.Module, names: list[str], inputs: dict[str, Tensor]) -> Trace:
    found = Trace()
    modules = {name: model.get_submodule(name) for name in names}

    def noting(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def noted(*args: Any, **kwargs: Any) -> Any:
            found.takes((args, kwargs))
            found.calls.append(name)
            output = forward(*args, **kwargs)
            found.gives(name, output)
            return output

        return noted

    # Not by hooks: some models call `forward` itself.
    for name, module in modules.items():
        module.forward = noting(name, module.forward)
    try:
        with torch.no_grad():
            found.takes(model(**inputs))
    finally:
        for module in modules.values():
            del module.forward
    return found
