"""What is submitted can be checked, is refused when it breaks a rule or was changed, and holds nothing private."""

from __future__ import annotations

import copy
import json

import pytest

from support.paths import SAMPLE_PLUGIN
from support.small_models import LLAMA
from vflair_core.errors import ExperimentError
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.studies.assembly import read_study
from vflair_core.experiments.studies.grid import grid_from
from vflair_core.experiments.studies.leaderboard import leaderboard
from vflair_core.experiments.studies.pieces import cell_key
from vflair_core.experiments.studies.rules import Rules, digest_of, problems
from vflair_core.experiments.studies.study import study
from vflair_core.experiments.studies.submission import read_submission, submit
from vflair_core.experiments.studies.verification import verify_result

EXPERIMENT = {
    "task": {"name": "words"},
    "model": {"config": LLAMA, "vocab_size": 300},
    "partition": {"head": 1, "tail": 1},
    "train": {"steps": 2, "batch_size": 4, "max_length": 16},
    "victims": {"count": 5, "max_length": 12, "bypass": 2, "queries": 8},
    "attacks": [
        {"name": "nearest-embedding", "knowledge": "K1"},
        {"name": "linear-inverter", "knowledge": ["K1", "queries"]},
        {"name": "vocabulary-search", "knowledge": "K4"},
    ],
}
GRID = {
    "experiment": EXPERIMENT,
    "axes": {"defense": [{"label": "none"}, {"label": "shift", "defenses": [{"name": "shift"}]}]},
    "vary": {"seed": [0, 1]},
}
FEW = Rules(seeds=2, victims=10)
FACTS = {"title": "Shifting hides nothing", "by": "the tests", "plugins": [SAMPLE_PLUGIN]}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    db = tmp_path_factory.mktemp("study") / "s.db"
    study(grid_from(GRID), db, backend="sequential", plugins=[SAMPLE_PLUGIN])
    return db


@pytest.fixture
def submitted(done, tmp_path):
    path = tmp_path / "board" / "shift.json"
    path.parent.mkdir()
    submit(done, path, rules=FEW, **FACTS)
    return path


def test_a_submission_holds_what_was_run_and_found_and_nothing_private(done, submitted):
    content = read_submission(submitted, FEW)
    cells = read_study(done)
    assert [entry["numbers_hash"] for entry in content["cells"]] == [
        c.result.numbers_hash for c in cells
    ]
    assert content["plugins"][SAMPLE_PLUGIN.name] == SAMPLE_PLUGIN.read_text()
    text = submitted.read_text()
    samples = [s["private"] for cell in cells for s in cell.result.samples]
    assert samples
    assert not [each for each in samples if each in text]
    assert "river stone" not in json.dumps(content["cells"])


def test_it_is_run_again_bit_for_bit(submitted, tmp_path):
    with pytest.raises(ExperimentError, match=r"brings code: sample_plugin\.py.*--trust"):
        verify_result(submitted, tmp_path / "again.db", rules=FEW)
    verdicts = verify_result(
        submitted, tmp_path / "again.db", cells=2, trust=True, rules=FEW, backend="sequential"
    )
    assert [(v.labels["defense"], v.verdict, v.differences) for v in verdicts] == [
        ("none", "equal", ()),
        ("shift", "equal", ()),
    ]


def changed(submitted, change, *, sign=True):
    content = json.loads(submitted.read_text())
    change(content)
    if sign:
        content["digest"] = digest_of(content)
    submitted.write_text(json.dumps(content))
    return content


def test_numbers_that_do_not_come_again_are_named(submitted, tmp_path):
    def other(content):
        for entry in content["cells"]:
            if entry["labels"]["defense"] == "shift":
                entry["numbers"]["defended"]["losses"][1] += 1e-9
            entry["numbers_hash"] = hashed(entry["numbers"])

    changed(submitted, other)
    none, shift = verify_result(
        submitted, tmp_path / "again.db", cells=2, trust=True, rules=FEW, backend="sequential"
    )
    assert (none.verdict, shift.verdict) == ("equal", "differs")
    assert [each.split(":")[0] for each in shift.differences] == ["defended.losses[1]"]


