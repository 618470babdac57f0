"""The model's forward, led through the data party; all else of the model stays its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from vflair_core.errors import PartitionError

# Takes the original forward and its arguments by name.
Run = Callable[[Callable[..., Any], dict[str, Any]], Any]


def hand_over_forward(model: PreTrainedModel, run: Run) -> PreTrainedModel:
    """Give the model a class of its own whose forward is handed to `run`; all else stays inherited."""
    original = type(model)
    forward = _through(original, run)

    def save_pretrained(_self: Any, *_: Any, **__: Any) -> None:
        raise PartitionError(
            f"This {original.__name__} holds half of the weights, so it cannot be saved as a whole one. Use "
            "data_party.save(folder) and model_party.save(folder); `vflair merge` joins what they wrote."
        )

    members = {"forward": forward, "save_pretrained": save_pretrained, "__module__": __name__}
    model.__class__ = type(original.__name__, (original,), members)
    return model


def hand_over_parts(model: PreTrainedModel, absent: Sequence[str], run: Run) -> None:
    """The same for the models inside it that were cut: `generate` may call one of them by itself."""
    for name, part in model.named_modules():
        cut = any(module.startswith(f"{name}.") for module in absent)
        if cut and isinstance(part, PreTrainedModel) and part is not model:
            _hand_over_part(part, run)


def _hand_over_part(part: PreTrainedModel, run: Run) -> None:
    original = type(part)
    forward = _through(original, run)
    # Under the very name of the original: transformers finds what it records of a class by that.
    members = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    part.__class__ = type(original.__name__, (original,), {**members, "forward": forward})


def _through(original: Any, run: Run) -> Callable[..., Any]:
    """A forward that hands the original one and its arguments by name to `run`."""
    names = [name for name in inspect.signature(original.forward).parameters if name != "self"]

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(zip(names, args, strict=False)) | kwargs
        return run(functools.partial(original.forward, self), inputs)

    return forward


def token_tables(model: PreTrainedModel) -> list[nn.Module]:
    """The embedding of tokens, under all its names: encoder and decoder may have one each."""
    try:
        table: Any = model.get_input_embeddings()
    except NotImplementedError:  # hashes of characters, for example
        return []
    if not isinstance(table, nn.Module):  # latent states that read the text, for example
        return []
    tables = list(table) if isinstance(table, nn.ModuleList) else [table]  # one for each codebook
    weights = {id(weight) for part in tables for weight in part.parameters()}
    every = (part for part in model.modules() if isinstance(part, nn.Embedding))
    return tables + [part for part in every if id(part.weight) in weights and part not in tables]


def check_trainable(model: PreTrainedModel) -> None:
    """See that a training step calls every block.

    Raises:
        PartitionError: The model leaves out blocks at random.
    """
    for name, module in model.named_modules():
        if getattr(module, "layerdrop", None):
            raise PartitionError(
                f"{name or 'the model'}.layerdrop is {module.layerdrop}: it leaves out blocks at random, and the "
                "model party runs all of its blocks or none. Set it to 0 to train."
            )
