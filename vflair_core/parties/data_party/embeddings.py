"""What goes into the first block, defended: at the tables of words as they are in a call, adapters included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from vflair_core.parties.data_party.interception import token_tables

GIVEN = ("inputs_embeds", "decoder_inputs_embeds")  # instead of words, as prompt tuning does


@contextmanager
def defending_embeddings(
    model: PreTrainedModel, inputs: dict[str, Any], defended: Callable[[Tensor], Tensor]
) -> Iterator[dict[str, Any]]:
    """While this lasts, what `model` makes of words goes through `defended`; yield `inputs` with embeddings that did.

    The hooks are of this call only: a table may be replaced, adapted or copied between two calls.
    """

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return defended(output)

    hooks = [table.register_forward_hook(hook) for table in token_tables(model)]
    try:
        given = [name for name in GIVEN if inputs.get(name) is not None]
        yield inputs | {name: defended(inputs[name]) for name in given}
    finally:
        for handle in hooks:
            handle.remove()
