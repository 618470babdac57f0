"""Text in, text out: what the data party does around the model when it is given text instead of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vflair_core.errors import DefenseError
from vflair_core.tasks.collation import Batch
from vflair_core.tasks.preprocessor import Preprocessor
from vflair_core.tasks.tokenization import InputFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vflair_core.parties.data_party.party import DataParty
    from vflair_core.tasks.task import Example


def reader_of(party: DataParty, max_length: int) -> Preprocessor:
    """Return what reads examples for `party`, through its defenses."""
    reading = party.reading
    if reading is None:
        kind: Any = "causal-lm" if party.task_kind == "*" else party.task_kind
        reading = InputFormat(kind=kind, two_stacks=bool(party.model.config.is_encoder_decoder))
    return Preprocessor(_needed_tokenizer(party), reading, max_length, party.defenses)


def encode_examples(party: DataParty, examples: Sequence[Example], max_length: int) -> Batch:
    """Turn examples into a batch, through the defenses that act on text and tokens."""
    return reader_of(party, max_length).batch(examples).batch


def ask(party: DataParty, texts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """Generate an answer to each text, through the defenses that act on text, tokens and answers."""
    tokenizer, model = _needed_tokenizer(party), party.model
    defended = [party.defenses.text(text) for text in texts]
    side = "right" if model.config.is_encoder_decoder else "left"
    batch = dict(tokenizer(defended, return_tensors="pt", padding=True, padding_side=side))
    batch = party.defenses.tokens({key: batch[key] for key in ("input_ids", "attention_mask")})
    generate: Any = model.generate
    ids = generate(**batch, **{"pad_token_id": tokenizer.pad_token_id, **options})
    new = ids if model.config.is_encoder_decoder else ids[:, batch["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(new, skip_special_tokens=True)
    pairs = zip(texts, answers, strict=True)
    return [party.defenses.answer(prompt, answer) for prompt, answer in pairs]


def _needed_tokenizer(party: DataParty) -> PreTrainedTokenizerBase:
    if party.tokenizer is None:
        raise DefenseError("Text needs a tokenizer: split(model, partition, tokenizer=...).")
    return party.tokenizer
