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


@frozen(eq=False)
class Span:
    """An orthonormal basis (K, D) of the inputs of one layer; `module` is the layer's name.

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


def span_of(
    update: Mapping[str, Tensor], model: torch.nn.Module, block: int, tolerance: float
) -> Span | None:
    """Return what block number `block` says of its inputs, or None if its attention is not among the updates.

    Singular values below `tolerance` times the largest count as zero.

    Raises:
        AttackError: The gradient is that of a LoRA matrix A before the first step.
    """
    for name, gradient in update.items():
        module = re.sub(r"(\.lora_A\.[^.]+)?\.weight$", "", name)
        number = re.search(r"\.(\d+)\.", name)
        if number is None or int(number.group(1)) != block or module == name:
            continue
        if module.rpartition(".")[2] not in LAYERS or ".lora_B." in name:
            continue
        if not bool(gradient.any()):
            raise AttackError(
                f"The gradient of {name} is zero. LoRA starts with B = 0, so at step 0 its A has no gradient: "
                "attack after at least one step (train.steps)."
            )
        whole = isinstance(model.get_submodule(module), Conv1D) and ".lora_A." not in name
        rows = (gradient.T if whole else gradient).double()  # (…, D); Conv1D holds (in, out)
        _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
        return Span(module, right[: int((sizes > tolerance * sizes[0]).sum())])
    return None


def inputs_of(head: Any, module: str, ids: Tensor, **options: Any) -> Tensor:
    """Return what goes into a layer of the head for tokens (B, T): (B, T, D)."""
    caught: list[Tensor] = []
    layer = head.party.model.get_submodule(module)
    handle = layer.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        with torch.no_grad():
            head(ids, **options)
    finally:
        handle.remove()
    return caught[-1]
