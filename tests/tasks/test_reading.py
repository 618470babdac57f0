"""Examples become rows: windows, prompts and answers, pairs, packs; what is learnt is marked, and only that."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vflair_core import Defense, Example, Partition, Task, Transcript, split
from vflair_core.errors import DefenseError, ExperimentError, TaskError
from vflair_core.experiments.base_model import check_packing
from vflair_core.experiments.capture import record_victims
from vflair_core.experiments.grading.truth import truth_of
from vflair_core.tasks.preprocessor import Preprocessor
from vflair_core.tasks.token_rows import window_target
from vflair_core.tasks.tokenization import InputFormat, input_format_of
from vflair_core.tasks.tokenizer_training import train_tokenizer
from vflair_core.testing import tiny_model

TEXTS = [
    "Ada Lovelace wrote the first program.",
    "Please call me at noon, said Ada.",
    "Where is she?",
]
TOKENIZER = train_tokenizer(TEXTS * 3, 320)
PAIRED = train_tokenizer(TEXTS * 3, 320, pairs=True)
PASSAGE = "Ada was at home. Then she went to the old harbour, and there she stayed until noon."
START = PASSAGE.index("the old harbour")
QUESTION = Example(
    "Where is she?", pair=PASSAGE, answer="the old harbour", span=(START, START + 15)
)


def qa(max_length, stride=6, example=QUESTION):
    return Preprocessor(PAIRED, InputFormat("question-answering", stride=stride), max_length).batch(
        [example]
    )


# -- windows -----------------------------------------------------------------------------------------------


def test_windows_cover_the_whole_passage_and_share_stride_tokens():
    encoded = qa(36)
    assert len(encoded.rows) > 2
    covered = [
        [row.offsets[n] for n, which in enumerate(row.sequences) if which == 1]
        for row in encoded.rows
    ]
    for before, after in itertools.pairwise(covered):
        assert before[-6:] == after[:6]
    assert covered[0][0][0] == 0
    assert covered[-1][-1][1] == len(PASSAGE)
    assert max(len(row.ids) for row in encoded.rows) == 36


def test_start_and_end_are_the_answer_where_a_window_holds_it_and_the_first_position_elsewhere():
    encoded = qa(40, stride=20)
    found = 0
    for n, row in enumerate(encoded.rows):
        start, end = (int(encoded.batch[f"{w}_positions"][n]) for w in ("start", "end"))
        if (start, end) == (0, 0):
            assert row.ids[0] == PAIRED.cls_token_id
        else:
            said = PASSAGE[row.offsets[start][0] : row.offsets[end][1]]
            assert said.strip() == "the old harbour"
            found += 1
    assert 0 < found < len(encoded.rows)


def test_an_unanswerable_question_points_to_the_first_position():
    bare = Example("Where is she?", pair=PASSAGE, answer="")
    batch = qa(80, example=bare).batch
    assert batch["start_positions"].tolist() == batch["end_positions"].tolist() == [0]


def test_a_question_that_leaves_no_room_is_refused_with_the_length_it_takes():
    with pytest.raises(TaskError, match=r"Set train.max_length to (\d+) or more") as told:
        qa(9)
    needed = int(str(told.value).split("max_length to ")[1].split()[0])
    assert qa(needed).rows


def test_a_victim_with_a_long_passage_crosses_in_one_row():
    model = tiny_model("bert", "question-answering", vocab_size=len(PAIRED))
    party, _ = split(model, Partition(1, 1), tokenizer=PAIRED)
    party.take_up_format(InputFormat("question-answering", stride=6))
    crossed = record_victims(party, [QUESTION, QUESTION], max_length=36, gradients=False)
    smashed = [r.tensor for r in crossed.transcript.messages if r.role == "smashed"]
    assert [tuple(tensor.shape[:2]) for tensor in smashed] == [(1, 36), (1, 36)]


# -- pairs ---------------------------------------------------------------------------------------------------


def test_a_pair_is_read_as_begin_first_separator_second_with_token_types():
    reading = InputFormat("classification", token_types=True)
    rows = [Example("Ada", pair="is here", label=1), Example("Ada", label=0)]
    batch = Preprocessor(PAIRED, reading).batch(rows).batch
    first, second = (PAIRED(t, add_special_tokens=False)["input_ids"] for t in ("Ada", "is here"))
    expected = [PAIRED.bos_token_id, *first, PAIRED.sep_token_id, *second]
    assert batch["input_ids"][0].tolist() == expected
    assert batch["token_type_ids"][0].tolist() == [0] * (len(first) + 2) + [1] * len(second)
    assert batch["labels"].tolist() == [1, 0]


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_missing_label_is_an_error_that_names_the_row(kind):
    with pytest.raises(TaskError, match="row-7"):
        Preprocessor(TOKENIZER, InputFormat(kind)).batch([Example("Ada", id="row-7")])


# -- a prompt and its answer -----------------------------------------------------------------------------------


def test_an_answer_follows_its_prompt_and_only_it_and_the_end_token_are_learnt():
    encoded = Preprocessor(TOKENIZER).batch(
        [Example("Who wrote?", answer="Ada"), Example("Who?", answer="Ada")]
    )
    answer = [*TOKENIZER(" Ada", add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]
    prompt = TOKENIZER("Who wrote?")["input_ids"]
    assert encoded.batch["input_ids"][0].tolist() == prompt + answer
    assert encoded.batch["labels"][0].tolist() == [-100] * len(prompt) + answer
    learnt = encoded.batch["labels"][1]
    assert learnt[learnt != -100].tolist() == answer


def test_a_long_prompt_loses_its_first_words_and_never_its_answer_and_is_counted():
    reader = Preprocessor(TOKENIZER, max_length=12)
    (row,) = reader.batch([Example(TEXTS[0] + " " + TEXTS[1], answer="Ada")]).rows
    whole = TOKENIZER(TEXTS[0] + " " + TEXTS[1])["input_ids"]
    room = 12 - len(row.target) - 1
    assert row.ids == [TOKENIZER.bos_token_id, *whole[-room:], *row.target]
    assert (reader.reading.tally.examples, reader.reading.tally.truncated) == (1, 1)


def test_an_answer_that_does_not_fit_is_refused():
    with pytest.raises(TaskError, match="max_length higher"):
        Preprocessor(TOKENIZER, max_length=6).batch([Example("Who?", answer=TEXTS[0])])


def test_prompts_are_what_training_rows_begin_with_padded_left():
    reader, examples = (
        Preprocessor(TOKENIZER),
        [Example("Who wrote?", answer="Ada"), Example("Who?", answer="x")],
    )
    trained, asked = reader.batch(examples), reader.prompts(examples)
    for n, (row, prompt) in enumerate(zip(trained.rows, asked.rows, strict=True)):
        assert row.ids == prompt.ids + row.target
        gap = int((asked.batch["attention_mask"][n] == 0).sum())
        assert asked.batch["input_ids"][n, gap:].tolist() == prompt.ids


def test_of_choices_the_right_one_is_learnt():
    choice = Example("Who?", choices=("Bob", "Ada"), label=1)
    plain = Example("Who?", answer="Ada")
    one, two = (Preprocessor(TOKENIZER).batch([example]).batch for example in (choice, plain))
    assert torch.equal(one["labels"], two["labels"])


def test_two_stacks_read_the_text_and_learn_the_answer():
    reading = InputFormat("seq2seq", two_stacks=True)
    batch = (
        Preprocessor(TOKENIZER, reading)
        .batch([Example("Who?", answer="Ada"), Example("x", answer="Ada Ada")])
        .batch
    )
    answer = [*TOKENIZER("Ada", add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]
    assert batch["labels"][0, : len(answer)].tolist() == answer
    assert batch["labels"][0, len(answer) :].eq(-100).all()
    assert (
        batch["input_ids"][0, : len(TOKENIZER("Who?")["input_ids"])].tolist()
        == TOKENIZER("Who?")["input_ids"]
    )


# -- packs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cut", [None, Partition(1, 0), Partition(1, 1)], ids=["whole", "HT", "HBT"]
)
def test_packed_texts_cost_what_they_cost_alone(cut):
    model = tiny_model("llama", vocab_size=len(TOKENIZER))
    examples = [Example(text) for text in (*TEXTS, *TEXTS)]
    total = count = 0.0
    for example in examples:
        batch = Preprocessor(TOKENIZER).batch([example]).batch
        tokens = batch["input_ids"].shape[1] - 1
        total += float(model(**batch, use_cache=False).loss.detach()) * tokens
        count += tokens
    ran = model if cut is None else split(copy.deepcopy(model), cut)[0].model
    packed = Preprocessor(TOKENIZER, max_length=50).batch(examples, pack_rows=True).batch
    assert len(packed["input_ids"]) < len(examples)
    assert float(ran(**packed, use_cache=False).loss.detach()) == pytest.approx(
        total / count, rel=1e-5
    )


@pytest.mark.parametrize("arranged", ["packed", "padded right", "padded left"])
def test_private_spans_are_found_wherever_packing_and_padding_put_them(arranged):
    names = ["Ada Lovelace", "noon", "she"]
    examples = [
        Example(text, private=((text.index(name), text.index(name) + len(name)),))
        for text, name in zip(TEXTS, names, strict=True)
    ]
    reader = Preprocessor(TOKENIZER, max_length=50)
    if arranged == "padded left":
        encoded = reader.prompts(examples)
    else:
        encoded = reader.batch(examples, pack_rows=arranged == "packed")
    assert (len(encoded.batch["input_ids"]) < 3) == (arranged == "packed")
    found = encoded.batch["input_ids"][encoded.private]
    assert TOKENIZER.decode(found).replace(" ", "") == "".join(names).replace(" ", "")


def test_models_that_let_packed_texts_see_each_other_are_refused():
    task = Task("t", kind="causal-lm", train=[Example("a")], test=[Example("b")])
    check_packing(tiny_model("gpt2"), task)
    config = AutoConfig.for_model("bloom", vocab_size=64, hidden_size=16, n_layer=2, n_head=2)
    with pytest.raises(ExperimentError, match="see each other"):
        check_packing(AutoModelForCausalLM.from_config(config), task)


# -- text defenses and what attacks are graded on --------------------------------------------------------------


class Blank(Defense):
    """Blank a name in every field, and say in which order fields come."""

    def on_text(self, fields):
        return {key: text.replace("Ada", "Nobody") for key, text in fields.items()}


class Drop(Defense):
    def on_text(self, fields):
        return {"text": fields["text"]}


def in_prompt(example, tokenizer):
    return Example(
        f"Ada says: {example.text}", private=tuple((s + 10, e + 10) for s, e in example.private)
    )


def defended(*defenses, kind="causal-lm", render=None):
    model = tiny_model("llama", vocab_size=len(PAIRED))
    party, _ = split(model, Partition(1, 1), tokenizer=PAIRED, defenses=defenses, seed=0)
    party.take_up_format(InputFormat(kind, render=render))
    return party


def test_a_text_defense_sees_the_raw_fields_and_the_template_stays():
    party = defended(Blank(), render=in_prompt)
    ids = party.encode([Example("Ada wrote", private=((4, 9),))])["input_ids"][0]
    assert PAIRED.decode(ids, skip_special_tokens=True) == "Ada says: Nobody wrote"


def test_a_text_defense_sees_both_texts_of_a_pair():
    party = defended(Blank())
    ids = party.encode([Example("Ada wrote", pair="to Ada")])["input_ids"][0]
    assert PAIRED.decode(ids).count("Nobody") == 2


def test_a_text_defense_that_drops_a_field_is_refused_by_name():
    with pytest.raises(DefenseError, match=r"Drop\.on_text was given pair, text and returned text"):
        defended(Drop()).encode([Example("Ada", pair="Bob")])


def test_strings_are_graded_against_the_original_and_positions_against_what_was_sent():
    example = Example("Ada met Bob", private=((0, 3), (8, 11)))
    for defenses, sent in (((), "Ada Bob"), ((Blank(),), "Bob")):
        party = defended(*defenses)
        crossed = record_victims(party, [example], max_length=32, gradients=False)
        truth = truth_of(party.preprocessor(32), [example], crossed.rows)
        private = truth.tokens[0][truth.private[0]]
        assert " ".join(PAIRED.decode(private).split()).replace(" ", "") == sent.replace(" ", "")
        assert truth.secrets == [("Ada", "Bob")]


def test_what_was_cut_off_is_no_secret_to_recover():
    example = Example(TEXTS[0] + " Bob", private=((0, 3), (38, 41)))
    party = defended()
    crossed = record_victims(party, [example], max_length=5, gradients=False)
    assert truth_of(party.preprocessor(5), [example], crossed.rows).secrets == [("Ada",)]


def test_private_spans_of_the_second_text_are_graded_too():
    example = Example("Who?", pair="Ada came", private=(), private_pair=((0, 3),))
    party = defended()
    with party.channel.tap(Transcript()):
        crossed = record_victims(party, [example], max_length=32, gradients=False)
    truth = truth_of(party.preprocessor(32), [example], crossed.rows)
    assert PAIRED.decode(truth.tokens[0][truth.private[0]]).strip() == "Ada"
    assert truth.secrets == [("Ada",)]


def test_reading_of_a_model_knows_its_stacks_and_token_types():
    task = Task(
        "t",
        kind="classification",
        labels=("a",),
        train=[Example("a", label=0)],
        test=[Example("b", label=0)],
    )
    assert input_format_of(task, tiny_model("bert", "classification")).token_types
    assert not input_format_of(task, tiny_model("llama", "classification")).token_types


def test_an_answer_outside_a_window_is_the_first_position():
    (row, *_) = qa(36).rows
    assert window_target(row, 0) == (0, 0)


def test_a_stand_in_answer_of_public_text_loses_its_end_where_a_private_one_is_refused():
    reading = InputFormat("seq2seq", two_stacks=True)
    long = Example(PASSAGE, answer=PASSAGE)
    with pytest.raises(TaskError, match=r"has \d+ tokens and max_length is 12"):
        Preprocessor(TOKENIZER, reading, 12).batch([long])
    public = reading.of_public_text()
    (row,) = Preprocessor(TOKENIZER, public, 12).batch([long]).rows
    (whole,) = Preprocessor(TOKENIZER, public, 200).batch([long]).rows
    assert len(row.target) == 12
    assert row.target == [*whole.target[:11], TOKENIZER.eos_token_id]
    assert reading.tally.examples == 0
