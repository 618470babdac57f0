"""A tokenizer from public text, for models that start at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vflair_core.errors import TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


BOS, EOS, PAD, SEP = "<bos>", "<eos>", "<pad>", "<sep>"


def train_tokenizer(
    texts: Sequence[str], vocab_size: int, *, pairs: bool = False, image_token: str = ""
) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer on public text; it begins every text with ``<bos>``.

    Args:
        texts: The public text.
        vocab_size: Entries, special tokens included.
        pairs: Put ``<sep>`` between two texts.
        image_token: A further special token that stands for a picture.

    Raises:
        TaskError: There is no text, or the vocabulary cannot hold the 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, BOS, EOS, *([SEP] if pairs else []), *([image_token] if image_token else [])]
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
        single=f"{BOS} $A",
        pair=f"{BOS} $A {SEP} $B:1" if pairs else f"{BOS} $A $B:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in [BOS, *([SEP] * pairs)]],
    )
    named: dict[str, Any] = {"sep_token": SEP} if pairs else {}
    if image_token:
        named["additional_special_tokens"] = [image_token]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, cls_token=BOS,
        **named,
    )  # fmt: skip
