"""Text to batches, on the data party: tokenise, truncate, pad, mark what is private."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vflair_core.defense import Batch
from vflair_core.errors import TaskError
from vflair_core.task import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer on public text; it begins every text with ``<bos>``.

    Raises:
        TaskError: There is no text, or the vocabulary cannot hold the 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, BOS, EOS]
    if not texts:
        raise TaskError("A tokenizer cannot be trained without public text: this task has none.")
    if vocab_size < 256 + len(special):
        raise TaskError(
            f"model.vocab_size is {vocab_size}; it must be at least {256 + len(special)}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, cls_token=BOS
    )


def encode(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    kind: str,
    max_length: int,
    change: Callable[[str], str] = lambda text: text,
) -> Batch:
    """Return input_ids and attention_mask (B, T), right-padded, with labels by the task's kind.

    For ``causal-lm`` the labels are the ids that are sent, -100 on padding; otherwise they are (B,). `change`
    is applied to each text first.

    Raises:
        TaskError: The kind cannot be encoded.
    """
    rows = [
        tokenizer(change(e.text), truncation=True, max_length=max_length)["input_ids"]
        for e in examples
    ]
    longest = max(len(row) for row in rows)
    pad = tokenizer.pad_token_id
    if pad is None:
        raise TaskError("The tokenizer has no padding token: set tokenizer.pad_token first.")
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])  # (B, T)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    match kind:
        case "causal-lm":
            labels = ids.masked_fill(mask == 0, IGNORED)
        case "classification":
            labels = torch.tensor([example.label for example in examples])
        case "regression":
            labels = torch.tensor([float(example.label or 0.0) for example in examples])
        case _:
            raise TaskError(
                f"Examples of kind {kind!r} cannot be encoded yet. "
                "Possible: causal-lm, classification, regression."
            )
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def private_positions(
    tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int
) -> tuple[Tensor, Tensor]:
    """Return the token ids of an example (T,) and which of them are private (T,): never special tokens.

    Raises:
        TaskError: The tokenizer is not a fast one, so it cannot say where in the text a token stands.
    """
    if not tokenizer.is_fast:
        raise TaskError(
            "Private spans need a fast tokenizer, which knows where in the text a token stands."
        )
    encoded = tokenizer(
        example.text,
        truncation=True,
        max_length=max_length,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    spans = ((0, len(example.text)),) if example.private is None else example.private
    private = [
        not special and any(start < right and left < end for left, right in spans)
        for (start, end), special in zip(
            encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True
        )
    ]
    return torch.tensor(encoded["input_ids"]), torch.tensor(private)


def shuffled(count: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield row numbers in batches of `size`, pass after pass, each pass in a new order."""
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, size):
            yield order[start : start + size]
