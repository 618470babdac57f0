"""Which adapters of peft are on in a call: it travels with the call, so that both halves of a model have the same on.

`with peft_model.disable_adapter():`, `set_adapter`, merging and rescaling act on the data party's half only. The model
party runs each call with its own adapters as the data party's are, and has them afterwards as its operator left them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

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
    _layers: list[Any] = field(factory=list)  # of peft, as they were met last
    _first: WeakKeyDictionary[Any, dict[str, float]] = field(
        factory=WeakKeyDictionary
    )  # scalings as they were met first

    def look(self) -> None:
        """Note the layers that peft has made by now."""
        if layers := layers_of_adapters(self.model):
            self._layers = layers
            for layer in layers:
                self._first[layer] = {**_scaling(layer), **self._first.get(layer, {})}

    def now(self) -> AdapterState | None:
        """The state; None if there never was an adapter.

        Raises:
            PartitionError: It is not the same in all layers, or is one that the model party cannot take.
        """
        self.look()
        if not self._layers:
            return None
        gone = not layers_of_adapters(self.model)
        if gone and not any(layer.merged_adapters for layer in self._layers):
            return OFF  # unloaded, and not merged before
        self._check_known_to_the_model_party()
        found = {self._state(layer) for layer in self._layers}
        if len(found) > 1:
            told = "; ".join(sorted(_shown(state) for state in found))
            raise PartitionError(
                f"The adapters are not in one state in all layers of the data party: {told}. The model party follows one "
                "state. Switch them for the whole model, e.g. with peft's disable_adapter() or set_adapter()."
            )
        return found.pop()

    def _check_known_to_the_model_party(self) -> None:
        if any(map(_rows_have_their_own, self._layers)):
            raise PartitionError(
                "adapter_names= gives rows of a batch adapters of their own, which the model party cannot follow. Call the "
                "model once for each adapter (set_adapter)."
            )
        for config in (getattr(self.model, "peft_config", None) or {}).values():
            if getattr(config, "alora_invocation_tokens", None):
                raise PartitionError(
                    "An activated LoRA (alora_invocation_tokens) begins where certain tokens stand, which the model party does "
                    "not know. Use LoRA without invocation tokens."
                )

    def _state(self, layer: Any) -> AdapterState:
        if layer.disable_adapters:
            return OFF
        names = tuple(layer.merged_adapters or layer.active_adapters)
        return AdapterState(names, self._scale(layer, names))

    def _scale(self, layer: Any, names: Iterable[str]) -> float:
        """By what the outputs of these adapters are multiplied beside what their config says."""
        factors = set()
        for name, value in _scaling(layer).items():
            configured = _configured(layer, name) or self._first[layer].get(name)
            if name in names and configured:
                factors.add(round(value / configured, 9))
        if len(factors) > 1:
            raise PartitionError(
                "The active adapters are scaled by different factors, and the model party follows one."
            )
        return factors.pop() if factors else 1.0


def layers_of_adapters(model: nn.Module) -> list[Any]:
    """The layers in `model` that peft made; where it only put modules in place of others (`modules_to_save`), these."""
    if sys.modules.get(_TUNERS) is None:
        return []
    return [module for module in model.modules() if made_by_peft(module)] or _wrappers_in(model)


def made_by_peft(module: nn.Module) -> bool:
    """Whether peft made this layer. Who never imported peft has none, and needs no peft to know it."""
    tuners = sys.modules.get(_TUNERS)
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def _wrappers_in(model: nn.Module) -> list[Any]:
    kind = sys.modules[_WRAPPERS].AuxiliaryTrainingWrapper
    return [module for module in model.modules() if isinstance(module, kind)]


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
            "parties' adapters one name, so that they are one adapter, or have none at the model party. (An adapter 'ref' is "
            "TRL's copy of a model that was wrapped by peft: give its trainer the plain model and peft_config instead.)"
        )
    switched = {id(module): module for module in (*layers, *_wrappers_in(model))}.values()
    before = [_switches(module) for module in switched]
    try:
        for module in switched:
            _set(module, state)
        yield
    finally:
        for module, each in zip(switched, before, strict=True):
            vars(module).update(each)


def _scaling(layer: Any) -> Mapping[str, float]:
    scaling = vars(layer).get("scaling")
    return scaling if isinstance(scaling, dict) else {}


def _configured(layer: Any, name: str) -> float | None:
    """The scaling that follows from rank and alpha, for the methods in which it does."""
    if type(layer).__module__.split(".")[:3] not in (
        ["peft", "tuners", method] for method in ("lora", "loha", "lokr")
    ):
        return None
    rank = layer.r.get(name)
    alpha = getattr(layer, "lora_alpha", getattr(layer, "alpha", {})).get(name)
    if not rank or not alpha:
        return None
    root = getattr(layer, "use_rslora", {}).get(name)
    return float(alpha / (rank**0.5 if root else rank))


def _rows_have_their_own(layer: Any) -> bool:
    hooks = (getattr(hook, "func", hook) for hook in layer._forward_pre_hooks.values())
    return any(getattr(h, "__name__", "") == "_adapter_names_pre_forward_hook" for h in hooks)


def _names_in(layer: Any) -> set[str]:
    names: set[str] = set(getattr(layer, "_adapters", ()))  # of what stands in place of a module
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
