"""Each result names what could leak, what of it crossed, which defense covers it, and which attack read it."""

from __future__ import annotations

from collections import Counter

import pytest

from support.paths import SAMPLE_PLUGIN, TASK_KINDS
from support.small_models import LLAMA, T5
from vflair_core import Guess, hookimpl, plugin_manager, run
from vflair_core.cli.terminal import _remarks
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.seams import seams, uncovered, unread, with_readers

BASE = {
    "task": {"name": "words"},
    "model": {"config": LLAMA, "vocab_size": 300},
    "partition": {"head": 1, "tail": 1},
    "train": {"steps": 6, "batch_size": 4, "max_length": 16, "learning_rate": 0.01},
    "victims": {"count": 4, "max_length": 12, "bypass": 2, "companions": 0},
    "isolation": "inline",
}


def either(smashed, returned, mask) -> Guess:
    """Takes two kinds of states, looks at one, and asks the other for its shape."""
    return Guess(tokens=(returned.sum(-1) > 0).long()[:, : smashed.shape[1]])


class Listening:
    """Attacks of its own, and a count of what really crossed, by role and direction."""

    def __init__(self):
        self.heard = Counter()

    @hookimpl
    def vflair_attacks(self):
        return {"either": either}

    @hookimpl
    def vflair_message_sent(self, arm, role):
        self.heard[arm, role] += 1

    @hookimpl
    def vflair_message_received(self, arm, role):
        self.heard[arm, role] += 1


@pytest.fixture
def listening():
    return Listening()


@pytest.fixture
def pm(listening):
    manager = plugin_manager([SAMPLE_PLUGIN, TASK_KINDS], entry_point_group="vflair.none")
    manager.register(listening)
    return manager


def rows_of(result, arm):
    return {row["seam"]: row for row in result.numbers[arm]["seams"]}


def test_a_run_says_what_crossed_and_which_attack_read_it(pm, listening):
    attacks = [{"name": "first-row", "knowledge": "K1"}, {"name": "either", "knowledge": "K0"}]
    result = run(
        experiment_from({**BASE, "attacks": attacks, "defenses": [{"name": "shift"}]}), plugins=pm
    )
    rows = rows_of(result, "undefended")
    # Six steps, two evaluations of one batch, four victims; of these ten have a backward.
    assert {seam: row["crossed"] for seam, row in rows.items()} == {
        "smashed": 12,
        "returned": 12,
        "hidden_grad": 10,
        "smashed_grad": 10,
        "caches": 0,
        "disclosed": 0,
        "updates": 0,
        "saved": 0,
        "lengths": 12,
        "timing": 12,
    }
    defended = rows_of(result, "defended")
    for arm, each in (("undefended", rows), ("defended", defended)):
        for role in ("smashed", "returned", "hidden_grad", "smashed_grad"):
            assert each[role]["crossed"] == listening.heard[arm, role]
    assert [r["attack"] for r in rows["smashed"]["read_by"]] == ["first-row"]
    assert [r["attack"] for r in rows["returned"]["read_by"]] == ["either"]
    assert [r["attack"] for r in rows["lengths"]["read_by"]] == ["first-row", "either"]
    assert rows["hidden_grad"]["verdict"] == "not read by any attack of this run"
    assert rows["timing"]["verdict"] == "not read by any attack of this run"
    assert rows["caches"]["verdict"] == rows["saved"]["verdict"] == "did not cross"
    covered = {seam: row["covered_by"] for seam, row in defended.items() if row["covered_by"]}
    assert covered.keys() == {"smashed", "returned", "caches"}
    assert all(row == [{"defense": "shift", "covers": ["prompt"]}] for row in covered.values())
    said = list(_remarks(result, ["undefended", "defended"]))
    unseen = "hidden_grad, smashed_grad, timing"
    assert f"undefended: crossed, and not read by any attack of this run: {unseen}." in said
    assert (
        "defended: crossed, and covered by no defense: hidden_grad, smashed_grad, lengths, timing."
        in said
    )


def test_each_grade_says_what_its_attack_read(pm):
    attacks = [{"name": "takes-and-idles", "knowledge": "K4"}]
    (grade,) = run(experiment_from({**BASE, "attacks": attacks}), plugins=pm).numbers["undefended"][
        "attacks"
    ]
    assert grade["read"] == ["lengths"]


