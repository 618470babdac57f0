"""Two parties' peft adapters as one.

peft ignores in silence the weights of modules that `target_modules` does not name. So the joined config
names every adapted module by its full path, and what was written is read back and compared.
"""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
            if mine != theirs and key not in APART and key not in PLACES:
                raise CheckpointError(
                    f"The parties' adapters do not fit: {key} is {mine!r} at one and {theirs!r} at the other. "
                    "One adapter has one of each. Give both parties the same."
                )
    adapted = {path: facts for adapter in adapters for path, facts in adapter["adapted"].items()}
    asked = {adapter["config"].get("task_type") for adapter in adapters} & HEADLESS
    config["task_type"] = asked.pop() if len(asked) == 1 else None
    config |= {
        key: sorted({n for a in adapters for n in a["config"].get(key) or ()}) or None
        for key in ("feedforward_modules",)
        if key in config
    }
    config |= {"target_modules": sorted(adapted), "modules_to_save": None, "inference_mode": True}
    config |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    if "r" in config:
        for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            values = {path: facts[key] for path, facts in adapted.items()}
            config[key] = Counter(values.values()).most_common(1)[0][0]
            config[pattern] = {path: v for path, v in values.items() if v != config[key]}
    return Joined(first["name"], config, adapted)


def plain_name(name: str, joined: Joined) -> str:
    """The name of a saved weight without peft's wrappers and the adapter's own name."""
    if joined.has(name):
        return ".".join(part for part in name.split(".") if part != joined.name)
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
    if state.keys() != tensors.keys() or not all(
        torch.equal(state[name].cpu(), tensor) for name, tensor in tensors.items()
    ):
        lost = sorted(tensors.keys() ^ state.keys())
        raise CheckpointError(
            f"peft does not read the joined adapter back as it was written ({', '.join(lost[:4])}). Merge into "
            "the weights instead."
        )
    return read


def merge_adapter(
    model: PreTrainedModel, joined: Joined, weights: Mapping[str, Tensor]
) -> PreTrainedModel:
    """Return `model` with the joined adapter merged into its weights."""
    with tempfile.TemporaryDirectory() as folder:
        adapted: Any = write_adapter(Path(folder), joined, weights, {}, model, base="")
        return adapted.merge_and_unload()  # type: ignore[no-any-return]