def hashed(numbers):
    from vflair_core import Result

    return Result(numbers, {}, {}, "").numbers_hash


def test_other_versions_need_be_alike_only(submitted, tmp_path):
    def older(content):
        for entry in content["cells"]:
            entry["environment"]["versions"]["torch"] = "2.0"
            entry["key"] = cell_key(experiment_from(entry["experiment"]), entry["environment"])
            entry["numbers"]["undefended"]["losses"][0] += 1e-6
            entry["numbers_hash"] = hashed(entry["numbers"])
        better = content["cells"][0]["numbers"]
        better["undefended"]["main_performance"] += 0.2
        content["cells"][0]["numbers_hash"] = hashed(better)

    changed(submitted, older)
    verdicts = verify_result(
        submitted, tmp_path / "again.db", trust=True, rules=FEW, backend="sequential"
    )
    assert [each.verdict for each in verdicts] == ["differs", "alike", "alike", "alike"]
    assert "main performance" in verdicts[0].differences[0]
    assert all("torch: 2.0 there" in each.differences[-1] for each in verdicts)


def grade(content):
    return content["cells"][0]["numbers"]["undefended"]["attacks"][0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c["cells"][0]["numbers"]["undefended"].update(main_performance=1.0), "numbers are not those"),
        (lambda c: c["cells"][0]["experiment"].update(seed=9), "key is not that of its experiment"),
        (lambda c: c["cells"][0]["environment"]["versions"].update(torch="9"), "key is not that of"),
        (lambda c: c["cells"][0]["experiment"].update(isolation="inline"), "isolation is"),
        (lambda c: c["plugins"].clear(), "is a file that is not part of it"),
        (lambda c: c["plugins"].update({SAMPLE_PLUGIN.name: "x = 1"}), "is a file that is not part of it"),
        (lambda c: c["cells"].pop(), "1 seeds, and 2 are needed"),
        (lambda c: c.update(title=" "), "has no title"),
        (lambda c: c.update(title=3), "not as `vflair submit` writes one"),
        (lambda c: c.update(cells=[3]), "not as `vflair submit` writes one"),
        (lambda c: c["cells"][0].pop("numbers"), "not as `vflair submit` writes one"),
        (lambda c: c["cells"].append(c["cells"][0]), "there twice"),
        (lambda c: c["plugins"].update({"../x.py": "1"}), "no name of a plugin's file"),
        (lambda c: c["cells"][0]["experiment"].update(channel="grpc://10.0.0.1:1"), "must not have to ask a machine"),
        (lambda c: c["cells"][2]["numbers"].pop("defended"), "has not the arms"),
        (lambda c: grade(c).update(attack_performance=0.0), "its hits are"),
        (lambda c: grade(c).update(interval=[1.5, 2.0]), r"is right at a rate of"),
        (lambda c: grade(c).update(target="token"), "which is none of"),
        (lambda c: grade(c).update(negative_control="fine"), "no negative control"),
        (lambda c: grade(c).update(attack="another"), "not of the attacks of its experiment"),
        (lambda c: c["cells"][0]["numbers"]["undefended"]["attacks"].clear(), "not of the attacks of its experiment"),
        (lambda c: c["cells"][0]["hits"]["undefended"][0].extend([[0, 0]] * 9), "hits that no run can have"),
        (lambda c: c["cells"][2]["numbers"]["dcs"].update(normalised_worst=0.123), "scores are not those of its grades"),
        (lambda c: c["cells"][0]["numbers"]["undefended"]["strongest"].append({}), "strongest attacks are not those"),
        (lambda c: c["cells"].clear(), "no cell with a result"),
        (lambda c: c["cells"][2]["numbers"]["defended"]["evaluated"].update(tokens=False), "no attack on tokens took the defense into account"),
        (lambda c: c["cells"][2]["numbers"]["defended"]["attacks"][0].update(positive_control=None), "no positive control"),
        (lambda c: c["cells"][0]["numbers"]["undefended"]["attacks"][0].update(negative_control=None), "no negative control"),
        (lambda c: [e["hits"].update(undefended=[[]]) for e in c["cells"]], "0 graded victims"),
        (lambda c: c["cells"][2]["experiment"]["attacks"][0].update(options={"a": 1}), "different attacks or with different budgets"),
    ],
)  # fmt: skip
def test_each_rule_is_checked_and_all_that_is_wrong_is_told(submitted, change, told):
    content = changed(submitted, change)
    assert any(told in each for each in problems(content, FEW))
    with pytest.raises(ExperimentError, match=told):
        read_submission(submitted, FEW)


