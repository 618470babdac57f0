"""Defenses on text: frequencies as the formulas say, sets as brute force makes them, and counted strangers."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import pytest
import torch

from vflair_core import DefenseError, Example
from vflair_core.tasks.metrics import exact_match
from vflair_core.tasks.question_answering import best_answers
from vflair_core.testing import tiny_model
from vflair_defenses import neighbours
from vflair_defenses.custext import CusText, custext_plus
from vflair_defenses.neighbours import (
    Vocabulary,
    partition_by_distance,
    read_vocabulary,
    substitute,
)
from vflair_defenses.rantext import RanText, noise_divisor
from vflair_defenses.santext import SanText, SanTextPlus

WORDS = ["river", "stone", "lamp", "paper", "cloud", "engine"]
PLANE = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [2.0, 2.0], [4.0, 4.0]])
ALL = {
    "santext": SanText,
    "santext-plus": SanTextPlus,
    "custext": CusText,
    "custext-plus": custext_plus,
    "rantext": RanText,
}


@pytest.fixture
def vectors(tmp_path):
    path = tmp_path / "vectors.txt"
    rows = [
        f"{word} {' '.join(str(float(x)) for x in row)}"
        for word, row in zip(WORDS, PLANE, strict=True)
    ]
    path.write_text("\n".join(["6 2", *rows]), encoding="utf-8")
    return str(path)


def chi_square(counts, expected):
    return sum((counts[w] - e) ** 2 / e for w, e in expected.items())


def replaced(defense, word, count):
    return Counter(defense.on_text({"text": " ".join([word] * count)})["text"].split())


def test_santext_replaces_as_often_as_the_exponential_mechanism_says(vectors, defended):
    """Chi-square with 5 degrees of freedom; false alarm once in 1,000 seeds (20.5)."""
    defense, count = SanText(epsilon=1.5, vectors=vectors), 6000
    defended([defense])
    weights = torch.exp(-0.75 * (PLANE - PLANE[1]).norm(dim=1))
    expected = dict(zip(WORDS, (count * weights / weights.sum()).tolist(), strict=True))
    assert chi_square(replaced(defense, "stone", count), expected) < 20.5
    unknown = replaced(defense, "nowhere", count)
    assert chi_square(unknown, dict.fromkeys(WORDS, count / 6)) < 20.5
    assert defense.tally == {"words": 2 * count, "unknown": count}


def test_santext_plus_keeps_frequent_words_and_sends_rare_ones_among_the_rare(vectors, defended):
    defense, count = SanTextPlus(epsilon=0.5, replaced=0.25, vectors=vectors), 4000
    parties = defended([defense])
    defense.prepare(["river stone lamp"] * 3, parties.data_party)  # paper, cloud, engine are rare
    common, rare = replaced(defense, "lamp", count), replaced(defense, "cloud", count)
    assert common["lamp"] == pytest.approx(0.75 * count, abs=5 * math.sqrt(count * 0.1875))
    assert set(common) <= {"lamp", "paper", "cloud", "engine"}
    assert set(rare) == {"paper", "cloud", "engine"}
    assert str(defense.guarantee(4)) == "empirical, no guarantee"


def test_custext_replaces_within_its_set_as_often_as_it_says(vectors, defended):
    """Chi-square with 2 degrees of freedom; false alarm once in 1,000 seeds (13.8)."""
    defense, count = CusText(epsilon=2.0, size=3, vectors=vectors), 6000
    defended([defense])
    sets = [set(replaced(defense, word, 200)) for word in WORDS]
    assert len({frozenset(s) for s in sets}) == 2  # they part the words
    assert set().union(*sets) == set(WORDS)
    own = sorted(sets[1], key=WORDS.index)
    distances = [math.dist(PLANE[1].tolist(), PLANE[WORDS.index(w)].tolist()) for w in own]
    near = [(max(distances) - d) / (max(distances) - min(distances)) for d in distances]
    weights = [math.exp(2.0 * u / 2) for u in near]
    expected = {w: count * x / sum(weights) for w, x in zip(own, weights, strict=True)}
    assert len(own) == 3
    assert chi_square(replaced(defense, "stone", count), expected) < 13.8
    promised = defense.guarantee(5)
    assert (promised.epsilon_per_release, promised.epsilon) == (2.0, math.inf)
    assert replaced(defense, "nowhere", 3) == {"nowhere": 3}
    assert defense.tally["unknown"] == 3


def test_custext_plus_leaves_function_words(vectors, defended):
    defense = custext_plus(vectors=vectors, size=2)
    defended([defense])
    assert defense.on_text({"text": "The river, the"})["text"].startswith("The ")
    assert defense.tally["stop words kept"] == 2


def greedy_partition(vectors, order, size):
    """Word by word, in exact arithmetic; words equally far stay in order."""
    rows = [[Fraction(x) for x in row] for row in vectors.tolist()]
    left, sets = order.tolist(), []
    while left:
        first = rows[left[0]]
        far = {w: sum((a - b) ** 2 for a, b in zip(rows[w], first, strict=True)) for w in left[1:]}
        chosen = [left[0], *sorted(far, key=far.get)[: size - 1]]
        sets.append(chosen)
        left = [w for w in left if w not in chosen]
    return [next(n for n, words in enumerate(sets) if w in words) for w in range(len(rows))]


@pytest.mark.parametrize("kind", ["apart", "full of ties", "far from zero"])
@pytest.mark.parametrize("at_once", [1, 5, 256])
def test_sets_equal_the_greedy_partition_by_brute_force(kind, at_once, monkeypatch):
    monkeypatch.setattr(neighbours, "FIRST_WORDS", at_once)
    vectors = {
        "apart": torch.randn(101, 4),
        "full of ties": torch.randint(0, 3, (101, 3)).float(),  # 27 places
        "far from zero": 300 + torch.randint(0, 9, (101, 3)) / 1024,  # products lose this
    }[kind]
    vocabulary = Vocabulary(tuple(str(n) for n in range(101)), vectors)
    order = torch.randperm(101)
    found = partition_by_distance(vocabulary, order, 7)
    assert found.tolist() == greedy_partition(vectors, order, 7)


def test_rantext_replaces_as_an_independent_simulation_does(vectors, defended):
    """Two samples of 6,000; chi-square with 5 degrees of freedom, false alarm once in 1,000 seeds."""
    defense, count = RanText(epsilon=1.0, vectors=vectors), 6000
    defended([defense])
    ours, theirs = replaced(defense, "paper", count), Counter()
    ranges = PLANE.max(0).values - PLANE.min(0).values
    noise = torch.distributions.Laplace(torch.zeros(2), ranges).sample((count,))
    distances = (PLANE - PLANE[3]).norm(dim=1)
    for radius in noise.norm(dim=1):
        weights = torch.where(distances <= radius, (0.5 * (radius - distances) / radius).exp(), 0.0)
        theirs[WORDS[int(torch.multinomial(weights, 1))]] += 1
    gap = sum((ours[w] - theirs[w]) ** 2 / (ours[w] + theirs[w]) for w in WORDS)
    assert gap < 20.5
    assert replaced(defense, "nowhere", 2) == {}
    assert defense.tally["unknown"] == 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("santext", {"epsilon": 1.0}),
        ("santext-plus", {"epsilon": 1.0, "replaced": 0.4}),
        ("custext", {"epsilon": 2.0, "size": 3}),
        ("custext-plus", {"epsilon": 2.0, "size": 3}),
        ("rantext", {"epsilon": 1.0}),
    ],
)
def test_an_attacker_is_told_the_frequencies_of_the_defense(
    name, options, vectors, defended, public
):
    """4,000 draws of each word: no frequency is off by more than five deviations of a fair coin, .04."""
    defense = ALL[name](vectors=vectors, **options)
    party = defended([defense]).data_party
    table = party.model.get_input_embeddings().weight
    told = ALL[name](vectors=vectors, **options).replacement(party.tokenizer, table, public)
    assert list(told.words) == WORDS
    said = told.log_probabilities(torch.arange(len(WORDS))).exp()
    assert torch.allclose(said.sum(1), torch.ones(len(WORDS)))
    for number, word in enumerate(WORDS):
        counts = replaced(defense, word, 4000)
        seen = torch.tensor([counts[other] / 4000 for other in WORDS])
        assert (seen - said[number]).abs().max() < (0.08 if name == "rantext" else 0.04)


@pytest.mark.parametrize("name", list(ALL))
def test_a_defense_that_changes_nothing_has_nothing_to_tell(name, defended):
    party = defended([]).data_party
    table = party.model.get_input_embeddings().weight
    assert ALL[name](epsilon=math.inf).replacement(party.tokenizer, table, []) is None


def test_the_papers_fit_of_the_noise_is_continuous_enough_to_be_used():
    assert noise_divisor(1.5) == 1.5
    assert noise_divisor(6.0) == pytest.approx(0.0166 * math.log(19.06 * 6 - 38.13) + 9.311)
    assert math.isfinite(noise_divisor(2.0))


def test_the_models_vocabulary_is_its_whole_word_tokens(defended):
    party = defended([]).data_party
    vocabulary = read_vocabulary("X", "", party)
    table = party.model.get_input_embeddings().weight
    for word in vocabulary.words:
        forms = [
            party.tokenizer(f, add_special_tokens=False)["input_ids"] for f in (f" {word}", word)
        ]
        ids = next(f for f in forms if len(f) == 1)
        assert torch.equal(vocabulary.vectors[vocabulary.index[word]], table[ids[0]])
    assert "the" in vocabulary.words
    assert not [w for w in vocabulary.words if " " in w]


def test_a_bad_file_of_vectors_is_named_by_line(tmp_path, defended):
    party = defended([]).data_party
    path = tmp_path / "bad.txt"
    path.write_text("one 1 2\ntwo 1\n", encoding="utf-8")
    with pytest.raises(DefenseError, match=r"line 2: 1 numbers, where the first word has 2"):
        read_vocabulary("X", str(path), party)
    path.write_text("one 1 2\ntwo 1 x\n", encoding="utf-8")
    with pytest.raises(DefenseError, match="line 2: could not convert"):
        read_vocabulary("X", str(path), party)
    path.write_text("one 1 2\n", encoding="utf-8")
    with pytest.raises(DefenseError, match="needs words to choose from"):
        read_vocabulary("X", str(path), party)


def test_spacing_is_kept_only_where_nothing_is_promised():
    assert substitute("a  b,\tc", str.upper, spacing=True) == "A  B,\tC"
    assert substitute("a  b,\tc", str.upper, spacing=False) == "A B , C"


@pytest.mark.parametrize("name", ALL)
def test_what_is_learnt_is_the_changed_text_and_infinite_epsilon_changes_no_bit(name, defended):
    example = Example("The river runs past the old mill and the winter garden.")
    plain = defended([]).data_party.encode([example])
    off = defended([ALL[name](epsilon=math.inf)]).data_party.encode([example])
    assert all(torch.equal(plain[key], off[key]) for key in plain)
    changed = defended([ALL[name](epsilon=1e-6)]).data_party.encode([example])
    assert changed["input_ids"].tolist() != plain["input_ids"].tolist()
    real = changed["labels"] != -100
    assert torch.equal(changed["labels"][real], changed["input_ids"][real])


@pytest.mark.parametrize("name", ALL)
def test_a_batch_that_went_round_the_text_defense_is_refused(name, defended):
    party = defended([ALL[name]()]).data_party
    with pytest.raises(DefenseError, match="changes text before it is sent"):
        party.model(torch.tensor([[5, 6, 7]]))


@pytest.mark.parametrize("name", ALL)
def test_before_prepare_a_text_defense_says_what_to_do(name):
    with pytest.raises(DefenseError, match="call prepare"):
        ALL[name]().on_text({"text": "river"})


PASSAGE = "The old mill, dry for years, stood beside a copper engine."
QUESTION = Example("What stood there?", pair=PASSAGE, answer="copper engine", span=(44, 57))


@pytest.fixture
def asked(defended):
    """A factory: asked(defense) → what reads questions through it."""

    def make(defense):
        party = defended([defense] if defense else [], task_kind="question-answering").data_party
        return party.preprocessor(128)

    return make


def answered(encoded, passages):
    """The prediction of a model that is right: all weight on the span that it should learn."""
    scores = [
        torch.nn.functional.one_hot(encoded.batch[name], encoded.batch["input_ids"].shape[1])
        for name in ("start_positions", "end_positions")
    ]
    return best_answers(encoded.rows, *scores, passages=passages)


@pytest.mark.parametrize("name", ALL)
def test_of_replaced_words_the_answer_is_read_where_it_stood(name, asked, monkeypatch):
    """Each word becomes another that nobody could align by its letters."""
    numbers = itertools.count()
    words = [f"w{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(99)]
    defense = ALL[name]()
    reader = asked(defense)
    monkeypatch.setattr(type(defense), "_replaced", lambda *_: words[next(numbers)])
    encoded = reader.batch([QUESTION])
    (row,) = encoded.rows
    start, end = (int(encoded.batch[n][0]) for n in ("start_positions", "end_positions"))
    learnt = row.example.pair[row.offsets[start][0] : row.offsets[end][1]].split()
    asked_before = len(neighbours.WORD.findall(QUESTION.text))
    at = [match.group() for match in neighbours.WORD.finditer(PASSAGE)].index("copper")
    assert learnt == words[asked_before + at : asked_before + at + 2]
    assert answered(encoded, [PASSAGE]) == ["copper engine"]
    assert exact_match(answered(encoded, [PASSAGE])[0], QUESTION.answer) == 1.0


@pytest.mark.parametrize("name", ["santext", "santext-plus", "custext", "custext-plus"])
def test_words_replaced_by_themselves_make_the_rows_that_undefended_ones_are(
    name, asked, monkeypatch
):
    defense = ALL[name](spacing=True)
    ours = asked(defense)
    monkeypatch.setattr(type(defense), "_replaced", lambda _, word: word)
    theirs = asked(None)
    first, second = ours.batch([QUESTION]).batch, theirs.batch([QUESTION]).batch
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_is_left_of_an_answer_stands_for_all_of_it_and_nothing_for_none(asked, monkeypatch):
    defense = RanText()
    reader = asked(defense)
    monkeypatch.setattr(RanText, "_replaced", lambda _, word: None if word == "copper" else "lamp")
    (row,) = reader.batch([QUESTION]).rows
    assert row.example.pair[slice(*row.example.span)] == "lamp"
    assert answered(reader.batch([QUESTION]), [PASSAGE]) == ["engine"]
    monkeypatch.setattr(RanText, "_replaced", lambda _, word: "lamp" if word == "mill" else None)
    encoded = reader.batch([QUESTION])
    assert encoded.rows[0].example.span is None
    assert int(encoded.batch["start_positions"]) == int(encoded.batch["end_positions"]) == 0


def test_the_extractor_reads_the_true_prompt_and_the_draft(tmp_path, defended):
    plain = defended([]).data_party
    small = tiny_model("llama", vocab_size=300, max_position_embeddings=512)
    small.save_pretrained(tmp_path)
    plain.tokenizer.save_pretrained(tmp_path)
    defense = RanText(extractor=str(tmp_path), new_tokens=5)
    defended([defense])
    asked = []
    generate = type(small).generate

    def spy(model, **options):
        asked.append(options["input_ids"])
        return generate(model, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(small), "generate", spy)
        answer = defense.on_answer("the true prompt", "a draft")
    text = plain.tokenizer.decode(asked[0][0])
    assert "the true prompt" in text
    assert "a draft" in text
    written = small.generate(asked[0], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert answer == plain.tokenizer.decode(
        written[0, asked[0].shape[1] :], skip_special_tokens=True
    )
