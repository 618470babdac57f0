"""Which fields a config of transformers has: one that is misspelt would be kept, change nothing, and give another model."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from vflair_core.errors import alternatives

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EVERY = (  # what every config takes, beside its fields
    *("model_type", "num_labels", "torch_dtype", "name_or_path", "per_layer_config"),
    *("output_attentions", "attn_implementation", "experts_implementation"),
    *("tie_word_embeddings", "tie_last_hidden_states"),
)


def check_model_type(name: str) -> str:
    """Return what is wrong with the name of a model type; nothing if transformers knows it."""
    from transformers import CONFIG_MAPPING

    if name in CONFIG_MAPPING:
        return ""
    return f"There is no model type {name!r} in transformers.{alternatives(name, CONFIG_MAPPING)}"


def check_fields(config: PretrainedConfig, given: Mapping[str, Any], where: str = "") -> str:
    """Return what is wrong with the fields that a config was given, those of its parts included; nothing if all are its own.

    A field is known by the class, by its `attribute_map`, because every config takes it, because the code sets or reads
    it, or because a part of the config got it. Tables that are no config, as `rope_parameters`, are left as they are.
    """
    parts = [part for part in vars(config).values() if _is_config(part)]
    wrong = check_class(type(config), given, where, lambda key: _arrived(key, given[key], parts))
    for key, value in given.items():
        part: Any = getattr(config, key, None)
        if not wrong and isinstance(value, Mapping) and _is_config(part):
            wrong = check_fields(part, value, f"{where}{key}.")
    return wrong


def check_class(
    kind: type[PretrainedConfig],
    given: Mapping[str, Any],
    where: str = "",
    taken: Any = lambda _key: False,
) -> str:
    """The same of the class alone, before anything is built; `taken` knows of other keys."""
    if not kind.__module__.startswith("transformers."):
        return ""  # remote code: only it knows
    names = fields_of(kind)
    for key in given:
        if key not in names and not hasattr(kind, key) and not taken(key) and not _reads(kind, key):
            return f"A config of {kind.model_type} has no field {where + key!r}.{alternatives(key, names)}"
    return ""


def fields_of(kind: type[PretrainedConfig]) -> tuple[str, ...]:
    """Return the names that a class of configs takes."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    parameters = inspect.signature(kind).parameters.values()
    names += [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return tuple(dict.fromkeys([*names, *kind.attribute_map, *EVERY]))


def has_parts(kind: type[PretrainedConfig]) -> bool:
    """Whether configs of this class hold others, which may take what is given to the whole."""
    return bool(getattr(kind, "sub_configs_defaults", None) or getattr(kind, "sub_configs", None))


def _is_config(value: Any) -> bool:
    from transformers import PretrainedConfig

    return isinstance(value, PretrainedConfig)


def _arrived(key: str, value: Any, parts: list[Any]) -> bool:
    return any(key in fields_of(type(part)) and getattr(part, key) == value for part in parts)


def _reads(kind: type[PretrainedConfig], key: str) -> bool:
    """Whether a class of configs sets the field by itself or takes it by its name, or the code of its models looks at it."""
    with contextlib.suppress(
        ValueError, TypeError, StrictDataclassError
    ):  # some cannot be made of nothing
        if key in vars(kind()):
            return True
    for base in kind.__mro__:
        if base.__name__ == "PreTrainedConfig":
            break
        functions: list[Any] = [vars(base).get(name) for name in ("__init__", "__post_init__")]
        if any(key in _words(f.__code__) for f in functions if hasattr(f, "__code__")):
            return True
    if "rope_parameters" in fields_of(kind):
        code = kind.convert_rope_params_to_dict.__code__  # names of before
        if key in _words(code):
            return True
    module = kind.__module__.replace(".configuration_", ".modeling_")
    found = importlib.util.find_spec(module) if module != kind.__module__ else None
    if found is None or found.origin is None:
        return False
    word = re.escape(key)
    text = Path(found.origin).read_text(encoding="utf-8")
    return re.search(rf"(?<!\w)config\.{word}\b|(?<!\w)config, [\"']{word}[\"']", text) is not None


def _words(code: CodeType) -> Iterator[str]:
    """The texts that a function holds."""
    for value in code.co_consts:
        if isinstance(value, str):
            yield value
        elif isinstance(value, tuple):
            yield from (each for each in value if isinstance(each, str))
