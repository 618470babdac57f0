"""Random pictures for models that take them, and the tokens that stand for a picture in a text."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

PLACE = 3  # where in a text a picture stands: after the padding


def with_picture(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `batch` with one picture a text, given the first way that the model accepts.

    Raises:
        ValueError: There is none; the message says what was wrong with each.
    """
    takes = set(inspect.signature(model.forward).parameters)
    reasons = []
    for pixels in _pixels(model, takes, len(batch["input_ids"])):
        try:
            filled = _filled(model, takes, batch, pixels)
            with torch.no_grad():
                model.eval()(**filled)
        except Exception as error:  # noqa: BLE001 - a model may complain in any way
            reasons.append(f"{ {k: tuple(v.shape) for k, v in pixels.items()} }: {error!r}")
        else:
            return filled
    raise ValueError("\n".join(reasons))


def _filled(
    model: PreTrainedModel, takes: set[str], batch: dict[str, Tensor], pixels: dict[str, Tensor]
) -> dict[str, Tensor]:
    token = _image_token(model.config)
    if "input_ids" not in takes:  # the picture is all it reads
        return {**{key: batch[key] for key in batch if key == "labels"}, **pixels}
    if token is None:
        return {**batch, **pixels, **_places(takes, batch["input_ids"])}
    count = _tokens(model, {**batch, **pixels}, len(batch["input_ids"]))
    fills = {"input_ids": token, "attention_mask": 1, "labels": -100}
    longer = {
        key: _inserted(value, fills[key], count)
        if key in fills and value.shape == batch["input_ids"].shape
        else value
        for key, value in batch.items()
    }
    kinds = (longer["input_ids"] == token).long()
    extra = {name: kinds for name in ("mm_token_type_ids", "token_type_ids") if name in takes}
    return {**longer, **extra, **pixels}


def _image_token(config: Any) -> int | None:
    for name in ("image_token_id", "image_token_index", "image_patch_id"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def _pixels(model: PreTrainedModel, takes: set[str], rows: int) -> list[dict[str, Tensor]]:
    """Return the ways pictures are given to models, the likeliest first."""
    generator = torch.Generator().manual_seed(3)
    vision = _vision(model.config)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    patch = getattr(vision, "patch_size", 14)
    patch = patch if isinstance(patch, int) else 14
    if "flattened_patches" in takes:
        patches = torch.rand(rows, 4, vision.patch_embed_hidden_size, generator=generator)
        return [{"flattened_patches": torch.cat([torch.ones(rows, 4, 2), patches], dim=-1)}]
    side = getattr(vision, "image_size", 28)
    side = side if isinstance(side, int) else side[0]
    picture = torch.rand(rows, channels, side, side, generator=generator)
    sizes = {"image_sizes": torch.tensor([[side, side]] * rows)}
    tiles = picture[:, None].repeat(1, 2, 1, 1, 1)
    ways = [{"pixel_values": picture}, {"pixel_values": picture, **sizes}]
    ways += [{"pixel_values": picture[:, None]}, {"pixel_values": tiles, **sizes}]
    for name in {"image_grid_thw", "grid_thw", "image_grid_hws"} & takes:
        merge = getattr(vision, "spatial_merge_size", None) or 2
        edge, depth = 2 * merge, getattr(vision, "temporal_patch_size", 1)
        size = channels * depth * patch * patch
        values = torch.rand(rows * edge * edge, size, generator=generator)
        flat = {"pixel_values": values, name: torch.tensor([[1, edge, edge]] * rows)}
        square = values[:, : channels * patch * patch].unflatten(1, (channels, patch, patch))
        ways = [flat, {**flat, "pixel_values": square}, *ways]
    return [way for way in ways if set(way) <= takes]


def _vision(config: Any) -> Any:
    for name in ("vision_config", "encoder"):
        part = getattr(config, name, None)
        if part is not None:
            return getattr(part, "vision_config", part)
    return config


def _tokens(model: PreTrainedModel, inputs: dict[str, Tensor], rows: int) -> int:
    """How many tokens stand for one picture: as many as the model makes features of it."""
    whole = getattr(model, "model", model)
    owner = model if hasattr(model, "get_image_features") else whole
    known = set(inspect.signature(owner.get_image_features).parameters)
    given = {name: value for name, value in inputs.items() if name in known - {"input_ids"}}
    with torch.no_grad():
        features = owner.eval().get_image_features(**given)
    features = getattr(features, "pooler_output", features)
    if isinstance(features, list | tuple):
        return math.prod(features[0].shape[:-1])
    return math.prod(features.shape[:-1]) // rows


def _inserted(values: Tensor, fill: int, count: int) -> Tensor:
    middle = values.new_full((len(values), count), fill)
    return torch.cat([values[:, :PLACE], middle, values[:, PLACE:]], dim=1)


def _places(takes: set[str], words: Tensor) -> dict[str, Tensor]:
    """Return the masks of models whose pictures have no token of their own."""
    rows, positions = words.shape
    masks = {
        "image_attention_mask": torch.ones(rows, positions, 1, dtype=torch.long),
        "image_embeds_position_mask": (torch.arange(positions) // 4 == 1).expand(rows, -1),
    }
    return {name: mask for name, mask in masks.items() if name in takes}
