"""Small configs of any model type, by rules on the names of their options: no per-model code."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from sizes import BLOCKS, EOS, HEAD_WIDTH, HEADS, LABELS, ODD, ODD_PARTS, PAD, VOCABULARY, small
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FIRST_WORD, LAST_WORD = 3, 63  # ordinary words; above lie the special tokens of a model
SPECIAL = re.compile(r".*token_(id|index)|.*_token|im_.*_id|image_.*_id|.*_bos_id|.*_eos_id")
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers")
INDICES = re.compile(r".*(layers|idxs|indexes|indices|layer_ids)")


def small_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """Build the config of `model_type` with everything that makes it large made small.

    Args:
        model_type: As in ``config.json``.
        overrides: Options of the outermost config that are to be as given.
    """
    return _small(CONFIG_MAPPING[model_type], {}, {}, overrides)


def _small(
    cls: type[PreTrainedConfig],
    given: Mapping[str, Any],
    tokens: dict[str, int],
    overrides: Mapping[str, Any],
) -> PreTrainedConfig:
    """Make a small `cls`; `given` is what a larger config sets of it, `tokens` the special tokens so far."""
    raw = {**_defaults(cls), **given}
    default = _instance(cls, raw)
    values: dict[str, Any] = {"num_labels": LABELS}
    for name, value in raw.items():
        part = vars(default).get(name) if default else _part(cls, name)
        if isinstance(part, PreTrainedConfig):
            spec = (cls.sub_configs_defaults or {}).get(name)
            own = (
                spec.init_kwargs
                if spec and spec.default_config.model_type == part.model_type
                else {}
            )
            constraints = ODD_PARTS.get(cls.model_type, {}).get(name, {})
            values[name] = _small(type(part), own, tokens, constraints)
        elif SPECIAL.fullmatch(name) and not re.fullmatch(r"(pad|bos|eos)_token_id", name):
            values[name] = _special(name, value, tokens)
        else:
            values[name] = small(name, value)
    if "kv_lora_rank" in raw and raw["kv_lora_rank"] and "num_key_value_heads" in raw:
        values["num_key_value_heads"] = HEADS  # latent attention has no groups
    if raw.get("is_encoder_decoder"):
        values.setdefault("decoder_start_token_id", PAD)
    told = ODD.get(cls.model_type, {}) | dict(overrides)
    values |= told
    values = {name: value for name, value in values.items() if value is not dataclasses.MISSING}
    config = cls(**values)
    missing = _missing(cls, config) | _kinds(default, config)
    return cls(**values | missing | told) if missing else config


def _missing(cls: type[PreTrainedConfig], config: PreTrainedConfig) -> dict[str, Any]:
    """Return what the config itself did not derive although its model needs it."""
    missing: dict[str, Any] = {}
    facts = vars(config)
    if "head_dim" in facts and facts["head_dim"] is None:
        missing["head_dim"] = HEAD_WIDTH
    if "num_key_value_heads" in facts and facts["num_key_value_heads"] is None:
        missing["num_key_value_heads"] = HEADS // 2
    sections = "mrope_section" in (getattr(cls, "ignore_keys_at_rope_validation", None) or ())
    if sections:
        missing["rope_parameters"] = _sections(facts["rope_parameters"])
    return missing


def _defaults(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the options of `cls` as declared: what is None is derived from the others."""
    skipped = {"id2label", "label2id", "dtype", "architectures", "transformers_version"}
    values = {}
    for field in dataclasses.fields(cls):
        made = field.default_factory is not dataclasses.MISSING
        value = field.default_factory() if made else field.default  # type: ignore[misc]
        if field.name not in skipped:
            values[field.name] = value
    return values


def _instance(cls: type[PreTrainedConfig], raw: Mapping[str, Any]) -> PreTrainedConfig | None:
    required = dataclasses.MISSING
    try:
        return cls(**{name: value for name, value in raw.items() if value is not required})
    except Exception:  # noqa: BLE001 - some defaults do not pass their own validation
        return None


def _part(cls: type[PreTrainedConfig], name: str) -> PreTrainedConfig | None:
    spec = (cls.sub_configs_defaults or {}).get(name)
    return None if spec is None or spec.optional else spec.default_config


def _special(name: str, value: Any, tokens: dict[str, int]) -> Any:
    """Give a special token that lies outside the small vocabulary (or has no number) one inside it."""
    if name in ("decoder_start_token_id", "forced_eos_token_id", "sep_token_id"):
        return value if value is None else {"sep_token_id": EOS}.get(name, PAD + 1)
    unknown = value is None and name.startswith("image_token")
    if isinstance(value, bool) or not (isinstance(value, int) or unknown):
        return value
    if not unknown and value <= EOS:
        return value
    return tokens.setdefault(name, VOCABULARY - 1 - len(tokens))


def _sections(rope: Any) -> dict[str, Any]:
    """Give rotary positions of three axes the parts of a small head."""
    rope = dict(rope or {"rope_type": "default", "rope_theta": 10000.0})
    half = int(HEAD_WIDTH * rope.get("partial_rotary_factor", 1.0)) // 2
    side = (half + 1) // 3
    return {**rope, "mrope_section": [side, side, half - 2 * side]}


def _kinds(default: PreTrainedConfig | None, config: PreTrainedConfig) -> dict[str, list[Any]]:
    """Return lists with an entry per block, so thinned that every kind of block occurs, where one is lost."""
    depth = (
        next((vars(default)[name] for name in DEPTHS if name in vars(default)), 0) if default else 0
    )
    if not isinstance(depth, int) or depth <= BLOCKS:
        return {}
    names = {field.name for field in dataclasses.fields(type(config))}
    lists = {
        name: list(value)
        for name, value in vars(default).items()
        if name in names and isinstance(value, list | tuple)
    }
    full = {name: value for name, value in lists.items() if len(value) == depth}
    places = {n: v for n, v in lists.items() if INDICES.fullmatch(n) and _are_places(v, depth)}
    for name in places:
        full.pop(name, None)
    blocks = [
        tuple(str(value[n]) for value in full.values()) + tuple(n in v for v in places.values())
        for n in range(depth)
    ]
    lost = any(
        len(set(map(str, vars(config).get(n) or ()))) < len(set(map(str, v)))
        for n, v in full.items()
    )
    wrong = any(len(vars(config).get(name) or ()) != BLOCKS for name in full)
    if not (lost or wrong or places):
        return {}
    chosen = _chosen(blocks)
    thinned = {name: [small(name, value[n]) for n in chosen] for name, value in full.items()}
    for name, value in places.items():
        thinned[name] = [position for position, n in enumerate(chosen) if n in value]
    return {n: type(vars(default)[n])(v) if n in lists else v for n, v in thinned.items()}


def _are_places(values: list[Any], depth: int) -> bool:
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    return (
        bool(values)
        and whole
        and sorted(set(values)) == values
        and 0 <= values[0] <= values[-1] < depth
    )


def _chosen(blocks: list[Any]) -> list[int]:
    """Numbers of `BLOCKS` blocks in order: one of each kind first, then the first ones."""
    firsts = [blocks.index(kind) for kind in dict.fromkeys(blocks)][:BLOCKS]
    others = [n for n in range(len(blocks)) if n not in firsts]
    return sorted(firsts + others[: BLOCKS - len(firsts)])
