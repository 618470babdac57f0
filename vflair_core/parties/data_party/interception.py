"""The model's forward, led through the data party; all else of the model stays its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from vflair_core.errors import PartitionError
from vflair_core.parties.data_party.fused_heads import by_logits
from vflair_core.parties.data_party.stubs import ModuleStub

# Takes the original forward and its arguments by name.
Run = Callable[[Callable[..., Any], dict[str, Any]], Any]


def hand_over_forward(
    model: PreTrainedModel,
    run: Run,
    generating: Callable[[dict[str, Any]], AbstractContextManager[None]],
    adapted: Callable[[], None],
) -> PreTrainedModel:
    """Give the model a class of its own whose forward is handed to `run`; all else stays inherited.

    `generating` is told of every `generate`, for as long as it lasts; `adapted`, whenever peft has put adapters in.
    """
    original: Any = type(model)
    forward = _through(original, run)

    def resize_token_embeddings(
        self: Any,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        table = self.get_input_embeddings()
        if not isinstance(self.get_output_embeddings(), ModuleStub):
            wanted = (new_num_tokens, pad_to_multiple_of)
            return original.resize_token_embeddings(self, *wanted, *args, **options)
        if pad_to_multiple_of is None and new_num_tokens in (None, table.weight.shape[0]):
            return table
        raise PartitionError(
            f"The output layer of this {original.__name__} is the model party's, and must grow with the embeddings. "
            "Resize them before the model is cut: model.resize_token_embeddings(n), then split(model, ...)."
        )

    def __setattr__(self: Any, name: str, value: Any) -> None:  # noqa: N807 - it becomes one
        original.__setattr__(self, name, by_logits(self, value) if name == "forward" else value)
        if name == "peft_config":  # which peft sets last
            adapted()

    members = {
        "forward": forward,
        "__setattr__": __setattr__,
        "resize_token_embeddings": resize_token_embeddings,
        "__module__": __name__,
        **_refused(original),
    }
    if isinstance(model, GenerationMixin):

        @functools.wraps(original.generate)
        def generate(self: Any, inputs: Any = None, *args: Any, **options: Any) -> Any:
            given = {"input_ids": inputs} if inputs is not None else options
            with generating(given):
                return original.generate(self, inputs, *args, **options)

        members["generate"] = generate
    model.__class__ = type(original.__name__, (original,), members)
    return model


def _refused(original: Any) -> dict[str, Any]:
    """What a whole model can do and half of one cannot: methods that say what to do instead."""

    def save_pretrained(_self: Any, *_: Any, **__: Any) -> None:
        raise PartitionError(
            f"This {original.__name__} holds half of the weights, so it cannot be saved as a whole one. Use "
            "data_party.save(folder) and model_party.save(folder); `vflair merge` joins what they wrote."
        )

    def load_adapter(_self: Any, *_: Any, **__: Any) -> None:
        raise PartitionError(
            f"This {original.__name__} holds half of the layers, so half of an adapter would be lost. Use "
            "load_adapter(data_party, model_party, folder)."
        )

    def __deepcopy__(_self: Any, _memo: Any) -> None:  # noqa: N807 - it becomes one
        raise PartitionError(
            f"A copy of this {original.__name__} would have half a model and no session of its own. Copy the whole model "
            "before it is cut; for a frozen copy in training, cut a second one, or use adapters and switch them off."
        )

    return {
        "save_pretrained": save_pretrained,
        "load_adapter": load_adapter,
        "__deepcopy__": __deepcopy__,
    }


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

    return torch.compiler.disable(forward, reason="what crosses the cut is no graph of one process")  # type: ignore[no-any-return]


def token_tables(model: PreTrainedModel) -> list[nn.Module]:
    """What makes embeddings of tokens, as it is now: an adapter around a table and not the table in it.

    Encoder and decoder may have one each, or share one under two names.
    """
    tables: list[nn.Module] = []
    for stack in (model, *_stacks_of(model)):
        try:
            table: Any = stack.get_input_embeddings()
        except (NotImplementedError, AttributeError):  # hashes of characters, for example
            continue
        parts = table if isinstance(table, nn.ModuleList) else [table]  # one for each codebook
        # What is no module: latent states that read the text, for example.
        tables += [part for part in parts if isinstance(part, nn.Module) and part not in tables]
    weights = {id(weight) for part in tables for weight in part.parameters()}
    inside = {id(inner) for table in tables for inner in table.modules()}
    every = (part for part in model.modules() if isinstance(part, nn.Embedding))
    return tables + [p for p in every if id(p.weight) in weights and id(p) not in inside]


def _stacks_of(model: PreTrainedModel) -> list[Any]:
    if not model.config.is_encoder_decoder:
        return []
    return [stack for stack in (model.get_encoder(), model.get_decoder()) if stack is not None]


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
