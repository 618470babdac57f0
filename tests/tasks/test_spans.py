"""Private spans follow their words through changes of the text."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from vflair_core import Example
from vflair_core.tasks.spans import Replaced, changed, follow, private_tokens, rendered

TEXT = "Ada Lovelace wrote to Bob Stone at noon."
NAMES = ((0, 12), (22, 31))


def words(text, spans):
    return [text[start:end] for start, end in spans]


def test_a_text_put_into_a_template_takes_its_spans_along():
    new = f"Read this: {TEXT} What does it say?"
    assert words(new, follow(TEXT, new, NAMES)) == ["Ada Lovelace", "Bob Stone"]


def test_of_a_changed_text_the_words_that_remain_stay_private():
    new = "Yesterday Ada X wrote a letter to Bob Stone."
    assert words(new, follow(TEXT, new, NAMES)) == ["Ada", "Bob Stone"]


def test_words_that_a_defense_pulls_apart_become_spans_of_their_own():
    new = "Ada Maria Lovelace wrote to Bob Stone at noon"
    assert words(new, follow(TEXT, new, NAMES)) == ["Ada", "Lovelace", "Bob Stone"]


def test_of_a_blanked_name_nothing_remains():
    assert follow(TEXT, "[NAME] wrote to [NAME] at noon.", NAMES) == ()


def test_a_span_inside_a_word_stays_inside_it():
    new = "Then Ada wrote to Bob"
    assert words(new, follow("Ada wrote here", new, ((1, 3),))) == ["da"]


@given(st.lists(st.sampled_from(["ab", "cd", "ef", ".", "gh"]), max_size=8), st.data())
def test_what_is_found_was_private_before(pieces, data):
    old = " ".join(pieces)
    new = " ".join(data.draw(st.permutations(pieces)))
    ends = sorted(data.draw(st.lists(st.integers(0, len(old)), min_size=2, max_size=2)))
    spans = (tuple(ends),) if ends[0] < ends[1] else ()
    secret = "".join(words(old, spans))
    assert all(
        part in secret for span in words(new, follow(old, new, spans)) for part in span.split()
    )


def test_an_answer_that_a_defense_removed_stands_nowhere():
    passage = "It lies at the harbour today."
    example = Example("Where?", pair=passage, answer="the harbour", span=(11, 22))
    kept = changed(example, "Where?", "It really lies at the harbour today.")
    assert kept.pair[slice(*kept.span)] == "the harbour"
    assert changed(example, "Where?", "It lies today.").span is None


def test_a_rendering_that_says_nothing_of_private_text_does_not_make_its_template_private():
    example = Example("Ada", pair="went home")
    shown = rendered(example, Example(f"Name: {example.text}, act: {example.pair}."))
    assert words(shown.text, shown.private) == ["Ada", "went home"]
    marked = Example("Ada went", private=((0, 3),))
    shown = rendered(marked, Example("> Ada went <"))
    assert words(shown.text, shown.private) == ["Ada"]


def test_a_rendering_that_says_it_is_believed():
    shown = Example("> Ada went <", private=((6, 10),))
    assert rendered(Example("Ada went"), shown) == shown


def test_tokens_of_templates_answers_and_special_ones_are_never_private():
    example = Example("Ada", pair="Bob", private=((0, 3),), private_pair=())
    assert private_tokens(example, [(0, 0), (0, 3), (0, 3), (0, 0)], [None, 0, 1, None]) == [
        False, True, False, False,
    ]  # fmt: skip


@given(
    words=st.lists(st.sampled_from(["a", "bb", "ccc", "."]), min_size=1, max_size=8),
    kept=st.lists(st.booleans(), min_size=8, max_size=8),
    data=st.data(),
)
def test_spans_go_through_two_replacements_and_back_as_their_words_do(words, kept, data):
    """Words are kept apart by numbers, so that their places are known without the alignment."""

    def places(texts):
        ends = list(itertools.accumulate(len(t) + 1 for t in texts))
        return [(end - len(t) - 1, end - 1) for t, end in zip(texts, ends, strict=True)]

    second = [f"{n}" * (n + 1) for n in range(len(words))]
    third = [t + "x" for t, k in zip(second, kept, strict=False) if k]
    one, two = places(words), places(second)
    left = [place for place, k in zip(two, kept, strict=False) if k]
    three = places(third)
    middle = Replaced(" ".join(second), list(zip(one, two, strict=True)))
    whole = Replaced(" ".join(third), list(zip(left, three, strict=True))).after(middle)
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, len(words) - 1))
    there = [n for n in range(first, last + 1) if kept[n]]
    found = whole.forth((one[first][0], one[last][1]))
    numbers = [n for n in range(len(words)) if kept[n]]
    if not there:
        assert found is None
        return
    left, right = numbers.index(there[0]), numbers.index(there[-1])
    assert found == (three[left][0], three[right][1])
    assert whole.back(found) == (one[there[0]][0], one[there[-1]][1])
