"""Trainers that read the output layer's weights for themselves, where these are the model party's (HT).

TRL's trainers replace the model's forward: called with ``fused_lm_head=True``, it runs the backbone and multiplies by the
output layer's weights, to save memory. In HT the weights are not here; the logits are, so the same is computed of them.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vflair_core.parties.data_party.stubs import ModuleStub


def by_logits(model: PreTrainedModel, fused: Any) -> Any:
    """Return what should take the place of the forward that a trainer sets on `model`: it answers from the logits.

    Where the model holds its output layer, or the forward is another one, that is the forward itself.
    """
    function = getattr(fused, "__func__", None)
    output = getattr(function, "__globals__", {}).get("FusedCausalLMOutput")
    held = not isinstance(model.get_output_embeddings(), ModuleStub)
    if output is None or held:
        return fused

    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **options: Any,
    ) -> Any:
        own = type(self).forward
        if not fused_lm_head or labels is shift_labels is None:
            given = {
                "labels": labels,
                "shift_labels": shift_labels,
                "num_items_in_batch": num_items_in_batch,
            }
            return own(self, *args, **{k: v for k, v in given.items() if v is not None}, **options)
        outputs = own(self, *args, **{**options, "use_cache": False})
        logits, targets = outputs.logits, shift_labels
        if targets is None:
            assert labels is not None
            logits, targets = logits[:, :-1], labels[:, 1:]
        return output(
            **scores(logits, targets, num_items_in_batch),
            aux_loss=getattr(outputs, "aux_loss", None),
        )

    return types.MethodType(forward, model)


def scores(logits: Tensor, targets: Tensor, count: Any) -> dict[str, Tensor]:
    """What is wanted of the distribution of each next token, zero where there is nothing to predict.

    Args:
        logits: (B, T, V).
        targets: The token that comes next, -100 where it does not count: (B, T).
        count: By what the loss is divided; None for the number of targets that count.

    Returns:
        ``loss``, and of each position (B, T): ``log_probs`` of the target, ``entropy`` in nats, ``log_sum_sq_probs``,
        ``mean_logits``, ``is_top1``, ``label_mask``. Only the first three have gradients.
    """
    mask = targets != -100
    logs = torch.log_softmax(logits.float(), -1)
    found = logs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    each = {
        "log_probs": found,
        "entropy": -(logs.exp() * logs).sum(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * logs.detach(), -1),
        "mean_logits": logits.detach().float().mean(-1),
        "is_top1": logits.argmax(-1) == targets,
    }
    each = {name: value.masked_fill(~mask, 0) for name, value in each.items()}
    total = mask.sum().clamp(min=1) if count is None else count
    return {"loss": -each["log_probs"].sum() / total, **each, "label_mask": mask}
