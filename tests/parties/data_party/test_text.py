"""Text in, text out: defenses that act on text and tokens, and the batches they refuse."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from vflair_core import Batch, Defense, DefenseError, Example, Partition, Transcript, split
from vflair_core.errors import TaskError
from vflair_core.tasks.preprocessor import Preprocessor
from vflair_core.tasks.tokenizer_training import train_tokenizer
from vflair_core.testing import tiny_model

TEXTS = ["Ada Lovelace wrote the first program.", "Please call me at noon, said Ada."]
TOKENIZER = train_tokenizer(TEXTS * 3, 300)


class Redact(Defense):
    covers = frozenset({"prompt"})

    def on_text(self, fields):
        return {key: text.replace("Ada", "Someone") for key, text in fields.items()}

    def on_answer(self, prompt, answer):
        return f"[{prompt.split()[0]}] {answer}"


class LastTokenBlank(Defense):
    def on_tokens(self, batch):
        ids = batch["input_ids"].clone()
        ids[:, -1] = 7
        return {**batch, "input_ids": ids}


def party(*defenses):
    model = tiny_model("llama", vocab_size=len(TOKENIZER))
    return split(model, Partition(1, 1), defenses=defenses, tokenizer=TOKENIZER, seed=0)[0]


def test_encode_sends_the_changed_text_and_labels_are_the_ids_that_are_sent():
    ours, plain = party(Redact()), party()
    batch = ours.encode([Example(TEXTS[0])], max_length=64)
    changed = plain.encode([Example(TEXTS[0].replace("Ada", "Someone"))], max_length=64)
    assert torch.equal(batch["input_ids"], changed["input_ids"])
    assert torch.equal(batch["labels"], changed["input_ids"])


def test_a_batch_that_went_round_a_text_defense_is_refused():
    ours = party(Redact())
    raw = torch.tensor([TOKENIZER(TEXTS[0])["input_ids"]])
    with pytest.raises(DefenseError, match="Redact changes text before it is sent"):
        ours.model(raw)
    assert ours.model(**ours.encode([Example(TEXTS[0])])).loss > 0


def test_ask_generates_what_the_unsplit_model_generates():
    model = tiny_model("llama", vocab_size=len(TOKENIZER))
    whole = copy.deepcopy(model)
    ours, _ = split(model, Partition(1, 1), tokenizer=TOKENIZER)
    batch = TOKENIZER(TEXTS, return_tensors="pt", padding=True, padding_side="left")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": TOKENIZER.pad_token_id}
    ids = whole.generate(**inputs, **options)[:, batch["input_ids"].shape[1] :]
    answers = ours.ask(TEXTS, max_new_tokens=5, do_sample=False)
    assert answers == TOKENIZER.batch_decode(ids, skip_special_tokens=True)


def test_one_text_is_not_taken_for_as_many_as_it_has_letters():
    asking = party(Redact())
    for call in (asking.ask, asking.prepare):
        with pytest.raises(DefenseError, match="takes several texts"):
            call("Ada Lovelace wrote the first program.")
        with pytest.raises(DefenseError, match="number 1 of those given is a int"):
            call(["Ada", 3])
    assert not asking.crossed


def test_encode_says_what_it_takes():
    asking = party()
    for wrong in ([], "Ada", Example("Ada")):
        with pytest.raises(DefenseError, match="takes one example or more"):
            asking.encode(wrong)
    with pytest.raises(DefenseError, match="number 0 of those given is a str"):
        asking.encode(["Ada"])


def test_ask_takes_the_options_of_generate_or_says_which_it_does_not():
    asking = party(Redact())
    assert asking.ask([]) == []
    several = asking.ask(TEXTS, max_new_tokens=3, num_beams=2, num_return_sequences=2, do_sample=False)  # fmt: skip
    best = asking.ask(TEXTS, max_new_tokens=3, num_beams=2, do_sample=False)
    assert len(several) == 4
    assert several[::2] == best
    assert [answer.split()[0] for answer in several] == ["[Ada]"] * 2 + ["[Please]"] * 2
    assert len(asking.ask(TEXTS, max_new_tokens=3, stop_strings=["zzz"])) == 2
    with pytest.raises(DefenseError, match="return_dict_in_generate"):
        asking.ask(TEXTS, return_dict_in_generate=True)


def test_ask_changes_the_prompt_before_it_is_sent_and_the_answer_when_it_is_back():
    ours, plain = party(Redact()), party()
    (answer,) = ours.ask(TEXTS[:1], max_new_tokens=4, do_sample=False)
    (expected,) = plain.ask([TEXTS[0].replace("Ada", "Someone")], max_new_tokens=4, do_sample=False)
    assert answer == f"[Ada] {expected}"


def test_defenses_on_tokens_see_every_batch():
    ours = party(LastTokenBlank())
    batch = ours.encode([Example(text) for text in TEXTS], max_length=64)
    assert batch["input_ids"][:, -1].tolist() == [7, 7]
    with ours.channel.tap(Transcript()) as transcript:
        ours.ask(TEXTS[:1], max_new_tokens=2, do_sample=False)
    assert transcript.messages


def test_text_needs_a_tokenizer():
    bare, _ = split(tiny_model("llama"), Partition(1, 1))
    with pytest.raises(DefenseError, match="Text needs a tokenizer"):
        bare.ask(["Hello"])


def test_private_positions_are_the_tokens_that_touch_a_span_and_never_special_ones():
    text = "Ada Lovelace wrote"
    examples = [Example(text, private=((4, 12),)), Example(text)]
    spanned, whole = Preprocessor(TOKENIZER).batch(examples).rows
    secret = [token for token, private in zip(spanned.ids, spanned.private, strict=True) if private]
    assert TOKENIZER.decode(secret).strip() == "Lovelace"
    assert whole.private == [False] + [True] * (len(whole.ids) - 1)


def test_rows_are_padded_right_masked_and_unlabelled_there():
    batch = party().encode([Example(TEXTS[0]), Example("Ada")], max_length=64)
    short = int(batch["attention_mask"][1].sum())
    assert batch["attention_mask"][1].tolist() == [1] * short + [0] * (
        len(batch["input_ids"][1]) - short
    )
    assert batch["labels"][1, short:].eq(-100).all()
    assert batch["input_ids"][1, short:].eq(TOKENIZER.pad_token_id).all()


def test_a_tokenizer_needs_text_and_room():
    with pytest.raises(TaskError, match="without public text"):
        train_tokenizer([], 300)
    with pytest.raises(TaskError, match="must be at least 259"):
        train_tokenizer(TEXTS, 100)


def test_a_part_called_by_another_thread_is_a_call_of_its_own():
    """While one thread is in a call, another must not slip undefended tokens in as a part of it."""
    config = T5Config(
        vocab_size=64,
        d_model=16,
        d_ff=32,
        d_kv=8,
        num_heads=2,
        num_layers=3,
        num_decoder_layers=3,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    ids = torch.randint(3, 60, (1, 5))

    class Swapped(Defense):
        def on_tokens(self, batch):
            return batch

    party, _ = split(model, Partition(1, 1), defenses=[Swapped()])
    failed = []

    def intrude():
        try:
            party.model.get_encoder()(input_ids=ids.clone())
        except DefenseError as error:
            failed.append(error)

    other = threading.Thread(target=intrude)

    def watch(_message, _direction, _seconds):
        if other.ident is None:
            other.start()
            other.join(0.5)  # it has to wait for its turn

    batch = Batch({"input_ids": ids, "labels": ids}).marked()
    with party.channel.tap(watch):
        party.model(**batch)
    other.join()
    assert len(failed) == 1
