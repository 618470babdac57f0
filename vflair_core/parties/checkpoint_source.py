"""Which checkpoint is meant: its config, its architecture, and a name for its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from vflair_core.errors import CheckpointError, alternatives
from vflair_core.parties.checkpoint_files import locate_checkpoint
from vflair_core.parties.config_fields import check_fields, fields_of
from vflair_core.partition.fingerprint import files_digest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Where the files are: for the config and for the weights alike.
PLACE = frozenset(
    [
        "cache_dir",
        "code_revision",
        "force_download",
        "gguf_file",
        "local_files_only",
        "proxies",
        "revision",
        "subfolder",
        "token",
        "trust_remote_code",
    ]
)
# How the weights are read: for `from_pretrained` only.
READING = frozenset(
    [
        "attn_implementation",
        "device_map",
        "disable_mmap",
        "dtype",
        "experts_implementation",
        "generation_config",
        "ignore_mismatched_sizes",
        "key_mapping",
        "max_memory",
        "offload_buffers",
        "offload_folder",
        "quantization_config",
        "torch_dtype",
        "use_safetensors",
        "variant",
        "weights_only",
    ]
)


@frozen(eq=False)
class Source:
    """A checkpoint that was found, and the options to read it with."""

    name: str
    config: PretrainedConfig
    auto: Any  # the class to load with
    weights: str  # commit or digest
    options: Mapping[str, Any]
    place: Mapping[str, Any]  # those of them that say where the files are

    @property
    def saved_as(self) -> str:
        """The architecture that wrote the checkpoint, as far as the config says."""
        return ", ".join(self.config.architectures or ()) or "unknown"

    def empty_model(self) -> PreTrainedModel:
        """Build the architecture, under whatever device is in force."""
        build = getattr(self.auto, "from_config", None) or self.auto._from_config
        accepted = {"attn_implementation", "experts_implementation", "trust_remote_code"}
        return build(self.config, **{k: v for k, v in self.options.items() if k in accepted})  # type: ignore[no-any-return]


def find_source(name: str | Path, auto: Any, options: Mapping[str, Any]) -> Source:
    """Read the config of a checkpoint and name its weights.

    Raises:
        CheckpointError: There is no such checkpoint, no such option, or the config names no known class; or what
            `locate_checkpoint` raises.
    """
    from transformers import AutoConfig

    place = {key: options[key] for key in PLACE & options.keys()}
    name = locate_checkpoint(name, **place)
    if place.pop("gguf_file", ""):
        place = {}  # the file became a folder of its own
    if (adapter := _adapter_at(name, place)) is not None:
        raise CheckpointError(
            f"{name} is an adapter, not a model. Give the model it was trained on"
            f"{f' ({adapter})' if adapter else ''} and adapter={str(name)!r}."
        )
    reading = {key: options[key] for key in READING & options.keys()}
    overrides = {key: options[key] for key in options.keys() - PLACE - READING}
    try:
        config, unused = AutoConfig.from_pretrained(
            name, return_unused_kwargs=True, **place, **overrides
        )
    except (OSError, ValueError) as error:
        where = f"the folder {name}" if Path(name).is_dir() else f"{name!r}, hub or folder,"
        raise CheckpointError(
            f"There is no model at {where}: {error} Give a folder with config.json and weights, as "
            "save_pretrained writes it, or the name of a hub model."
        ) from error
    for key in unused.keys() - PLACE:
        names = [*fields_of(type(config)), *sorted(READING | PLACE)]
        raise CheckpointError(
            f"There is no option {key!r} to load {name} with.{alternatives(key, names)} Options are fields of its config, "
            "and how and where to read it."
        )
    if wrong := check_fields(config, {key: overrides[key] for key in overrides.keys() - unused}):
        raise CheckpointError(f"{name} cannot be loaded with these options: {wrong}")
    folder = Path(name) / place.get("subfolder", "")
    if folder.is_dir():
        weights = files_digest(folder, options.get("variant"))
    else:
        commit = _commit(name, place)
        weights, place = f"commit:{commit}", {**place, "revision": commit}
    return Source(
        name, config, auto or _architecture(config, name), weights, {**place, **reading}, place
    )


def _adapter_at(name: str | Path, place: Mapping[str, Any]) -> str | None:
    """The model that an adapter of peft was trained on, if there is an adapter."""
    path = Path(name) / place.get("subfolder", "") / "adapter_config.json"
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path") or ""


def _commit(name: str, place: Mapping[str, Any]) -> str:
    """The commit that a revision of a hub model stands for, read off the cache where its config lies."""
    from transformers.utils.hub import cached_file

    options = {k: v for k, v in place.items() if k not in ("code_revision", "trust_remote_code")}
    parts = Path(str(cached_file(name, "config.json", **options))).parts
    return parts[len(parts) - 1 - parts[::-1].index("snapshots") + 1]


def _architecture(config: PretrainedConfig, name: str) -> Any:
    import transformers

    for architecture in config.architectures or ():
        named = getattr(transformers, architecture, None)
        if named is not None:
            return named
    raise CheckpointError(
        f"The config of {name} names no class of transformers ({config.architectures}). Say which to load "
        "with: auto=AutoModelForCausalLM."
    )
