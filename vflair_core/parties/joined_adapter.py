"""Two parties' peft adapters as one.

peft ignores in silence the weights of modules that `target_modules` does not name. So the joined config
names every adapted module by its full path, and what was written is read back and compared.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from attrs import frozen
from safetensors.torch import save_file
from torch import Tensor

from vflair_core.errors import CheckpointError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# What the parties may say differently: where, how much, and what matters in training only.
PLACES = ("target_modules", "feedforward_modules", "modules_to_save", "exclude_modules")
APART = frozenset(
    [
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "lora_dropout",
        "layers_to_transform",
        "layers_pattern",
        "task_type",
        "inference_mode",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "peft_version",
    ]
)
# For other tasks peft would add a head of its own accord, trained or not.
HEADLESS = frozenset(["CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"])
PREFIX = "base_model.model."
DORA = ".lora_magnitude_vector"  # peft writes this module as if it were its weight


@frozen(eq=False)
class Joined:
    """One adapter made of two."""

    name: str
    config: Mapping[str, Any]
    adapted: Mapping[str, Mapping[str, Any]]  # rank and scale of each adapted module

    def has(self, name: str) -> bool:
        """Is this a weight of the adapter, rather than of the model?"""
        return any(name.startswith(path + ".") for path in self.adapted)


def join_adapters(adapters: Sequence[Mapping[str, Any]]) -> Joined:
    """Make one adapter of what each party knows about its own.

    Raises:
        CheckpointError: They are of different sorts.
    """
    first, *others = adapters
    config = dict(first["config"])
    for other in others:
        for key in config.keys() | other["config"].keys():
            mine, theirs = config.get(key), other["config"].get(key)
            apart = key in APART and (key != "r" or "rank_pattern" in config)
            if mine != theirs and not apart and key not in PLACES:
                raise CheckpointError(
                    f"The parties' adapters do not fit: {key} is {mine!r} at one and {theirs!r} at the other. "
                    "One adapter has one of each. Give both parties the same."
                )
    adapted = {path: facts for adapter in adapters for path, facts in adapter["adapted"].items()}
    asked = {adapter["config"].get("task_type") for adapter in adapters} & HEADLESS
    config["task_type"] = asked.pop() if len(asked) == 1 else None
    if (
        "feedforward_modules" in config
    ):  # of IA3, which must be among the targets: by full path, as they are
        config["feedforward_modules"] = sorted(
            path
            for adapter in adapters
            for path in adapter["adapted"]
            if _named(path, adapter["config"].get("feedforward_modules") or ())
        )
    config |= {"target_modules": sorted(adapted), "modules_to_save": None, "inference_mode": True}
    config |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    if "rank_pattern" in config:
        for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            values = {path: facts[key] for path, facts in adapted.items()}
            config[key] = Counter(values.values()).most_common(1)[0][0]
            config[pattern] = {path: v for path, v in values.items() if v != config[key]}
    return Joined(first["name"], config, adapted)


def _named(path: str, names: str | Sequence[str]) -> bool:
    """Whether peft's `names`, which are ends of paths or one pattern, mean the module at `path`."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def plain_name(name: str, joined: Joined) -> str:
    """The name of a saved weight without peft's wrappers and the adapter's own name, as peft writes it."""
    if joined.has(name):
        plain = ".".join(part for part in name.split(".") if part != joined.name)
        return plain.removesuffix(".weight") if plain.endswith(f"{DORA}.weight") else plain
    return name.replace(f".modules_to_save.{joined.name}.", ".")


def write_adapter(
    folder: Path,
    joined: Joined,
    weights: Mapping[str, Tensor],
    changed: Mapping[str, Tensor],
    model: PreTrainedModel,
    *,
    base: str,
) -> PeftModel:
    """Write one adapter, with the modules whose own weights were trained, and return it as peft reads it.

    Raises:
        CheckpointError: It cannot hold what was trained, or peft does not read it back.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    trained = sorted({name.rpartition(".")[0] for name in changed})
    for path in trained:
        if any(True for _ in model.get_submodule(path).children()):
            raise CheckpointError(
                f"{path} was trained itself and has modules inside, which an adapter cannot hold. Merge into "
                "the weights instead."
            )
    for (
        path
    ) in trained:  # peft keeps whole modules: what of them did not change comes from the base
        parameters = dict(model.get_submodule(path).named_parameters())
        changed = {f"{path}.{name}": p.detach() for name, p in parameters.items()} | dict(changed)
    config = {**joined.config, "modules_to_save": trained or None, "base_model_name_or_path": base}
    tensors = {PREFIX + name: t.contiguous() for name, t in {**weights, **changed}.items()}
    PeftConfig.from_peft_type(**config).save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with warnings.catch_warnings():
        # GPT-2 has layers of both sorts; peft sees which is which, module by module.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        read = PeftModel.from_pretrained(model, folder)
    state = get_peft_model_state_dict(read, save_embedding_layers=False)
    made = _made_by_peft(read, joined, tensors.keys() - state.keys())
    if made.keys() | state.keys() != tensors.keys() or not all(
        torch.equal({**made, **state}[name].cpu(), tensor) for name, tensor in tensors.items()
    ):
        lost = sorted(tensors.keys() ^ (made.keys() | state.keys()))
        raise CheckpointError(
            f"peft does not read this adapter, a {joined.config.get('peft_type', '?')}, back as it was written: "
            f"{', '.join(lost[:4]) or 'its values differ'}. Each half is whole, as its party saved it; joined, such an adapter "
            "cannot be written or merged yet."
        )
    if made:
        kept = {name: tensor for name, tensor in tensors.items() if name not in made}
        save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return read


def _made_by_peft(read: PeftModel, joined: Joined, names: Iterable[str]) -> dict[str, Tensor]:
    """Those of `names` that peft writes to no file because it makes them itself, as the rank of AdaLoRA."""
    as_read = attrs.evolve(joined, name="default")
    every = {
        PREFIX + plain_name(name.removeprefix(PREFIX), as_read): tensor
        for name, tensor in read.state_dict().items()
    }
    return {name: every[name] for name in names if name in every}


def merge_adapter(
    model: PreTrainedModel, joined: Joined, weights: Mapping[str, Tensor]
) -> PreTrainedModel:
    """Return `model` with the joined adapter merged into its weights."""
    with tempfile.TemporaryDirectory() as folder:
        adapted: Any = write_adapter(Path(folder), joined, weights, {}, model, base="")
        return adapted.merge_and_unload()  # type: ignore[no-any-return]