def test_both_stacks_of_a_model_and_their_caches_are_seams_of_their_own(pm, listening):
    table = {
        **BASE,
        "task": {"name": "reversed"},
        "model": {"config": T5, "vocab_size": 300},
        "train": {**BASE["train"], "steps": 2},
    }
    result = run(experiment_from(table), plugins=pm)
    rows = rows_of(result, "undefended")
    for role in ("smashed", "returned", "hidden_grad", "smashed_grad"):
        assert rows[role]["crossed"]
        assert rows[f"{role} 2"]["crossed"]
        together = rows[role]["crossed"] + rows[f"{role} 2"]["crossed"]
        assert together == listening.heard["undefended", role]
    assert rows["caches"]["crossed"] == 0  # an encoder keeps none
    assert rows["caches 2"]["crossed"] > 0  # answers are generated


def test_what_is_granted_and_did_not_cross_says_so(pm):
    attacks = [{"name": "which-weights", "knowledge": "K3"}]
    e = {**BASE, "train": {**BASE["train"], "steps": 1}, "attacks": attacks}
    rows = rows_of(run(experiment_from(e), plugins=pm), "undefended")
    assert rows["saved"]["verdict"] == "did not cross, and was granted"
    assert [r["attack"] for r in rows["saved"]["read_by"]] == ["which-weights"]


def grade_of(name, read, verdict="ok", knowledge="K4"):
    return Grade(
        name, knowledge, "tokens", 0.5, (0.4, 0.6), 0.1, {}, {}, read=read, verdict=verdict
    )


def test_rows_follow_from_the_facts():
    crossed = {
        ("smashed", 0): 3,
        ("smashed", 1): 3,
        ("hidden_grad", 0): 4,
        ("weight", 1): 6,
        ("cache", 1): 2,
        ("exchange", 0): 11,
        ("exchange", 1): 9,
    }
    grades = [
        grade_of("a", ["smashed 2"], "positive control failed"),
        grade_of("a", ["smashed 2"]),
        grade_of("b", ["updates"], knowledge=("K4", "updates")),
    ]
    covers = [("x", {"labels"}), ("y", frozenset({"prompt", "gradients"}))]
    rows = seams(crossed, 2, covers, grades, updates=7, saved=0)
    table = {row["seam"]: row for row in rows}
    counts = {seam: row["crossed"] for seam, row in table.items() if row["crossed"]}
    assert counts == {
        "smashed": 3,
        "hidden_grad": 4,
        "smashed 2": 3,
        "caches 2": 2,
        "updates": 13,
        "lengths": 20,
        "timing": 20,
    }
    assert table["smashed 2"]["read_by"] == [{"attack": "a", "knowledge": "K4", "verdict": "ok"}]
    assert table["updates"]["read_by"][0]["knowledge"] == "K4+updates"
    assert table["hidden_grad"]["covered_by"] == [
        {"defense": "x", "covers": ["labels"]},
        {"defense": "y", "covers": ["gradients"]},
    ]
    assert unread(rows) == ["smashed", "hidden_grad", "caches 2", "lengths", "timing"]
    assert uncovered(rows) == ["updates", "lengths", "timing"]
    alone = {row["seam"]: row for row in with_readers(rows, [grade_of("c", ["smashed"])])}
    assert alone["smashed"]["verdict"] == "read"
    assert alone["smashed 2"]["verdict"] == "not read by any attack of this run"
    assert with_readers(list(alone.values()), grades) == rows  # nothing else depends on who attacks


def test_public_text_is_on_no_seam_and_keeping_evidence_changes_none(pm, tmp_path):
    e = experiment_from({**BASE, "train": {**BASE["train"], "steps": 1}})
    plain = run(e, plugins=pm)
    kept = run(e, plugins=pm, out=tmp_path, keep_evidence=True)  # which lets public queries cross
    seen = [result.numbers["undefended"] for result in (plain, kept)]
    assert seen[0]["seams"] == seen[1]["seams"]
    assert kept.cost["undefended"]["messages"] > plain.cost["undefended"]["messages"]
