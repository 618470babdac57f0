"""Whether a cut model computes what the whole one does."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from vflair_core.defenses.defense import Defense
    from vflair_core.partition.partition import Partition

ROUNDING = 1e-5  # gradients are summed in another order where a weight is used on both sides


def assert_split_equals(
    model: PreTrainedModel,
    partition: Partition,
    batch: Mapping[str, Tensor],
    *,
    defenses: Sequence[Defense] = (),
    **options: Any,
) -> None:
    """See that a model and its two halves give the same logits and loss bit for bit, the same gradients, the same words.

    Messages go through the codec, as they would between machines. Gradients are compared with a training pass under equal
    random states, so dropout is drawn alike.

    Args:
        model: Stays as it is; a copy is cut.
        partition: The cut.
        batch: What the model is called with, labels included.
        defenses: Of the data party; an equal model means that they are switched off.
        options: Of `split`.

    Raises:
        AssertionError: They differ; it says in what.
        ValueError: The batch has no labels, or no weight is trained.
        PartitionError: The model cannot be cut like this.
    """
    from vflair_core.parties.split import split
    from vflair_core.parties.verify import compare, tokens_equal

    if not {"labels", "start_positions"} & batch.keys():
        raise ValueError(
            "The batch has no labels, and without a loss there is no gradient: give it labels."
        )
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError("No weight of the model is trained, so there is no gradient to compare.")
    whole, called = copy.deepcopy(model), f"{type(model).__name__} cut {partition}"
    party, model_party = split(
        copy.deepcopy(model),
        partition,
        defenses=list(defenses),
        wire=True,
        **{"seed": 0, **options},
    )
    with torch.random.fork_rng():
        logits, loss, gradient = compare(whole, party, model_party, batch)
        if not logits:
            raise AssertionError(f"{called}: its logits are not those of the whole model.")
        if not loss:
            raise AssertionError(f"{called}: its loss is not that of the whole model.")
        if gradient > ROUNDING:
            raise AssertionError(
                f"{called}: its gradients differ from the whole model's by {gradient:.2g} of the largest entry."
            )
        if model.can_generate() and not tokens_equal(whole, party, batch):
            raise AssertionError(f"{called}: it writes other tokens than the whole model.")
