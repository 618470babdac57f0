"""Prompts: what comes from the example stays private, what is put around it does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vflair_core import Example
from vflair_core.errors import TaskError
from vflair_tasks.offering import Asking, asked
from vflair_tasks.prompts import Prompt, fill, shots_from
from vflair_tasks.rows import View

NAMES = {"question": "text", "passage": "pair"}
EXAMPLE = Example(
    "Who is Ada?", pair="Ada lives here.", private=((7, 10),), private_pair=((0, 3),), answer="she"
)


def test_private_spans_move_with_the_text_they_are_of(tokenizer):
    shown = Prompt("Q: {question} P: {passage}\nA:", names=NAMES)(EXAMPLE, tokenizer)
    assert shown.text == "Q: Who is Ada? P: Ada lives here.\nA:"
    assert shown.pair is None
    assert shown.private == ((14 - 4, 14 - 1), (18, 21))
    assert shown.secrets == ("Ada", "Ada")
    assert shown.answer == "she"


def test_a_text_that_is_private_in_full_stays_so_and_its_template_is_not(tokenizer):
    shown = Prompt("Q: {text}\nA:")(Example("Who {is} Ada?"), tokenizer)
    assert shown.text == "Q: Who {is} Ada?\nA:"
    assert shown.secrets == ("Who {is} Ada?",)


def test_a_template_without_an_input_is_taken_where_there_is_none(tokenizer):
    prompt = Prompt("{text} with {pair}", alone="{text} alone")
    assert prompt(Example("a", pair="b"), tokenizer).text == "a with b"
    assert prompt(Example("a"), tokenizer).text == "a alone"


@given(
    st.text(max_size=20),
    st.text(max_size=20),
    st.lists(st.sampled_from(["words ", "{a}", "{b}", "{{", "}}"]), max_size=8),
)
def test_a_filled_template_reads_as_pythons_own_and_marks_what_was_put_in(a, b, pieces):
    template = "".join(pieces)
    filled = fill(template, Example(a, pair=b), {"a": "text", "b": "pair"})
    assert filled.text == template.format(a=a, b=b)
    values = [{"{a}": a, "{b}": b}[piece] for piece in pieces if piece in ("{a}", "{b}")]
    assert list(filled.secrets) == [value for value in values if value]


def test_examples_shown_first_carry_their_answers_and_are_not_private(tokenizer):
    shots = (Example("1+1?", answer="2"), Example("2+2?", choices=("3", "4"), label=1))
    shown = Prompt("Q: {text}\nA:", shots=shots)(Example("3+3?"), tokenizer)
    assert shown.text == "Q: 1+1?\nA: 2\n\nQ: 2+2?\nA: 4\n\nQ: 3+3?\nA:"
    assert shown.secrets == ("3+3?",)
    (span,) = shown.private
    assert span[0] == shown.text.rindex("3+3?")


def test_examples_shown_first_are_train_examples_and_no_longer_learnt_from():
    train = [Example(f"train {n}", label=0, id=str(n)) for n in range(10)]
    shots, rest = shots_from(train, 3, seed=0)
    view = View(train, rest)
    assert sorted([e.text for e in shots] + [e.text for e in view]) == sorted(e.text for e in train)
    assert shots_from(train, 3, seed=0)[0] == shots
    assert shots_from(train, 3, seed=1)[0] != shots
    with pytest.raises(TaskError, match="shots=10 of 10 train examples: give 0 to 9"):
        shots_from(train, 10, seed=0)


def test_the_chat_template_is_the_tokenizers_own(chatty):
    shots = (Example("1+1?", answer="2"),)
    prompt = Prompt("{text}", shots=shots, chat=True, system="Be brief.")
    shown = prompt(Example("a", private=((0, 1),)), chatty)
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "a"},
    ]
    expected = chatty.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert shown.text == expected
    # The "a" of the question, not one of "user" or "assistant".
    assert shown.private == ((expected.rindex("a<|end|>"), expected.rindex("a<|end|>") + 1),)


def test_a_chat_template_that_trims_moves_the_spans_along(chatty):
    chatty.chat_template = "{% for m in messages %}[{{ m['content'] | trim }}]{% endfor %}"
    shown = Prompt("{text}", chat=True)(
        Example("  Ada is in \n", private=((2, 5), (11, 13))), chatty
    )
    assert shown.text == "[Ada is in]"
    assert shown.secrets == ("Ada",)


def test_a_chat_template_that_begins_with_the_begin_token_does_not_double_it(chatty):
    chatty.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    shown = Prompt("{text}", chat=True)(Example("Ada"), chatty)
    assert chatty(shown.text)["input_ids"].count(chatty.bos_token_id) == 1


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{% for m in messages %}[{{ m['content'] | upper }}]{% endfor %}",
            "changes what the user",
        ),
        (None, "no chat template.*chat = false"),
    ],
)
def test_a_chat_template_that_cannot_be_followed_is_an_error(chatty, template, words):
    chatty.chat_template = template
    with pytest.raises(TaskError, match=words):
        Prompt("{text}", chat=True)(Example("Ada"), chatty)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{questoin}",
            r"asks for {questoin}\. Did you mean 'question'\? There is: question, passage",
        ),
        ("{question", r"does not parse.*Double a brace"),
    ],
)
def test_a_template_that_cannot_be_filled_is_an_error(template, words):
    with pytest.raises(TaskError, match=words):
        Prompt(template, names=NAMES)


def test_the_users_prompt_takes_the_place_of_the_data_sets_own(tokenizer):
    from vflair_core import Task

    rows = [Example(f"text {n}", answer="a", id=f"train-{n}") for n in range(4)]
    task = Task(name="t", kind="causal-lm", train=rows, test=rows)
    prompt = Prompt("own {question}", names={"question": "text"})
    made = asked(task, prompt, Asking(prompt="mine {question} =", shots=1), seed=0)
    (shot,) = made.facts["shots"]
    assert len(made.train) == 3
    assert shot not in {e.id for e in made.train}
    text = made.render(rows[0], tokenizer).text
    assert text == f"mine {shot.replace('train-', 'text ')} = a\n\nmine text 0 ="