def test_what_was_changed_after_it_was_made_is_refused(submitted):
    changed(submitted, lambda c: c.update(by="somebody else"), sign=False)
    with pytest.raises(ExperimentError, match="changed after it was made"):
        read_submission(submitted, FEW)


def test_tuning_with_another_budget_is_told(submitted):
    content = read_submission(submitted, FEW)
    tuned = {"option": "by", "value": 1.0, "keep": 0.9, "trials": []}
    for number, budget in ((2, 4), (3, 9)):
        content["cells"][number]["tuned"] = {**copy.deepcopy(tuned), "budget": budget}
    content["digest"] = digest_of(content)
    assert any("tuned with 4 to 9 trainings" in each for each in problems(content, FEW))


def test_a_study_that_is_not_done_or_too_small_is_not_submitted(done, tmp_path):
    with pytest.raises(
        ExperimentError, match=r"(?s)cannot be submitted.*2 seeds, and 3 are needed.*10 graded"
    ):
        submit(done, tmp_path / "x.json", **FACTS)
    assert not (tmp_path / "x.json").exists()
    wrong = EXPERIMENT | {"victims": {"count": 4000}}
    study(
        grid_from({"experiment": wrong}),
        tmp_path / "half.db",
        backend="sequential",
        plugins=[SAMPLE_PLUGIN],
    )
    with pytest.raises(ExperimentError, match=r"1 of 1 cells of .* are not done: .*4000"):
        submit(tmp_path / "half.db", tmp_path / "x.json", **FACTS)


def test_the_leaderboard_is_made_of_the_files(submitted, monkeypatch):
    from vflair_core.experiments.studies import leaderboard as page

    monkeypatch.setattr(page, "read_submission", lambda path: read_submission(path, FEW))
    text = leaderboard(submitted.parent)
    content = read_submission(submitted, FEW)
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["none", "shift"]
    mains = [
        [
            e["numbers"][arm]["main_performance"]
            for e in content["cells"]
            if e["labels"]["defense"] == d
        ]
        for d, arm in (("none", "undefended"), ("shift", "defended"))
    ]
    for row, main in zip(rows, mains, strict=True):
        assert f"{sum(main) / 2:.3f}" in row
        assert "(leaderboard/shift.json)" in row
    assert "reference" in rows[0]
    # Who was granted answered queries is not shown as if K1 had been enough.
    heads = [cell.strip() for cell in text.splitlines()[-len(rows) - 2].split("|")]
    asked = [
        row["attack_performance"]
        for e in content["cells"][:2]
        for row in e["numbers"]["undefended"]["strongest"]
        if row["knowledge"] == "K1 + queries"
    ]
    cells = [cell.strip() for cell in rows[0].split("|")]
    assert cells[heads.index("read by K1 + queries")].startswith(f"{sum(asked) / 2:.3f} ")
    assert "read by K2 + queries" not in heads
    plain = cells[heads.index("read by K1")] if "read by K1" in heads else "–"
    assert "linear-inverter" not in plain


def test_what_was_attacked_otherwise_stands_in_a_table_of_its_own(submitted, monkeypatch):
    from vflair_core.experiments.studies import leaderboard as page

    content = read_submission(submitted, FEW)
    other = copy.deepcopy(content)
    for entry in other["cells"]:
        entry["experiment"]["attacks"].pop(0)
    each = {"a.json": content, "b.json": other}
    for name in each:
        (submitted.parent / name).write_text("{}")
    submitted.unlink()
    monkeypatch.setattr(page, "read_submission", lambda path: each[path.name])
    text = leaderboard(submitted.parent)
    assert text.count("\n## words") + text.count("\n## llama") == 2
    assert text.count("Attacked by `linear-inverter` (K1 + queries)") == 1
    assert text.count("Attacked by `nearest-embedding` (K1)") == 1
