"""A peft adapter of the whole model, loaded into both parties' halves.

peft itself, given the data party's model, would load half of it. Here every weight of the adapter finds the party that
holds its module, and what fits neither is an error. It is tried on the structure of both halves first, so that an
adapter that does not fit changes nothing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from attrs import frozen
from safetensors import SafetensorError
from torch import Tensor, nn

from vflair_core.errors import CheckpointError
from vflair_core.parties.data_party.stubs import ModuleStub
from vflair_core.partition.adapter_state import layers_of_adapters, made_by_peft
from vflair_core.partition.adapters import adapters_of, check_peft, inject_adapter
from vflair_core.partition.module_tree import on_meta

if TYPE_CHECKING:
    from peft import PeftConfig

    from vflair_core.parties.data_party.party import DataParty
    from vflair_core.parties.model_party.party import ModelParty

PREFIX = "base_model.model."


def load_adapter(
    data_party: DataParty,
    model_party: ModelParty,
    folder: str | Path,
    *,
    name: str = "default",
    trainable: bool = False,
) -> None:
    """Load an adapter of the whole model into both halves, and switch it on.

    Args:
        data_party: One half.
        model_party: The other half, in this process. Where it is elsewhere, its operator loads it:
            ``load_model_party(..., adapter=folder)``.
        folder: Where `save_pretrained` of peft or `vflair merge --adapter` wrote, or the name of a hub repository.
        name: What the adapter goes by at both parties.
        trainable: Train the adapter, and nothing else. Without, nothing is trained until `tune` says so.

    Raises:
        CheckpointError: There is no adapter, it is of another model, or of a sort that layers do not hold; or there
            is one of this name already. Nothing is changed.
        VflairError: peft is not installed.
    """
    adapter = Adapter.read(folder)
    halves = [(owner.model, adapter.held_by(owner.model)) for owner in (data_party, model_party)]
    adapter.check_all_held(key for _, keys in halves for key in keys)
    for model, keys in halves:
        adapter.check_complete(model, keys)
        adapter.try_on(model, keys, name)
    for model, keys in halves:
        adapter.put_into(model, keys, name, trainable=trainable)


def load_half(model: nn.Module, folder: str | Path, elsewhere: Sequence[str] | None) -> None:
    """Load what an adapter of the whole model has for one party's half.

    Args:
        model: The half.
        folder: As in `load_adapter`.
        elsewhere: Modules that other parties hold; None where the other party sees to it that all is held.

    Raises:
        CheckpointError: As in `load_adapter`.
    """
    adapter = Adapter.read(folder)
    keys = adapter.held_by(model)
    if elsewhere is not None:
        theirs = [k for k in adapter.weights if any(k.startswith(f"{m}.") for m in elsewhere)]
        adapter.check_all_held([*keys, *theirs])
    adapter.check_complete(model, keys)
    adapter.try_on(model, keys, "default")
    adapter.put_into(model, keys, "default", trainable=False)


@frozen(eq=False)
class Adapter:
    """An adapter as it was saved: its config, and its weights by the names of the whole model's modules."""

    folder: str
    config: PeftConfig
    weights: Mapping[str, Tensor]

    @classmethod
    def read(cls, folder: str | Path) -> Adapter:
        """Read an adapter.

        Raises:
            CheckpointError: There is none, or it is not of a sort that layers hold.
            VflairError: peft is not installed.
        """
        check_peft()
        from peft import PeftConfig
        from peft.utils.save_and_load import load_peft_weights

        try:
            config = PeftConfig.from_pretrained(str(folder))
            weights = load_peft_weights(str(folder), device="cpu")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(
                f"There is no adapter at {folder}: {error} Give a folder with adapter_config.json and "
                "adapter_model.safetensors, as save_pretrained of peft writes it."
            ) from error
        sort = type(config).__name__
        if config.peft_type is None:
            raise CheckpointError(
                f"{folder} does not say what sort of adapter it is: its adapter_config.json has no peft_type."
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise CheckpointError(
                f"{folder} is an activated LoRA, which begins where certain tokens stand: the model party does not know "
                "where. Merge it into the model before the model is cut."
            )
        if config.is_prompt_learning:
            raise CheckpointError(
                f"{folder} holds a {sort}, which puts nothing into layers: all of it is the data party's. Use "
                "peft.PeftModel.from_pretrained(data_party.model, folder)."
            )
        if getattr(config, "trainable_token_indices", None):
            raise CheckpointError(
                f"{folder} trains single tokens (trainable_token_indices), which is not loaded in halves. Merge it into "
                "the model before the model is cut: merge_and_unload()."
            )
        return cls(str(folder), config, {k.removeprefix(PREFIX): w for k, w in weights.items()})

    def held_by(self, model: nn.Module) -> dict[str, str]:
        """The weights whose module `model` has, each with the name of that module."""
        found = {key: _module_of(key, model) for key in self.weights}
        return {key: path for key, path in found.items() if path is not None}

    def check_all_held(self, keys: Iterable[str]) -> None:
        """See that each weight of the adapter is among `keys`.

        Raises:
            CheckpointError: One is not.
        """
        if lost := sorted(self.weights.keys() - set(keys)):
            raise CheckpointError(
                f"{self.folder} does not fit this model: no party holds the module of {len(lost)} of its "
                f"{len(self.weights)} weights, {lost[0]} among them. It was trained on "
                f"{self.config.base_model_name_or_path or 'another model'}; load that one."
            )

    def check_complete(self, model: nn.Module, keys: Mapping[str, str]) -> None:
        """See that the adapter has weights for all that its config means of `model`: half an adapter has not.

        Raises:
            CheckpointError: It lacks some.
        """
        from peft.tuners.tuners_utils import check_target_module_exists

        meant = [
            name
            for name, module in model.named_modules()
            if not isinstance(module, ModuleStub)
            and any(True for _ in module.parameters())
            and check_target_module_exists(self.config, name)
        ]
        if lacking := sorted(set(meant) - set(keys.values())):
            raise CheckpointError(
                f"{self.folder} lacks weights for {len(lacking)} modules that its config means, {lacking[0]} among them: it is "
                "half of an adapter (a data party's, saved by peft), or of a smaller model. `vflair merge --adapter` joins "
                "the halves of two parties."
            )

    def try_on(self, model: nn.Module, keys: Mapping[str, str], name: str) -> None:
        """Put the adapter into a structure like the model's, without data, to see whether it fits.

        Raises:
            CheckpointError: It does not, or the model has an adapter of this name.
        """
        if name in adapters_of(model):
            raise CheckpointError(
                f"There is an adapter {name!r} already. Load this one under another: name='second'."
            )
        trial = nn.Module()
        for path in sorted(set(keys.values())):
            *parents, last = path.split(".")
            at = trial
            for part in parents:
                if part not in at._modules:
                    at.add_module(part, nn.Module())
                at = at.get_submodule(part)
            module: Any = model.get_submodule(path)
            if hasattr(module, "get_base_layer"):  # other adapters beside it do not matter
                module = module.get_base_layer()
            at.add_module(last, on_meta(module))
        try:
            shapes = {key: weight.to("meta") for key, weight in self.weights.items()}
            attrs.evolve(self, weights=shapes).put_into(trial, keys, name, trainable=False)
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self.folder} does not fit this model: {error}") from error

    def put_into(
        self, model: nn.Module, keys: Mapping[str, str], name: str, *, trainable: bool
    ) -> None:
        """Put the weights `keys` into `model`, in the modules that are theirs."""
        from peft.utils.other import _set_trainable
        from peft.utils.save_and_load import set_peft_model_state_dict

        if not keys:
            return
        whole = {key for key, path in keys.items() if _is_own_weight(key, path, model)}
        config: Any = copy.deepcopy(self.config)
        config.target_modules = {path for key, path in keys.items() if key not in whole}
        config.inference_mode = not trainable
        meant = getattr(config, "modules_to_save", None) or ()
        saved = {_around(keys[key], meant) for key in whole} - {None}
        config.modules_to_save = sorted(saved) or None  # whole names: others may end alike
        if config.target_modules:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
                inject_adapter(model, config, seed=0, name=name)
        else:
            model.peft_config = {**adapters_of(model), name: config}  # type: ignore[assignment]
            _set_trainable(
                model,
                name,
                inference_mode=not trainable,
                module_names=sorted(saved),
                activate_adapter=True,
            )
        result: Any = set_peft_model_state_dict(
            model, {key: self.weights[key] for key in keys}, adapter_name=name
        )
        if result.unexpected_keys:
            raise CheckpointError(
                f"{self.folder} does not fit this model: it has {result.unexpected_keys[0]}, which peft finds no place for."
            )
        for layer in layers_of_adapters(model):
            layer.set_adapter([name], inference_mode=not trainable)


def _module_of(key: str, model: nn.Module) -> str | None:
    """The module of `model` that a weight of an adapter belongs to; None if it is not held here."""
    at, path = model, []
    for part in key.split("."):
        if isinstance(at, ModuleStub) or made_by_peft(at) or part not in at._modules:
            break
        at = at.get_submodule(part)
        path.append(part)
    held = made_by_peft(at) or any(p is not None for p in at._parameters.values())
    return ".".join(path) if held and not isinstance(at, ModuleStub) else None


def _around(path: str, meant: Sequence[str]) -> str | None:
    """The module around or at `path` that one of the names `meant` means: peft takes ends of names."""
    parts = path.split(".")
    prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((prefix for prefix in prefixes if prefix.endswith(tuple(meant))), None)


def _is_own_weight(key: str, path: str, model: nn.Module) -> bool:
    """Whether a weight takes the place of the module's own, rather than being put beside it."""
    return key.removeprefix(f"{path}.") in model.get_submodule(path)._parameters
