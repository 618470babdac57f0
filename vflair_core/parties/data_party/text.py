"""Text in, text out: what the data party does around the model when it is given text instead of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vflair_core.defenses.pipeline import Defenses
from vflair_core.errors import DefenseError
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
    """Generate an answer to each text, or several in turn, through the defenses that act on text, tokens and answers."""
    check_texts(texts, "ask")
    if options.get("return_dict_in_generate"):
        raise DefenseError(
            "ask returns texts, and return_dict_in_generate asks for more: encode the texts and call data_party.model.generate."
        )
    if not texts:
        return []
    defended = [defenses.text(text) for text in texts]
    side = "right" if model.config.is_encoder_decoder else "left"
    encoded = dict(tokenizer(defended, return_tensors="pt", padding=True, padding_side=side))
    batch = Batch({key: encoded[key] for key in ("input_ids", "attention_mask")})
    batch = defenses.tokens(batch).to(model.device)
    batch.owned_by(tuple((Owner(Example(text).identity),) for text in texts))
    settled: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, **options}
    if "stop_strings" in settled:
        settled.setdefault("tokenizer", tokenizer)
    ids = model.generate(**batch, **settled)
    new = ids if model.config.is_encoder_decoder else ids[:, batch["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(new, skip_special_tokens=True)
    asked = [text for text in texts for _ in range(len(answers) // len(texts))]
    return [defenses.answer(text, answer) for text, answer in zip(asked, answers, strict=True)]


def check_texts(texts: Sequence[str], called: str) -> None:
    """See that `texts` are several texts, and not one, whose letters would each be taken for one.

    Raises:
        DefenseError: They are one text, or something else.
    """
    if isinstance(texts, str):
        raise DefenseError(f'{called} takes several texts: {called}(["…"]), not {called}("…").')
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise DefenseError(
                f"{called} takes texts, and number {number} of those given is a {type(text).__name__}."
            )


def check_examples(examples: Sequence[Example]) -> None:
    """See that `examples` are some, each an `Example`.

    Raises:
        DefenseError: There is none, or one is something else.
    """
    if isinstance(examples, (str, Example)) or not len(examples):
        raise DefenseError("encode takes one example or more, in a list: encode([Example(text)]).")
    for number, example in enumerate(examples):
        if not isinstance(example, Example):
            raise DefenseError(
                f"encode takes examples, and number {number} of those given is a {type(example).__name__}: "
                "encode([Example(text)])."
            )
