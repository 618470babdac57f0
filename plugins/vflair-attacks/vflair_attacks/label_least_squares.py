"""Solve for the labels behind the summed gradient of the output layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from vflair_core import AttackError, Guess


@frozen
class LabelLeastSquares:
    """From ∇W = Σ_b (p_b − y_b) h_bᵀ and known states h_b, take argmax_c of p − ∇W·pinv(h) for each row b.

    The analytic form of label recovery from the last layer's gradient; Zhao et al., "iDLG", arXiv 2001.02610, for
    one row. Observable only where parties share the gradients of their tails (`updates`): vflair itself sends
    none. Rows are the positions of all examples of an update, so it ends where they reach the rank of the states (LayerNorm
    takes one off the width).

    The output layer is found by its name in the model; its input is what the tail computes from `returned`. Where it is tied
    to the input embeddings, an update holds the sum of both gradients. That of the inputs is left in and moves only the
    rows of tokens that the text has: by little in a trained model, whose last states are long, by more in a random one.
    """

    def __call__(
        self,
        updates: Sequence[Mapping[str, Tensor]],
        returned: Tensor,  # (N, T, D)
        lengths: Tensor,  # (N,)
        partition: Any,
        task_kind: str,
        tail: Any,
    ) -> Guess:
        """Return tokens (N, T) of a causal language model, or labels (N,)."""
        name, layer = _output_layer(tail)
        tokens = torch.full(returned.shape[:2], -1)
        labels = torch.zeros(len(returned), dtype=torch.long)
        size = len(lengths) // len(updates)
        for update, several in zip(updates, torch.arange(len(lengths)).split(size), strict=True):
            gradient = _gradient_of(name, layer, tail, update)
            # Of a text every token but the first is a label; of a class the last position knows all.
            rows = slice(-1) if task_kind == "causal-lm" else slice(-1, None)
            came = [returned[n : n + 1, : lengths[n]].to(tail.device) for n in several]
            each = [_around(layer, tail, states, rows) for states in came]
            states, scores = (torch.cat(parts) for parts in zip(*each, strict=True))
            found = _solve(gradient.to(tail.device), states, scores).argmax(-1)
            for n, part in zip(several, found.split([len(s) for s, _ in each]), strict=True):
                if task_kind == "causal-lm":
                    tokens[n, 1 : lengths[n]] = part
                else:
                    labels[n] = part[0]
        return Guess(tokens=tokens) if task_kind == "causal-lm" else Guess(labels=labels)


def _gradient_of(
    name: str, layer: torch.nn.Module, tail: Any, update: Mapping[str, Tensor]
) -> Tensor:
    """Return the gradient of the output layer, under its own name or that of a layer it shares its weight with."""
    tied = [n for n, m in tail.named_modules() if getattr(m, "weight", None) is layer.weight]
    for each in (name, *tied):
        if f"{each}.weight" in update:
            return update[f"{each}.weight"]
    raise AttackError(
        f"label-least-squares needs the gradient of {name}.weight, which is not among the updates: "
        "train the task head itself (train.trainable), not adapters elsewhere."
    )


def _solve(gradient: Tensor, states: Tensor, scores: Tensor) -> Tensor:  # (V, D), (B, D), (B, V)
    """Return what is left for the one-hot labels, (B, V); the loss is the mean over the B rows."""
    found = gradient.double() @ torch.linalg.pinv(states.double()) * len(states)  # (V, B), p − y
    return scores.double().softmax(-1) - found.T


def _around(
    layer: torch.nn.Module, tail: Any, returned: Tensor, rows: slice
) -> tuple[Tensor, Tensor]:
    """Return what goes into the output layer and what comes out at some rows: (B, D) and (B, V)."""
    caught: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(
        lambda _, inputs, output: caught.append((inputs[0], output))
    )
    try:
        with torch.no_grad():
            tail(returned)
    finally:
        handle.remove()
    states, scores = caught[-1]
    return states.flatten(0, -2)[rows], scores.flatten(0, -2)[rows]


def _output_layer(tail: Any) -> tuple[str, torch.nn.Module]:
    """The last linear layer outside the blocks: the language-model head or the classifier."""
    layers = [(n, m) for n, m in tail.named_modules() if isinstance(m, torch.nn.Linear)]
    for name, module in reversed(layers):
        if name.rpartition(".")[2] in ("lm_head", "score", "classifier", "decoder", "out_proj"):
            return name, module
    raise AttackError(
        "The tail has no output layer of a known name (lm_head, score, classifier, …)."
    )
