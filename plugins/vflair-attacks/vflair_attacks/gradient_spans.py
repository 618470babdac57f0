"""What the gradient of a linear layer gives away: the span of the vectors that went into it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from vflair_core import AttackError

# Of the query alone, position 0 has no gradient: with one key its softmax is constant.
LAYERS = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "v_proj", "value")
BESIDE = ("q_proj", "k_proj", "query", "key")  # which have the same inputs as the values


@frozen(eq=False)
class Span:
    """An orthonormal basis (K, D) of the inputs of one layer, where its model is; `module` is the layer's name.

    For Y = XWᵀ + b, ∇W = (∂L/∂Y)ᵀX, so the rows of ∇W span the inputs whose output had a gradient
    (Petrov et al., arXiv 2405.15586).
    """

    module: str
    basis: Tensor

    @property
    def is_everything(self) -> bool:
        """Whether every vector lies in it, so that it tells nothing."""
        return len(self.basis) == self.basis.shape[1]

    def residual(self, vectors: Tensor) -> Tensor:  # (…, D)
        """Share of each vector that lies outside, in [0, 1]: (…). Zero (padding) is in every span: it counts as outside."""
        vectors = vectors.to(self.basis)
        size = vectors.norm(dim=-1)
        outside = (vectors - vectors @ self.basis.T @ self.basis).norm(dim=-1)
        return torch.where(size > 0, outside / size.clamp_min(1e-30), 1.0)


def span_of(update: Mapping[str, Tensor], head: Any, block: int, tolerance: float) -> Span | None:
    """Return what block number `block` says of its inputs, or None if its attention is not among the updates.

    Where values have a layer of their own, queries and keys see the same inputs and add what they know: values of few
    heads (grouped queries) have too few outputs to span many tokens. Singular values below `tolerance` times the
    largest count as zero.

    Raises:
        AttackError: The gradient is that of a LoRA matrix A before the first step.
    """
    there = {_layer_of(name): name for name in update if _block_of(name) == block}
    module = next((layer for layer in there if layer.rpartition(".")[2] in LAYERS), None)
    if module is None:
        return None
    if not bool(update[there[module]].any()):
        raise AttackError(
            f"The gradient of {there[module]} is zero. LoRA starts with B = 0, so at step 0 its A has no gradient: "
            "attack after at least one step (train.steps)."
        )
    parent = module.rpartition(".")[0]
    layers = [module, *(f"{parent}.{other}" for other in BESIDE if f"{parent}.{other}" in there)]
    rows = torch.cat([_rows(update[there[layer]], there[layer], head) for layer in layers])
    _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    basis = right[: int((sizes > tolerance * sizes[0]).sum())]
    return Span(module, basis.to(head.device))


def _block_of(name: str) -> int | None:
    """The number of the block whose layer has a weight, or a LoRA matrix A, of this name."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number.group(1)) if number and _layer_of(name) else None


def _layer_of(name: str) -> str:
    """The layer that a weight or a LoRA matrix A belongs to; nothing of biases and matrices B."""
    found = re.fullmatch(r"(.*?)(\.lora_A\.[^.]+)?\.weight", name)
    return found.group(1) if found and ".lora_B." not in name else ""


def _rows(gradient: Tensor, name: str, head: Any) -> Tensor:
    """The gradient with a row for each output, (…, D), the largest of them of length one."""
    whole = ".lora_A." not in name and isinstance(head.get_submodule(_layer_of(name)), Conv1D)
    rows = (gradient.T if whole else gradient).double()  # Conv1D holds (in, out)
    return rows / rows.norm(dim=1).max().clamp_min(1e-300)


def inputs_of(head: Any, module: str, ids: Tensor, **options: Any) -> Tensor:
    """Return what goes into a layer of the head for tokens (B, T): (B, T, D)."""
    caught: list[Tensor] = []
    layer = head.get_submodule(module)
    handle = layer.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        with torch.no_grad():
            head(ids, **options)
    finally:
        handle.remove()
    return caught[-1]
