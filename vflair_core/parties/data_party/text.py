"""Text in, text out: what the data party does around the model when it is given text instead of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vflair_core.defenses.pipeline import Defenses
from vflair_core.tasks.collation import Batch, Owner
from vflair_core.tasks.task import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def answer_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    defenses: Defenses,
    texts: Sequence[str],
    options: Mapping[str, Any],
) -> list[str]:
    """Generate an answer to each text, through the defenses that act on text, tokens and answers."""
    defended = [defenses.text(text) for text in texts]
    side = "right" if model.config.is_encoder_decoder else "left"
    encoded = dict(tokenizer(defended, return_tensors="pt", padding=True, padding_side=side))
    batch = Batch({key: encoded[key] for key in ("input_ids", "attention_mask")})
    batch = defenses.tokens(batch).to(model.device)
    batch.owned_by(tuple((Owner(Example(text).identity),) for text in texts))
    ids = model.generate(**batch, **{"pad_token_id": tokenizer.pad_token_id, **options})
    new = ids if model.config.is_encoder_decoder else ids[:, batch["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [defenses.answer(text, answer) for text, answer in zip(texts, answers, strict=True)]
