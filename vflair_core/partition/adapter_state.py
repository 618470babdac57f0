"""Which adapters of peft are on in a call: it travels with the call, so that both halves of a model have the same on.

`with peft_model.disable_adapter():`, `set_adapter`, merging and rescaling act on the data party's half only. The model
party runs each call with its own adapters as the data party's are, and has them afterwards as its operator left them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from attrs import define, field, frozen
from torch import nn

from vflair_core.errors import PartitionError, ProtocolError

_TUNERS, _WRAPPERS = "peft.tuners.tuners_utils", "peft.utils.other"


@frozen
class AdapterState:
    """Names of the adapters that are on, none if they are off, and by what their outputs are multiplied."""

    active: tuple[str, ...]
    scale: float = 1.0

    def to_wire(self) -> dict[str, Any]:
        """The same as a message carries it."""
        return {"active": list(self.active), "scale": self.scale}

    @classmethod
    def from_wire(cls, told: Any) -> AdapterState:
        """The state that a message brought.

        Raises:
            ProtocolError: It is none.
        """
        match told:
            case {"active": [*names], "scale": float() | int() as scale} if all(
                isinstance(name, str) for name in names
            ):
                return cls(tuple(names), float(scale))
        raise ProtocolError(f"{told!r} does not say which adapters are on.")


OFF = AdapterState(())


@define(eq=False)
class AdapterStates:
    """Tells the state of the adapters in `model`, call by call; layers that were unloaded are remembered."""

    model: nn.Module
    _layers: list[Any] = field(factory=list)  # of peft, as the last call met them

    def now(self) -> AdapterState | None:
        """The state; None if there never was an adapter.

        Raises:
            PartitionError: It is not the same in all layers, or is one that the model party cannot take.
        """
        layers = layers_of_adapters(self.model)
        if layers:
            self._layers = layers
        elif not any(layer.merged for layer in self._layers):  # unloaded, and not merged before
            return OFF if self._layers else None
        found = {_state(layer) for layer in self._layers}
        if not found:
            return None
        if len(found) > 1:
            told = "; ".join(sorted(_shown(state) for state in found))
            raise PartitionError(
                f"The adapters are not in one state in all layers of the data party: {told}. The model party follows one "
                "state. Switch them for the whole model, e.g. with peft's disable_adapter() or set_adapter()."
            )
        return found.pop()


def layers_of_adapters(model: nn.Module) -> list[Any]:
    """The layers in `model` that peft made."""
    tuners = sys.modules.get(
        _TUNERS
    )  # who never imported peft has none, and need not import it now
    if tuners is None:
        return []
    return [module for module in model.modules() if isinstance(module, tuners.BaseTunerLayer)]


@contextmanager
def adapters_in(model: nn.Module, state: AdapterState | None) -> Iterator[None]:
    """While this lasts, the adapters in `model` are in this state; what is trained of them stays as it is.

    Raises:
        ProtocolError: The model has adapters, and none of these names.
    """
    layers = layers_of_adapters(model) if state is not None else []
    if state is None or not layers:
        yield
        return
    known = sorted({name for layer in layers for name in _names_in(layer)})
    if state.active and not set(state.active) & set(known):
        raise ProtocolError(
            f"The data party's adapters are {', '.join(state.active)}; the model party has {', '.join(known)}. Give both "
            "parties' adapters one name, so that they are one adapter, or have none at the model party."
        )
    wrappers = sys.modules[_WRAPPERS].AuxiliaryTrainingWrapper
    switched = [*layers, *(m for m in model.modules() if isinstance(m, wrappers))]
    before = [_switches(module) for module in switched]
    try:
        for module in switched:
            _set(module, state)
        yield
    finally:
        for module, each in zip(switched, before, strict=True):
            vars(module).update(each)


def _state(layer: Any) -> AdapterState:
    if _rows_have_their_own(layer):
        raise PartitionError(
            "adapter_names= gives rows of a batch adapters of their own, which the model party cannot follow. Call the "
            "model once for each adapter (set_adapter)."
        )
    if layer.disable_adapters:
        return OFF
    if layer.merged:
        return AdapterState(tuple(layer.merged_adapters))
    return AdapterState(tuple(layer.active_adapters), _scale(layer))


def _scale(layer: Any) -> float:
    """By what the outputs of the active adapters are multiplied beside what their config says."""
    scaling: Mapping[str, float] = getattr(layer, "scaling", None) or {}
    ranks, alphas = (
        getattr(layer, "r", None),
        getattr(layer, "lora_alpha", getattr(layer, "alpha", None)),
    )
    if not isinstance(ranks, Mapping) or not isinstance(alphas, Mapping):
        return 1.0
    factors = set()
    for name in set(layer.active_adapters) & scaling.keys() & ranks.keys():
        root = getattr(layer, "use_rslora", {}).get(name)
        configured = alphas[name] / (ranks[name] ** 0.5 if root else ranks[name])
        factors.add(round(scaling[name] / configured, 9) if configured else 1.0)
    if len(factors) > 1:
        raise PartitionError(
            "The active adapters are scaled by different factors, and the model party follows one."
        )
    return factors.pop() if factors else 1.0


def _rows_have_their_own(layer: Any) -> bool:
    hooks = (getattr(hook, "func", hook) for hook in layer._forward_pre_hooks.values())
    return any(getattr(h, "__name__", "") == "_adapter_names_pre_forward_hook" for h in hooks)


def _names_in(layer: Any) -> set[str]:
    names: set[str] = set()
    for holder in (*layer.adapter_layer_names, *layer.other_param_names):
        values: Any = getattr(layer, holder, None)
        if hasattr(values, "keys"):
            names.update(values.keys())
    return names


def _switches(module: Any) -> dict[str, Any]:
    own = vars(module)
    kept = {"_active_adapter": own.get("_active_adapter", "default")}
    kept["_disable_adapters"] = own.get("_disable_adapters", False)
    if isinstance(own.get("scaling"), dict):
        kept["scaling"] = dict(own["scaling"])
    return kept


def _set(module: Any, state: AdapterState) -> None:
    # peft's own setters would choose anew what is trained.
    vars(module)["_disable_adapters"] = not state.active
    if state.active:
        vars(module)["_active_adapter"] = list(state.active)
    scaling = vars(module).get("scaling")
    if state.scale != 1.0 and isinstance(scaling, dict):
        module.scaling = {name: value * state.scale for name, value in scaling.items()}


def _shown(state: AdapterState) -> str:
    if not state.active:
        return "off"
    return f"{', '.join(state.active)} on" + (f" ×{state.scale}" if state.scale != 1 else "")
