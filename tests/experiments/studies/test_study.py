"""Studies, small: the numbers of single runs, no work twice, and nothing lost whatever ends them."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from support.paths import SAMPLE_PLUGIN
from support.small_models import LLAMA
from vflair_core import plugin_manager, run
from vflair_core.errors import ExperimentError
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.studies.assembly import read_study
from vflair_core.experiments.studies.grid import grid_from
from vflair_core.experiments.studies.outlook import outlook
from vflair_core.experiments.studies.study import study
from vflair_core.testing import tiny_model

BASE = {
    "task": {"name": "words"},
    "model": {"config": LLAMA, "vocab_size": 300},
    "partition": {"head": 1, "tail": 1},
    "pretrain": {"steps": 3, "length": 8},
    "train": {"steps": 4, "batch_size": 4, "max_length": 16, "learning_rate": 0.01},
    "victims": {"count": 4, "max_length": 12, "bypass": 2, "queries": 2},
    "attacks": [{"name": "first-row", "knowledge": "K1"}],
    "isolation": "inline",
    "threads": 1,
}
SHIFT = {"label": "shift", "defenses": [{"name": "shift"}]}
GRID = {
    "experiment": BASE,
    "axes": {"defense": [{"label": "none"}, SHIFT]},
    "vary": {"seed": [0, 1]},
}
IN_HERE = {"backend": "sequential", "plugins": [SAMPLE_PLUGIN]}


def pieces_in(db):
    """The pieces of a store by kind, each with when it ended."""
    with sqlite3.connect(db) as database:
        rows = database.execute("SELECT kind, key, ended, seconds, error FROM pieces").fetchall()
    return {key: (kind, ended, seconds, error) for kind, key, ended, seconds, error in rows}


def kinds_in(db):
    return sorted(kind for kind, *_ in pieces_in(db).values())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    db = tmp_path_factory.mktemp("study") / "s.db"
    return db, study(grid_from(GRID), db, **IN_HERE)


# -- numbers --------------------------------------------------------------------------------------------


def test_each_cell_has_the_numbers_of_a_run_of_its_own(done, tmp_path):
    _, cells = done
    assert [tuple(cell.labels.values()) for cell in cells] == [
        ("none", "0"), ("none", "1"), ("shift", "0"), ("shift", "1"),
    ]  # fmt: skip
    plugins = plugin_manager([SAMPLE_PLUGIN])
    for keep, cell in zip((True, False, True, False), cells, strict=True):
        alone = run(cell.experiment, plugins=plugins, out=tmp_path / cell.key, keep_evidence=keep)
        assert cell.result.numbers_hash == alone.numbers_hash
        assert cell.result.samples == alone.samples
        assert cell.result.task == alone.task
        for arm, cost in alone.cost.items():
            if arm in cell.result.numbers:
                assert not keep or cell.result.cost[arm]["bytes"] == cost["bytes"]
                assert set(cell.result.cost[arm]) == set(cost)
    assert len({cell.result.numbers_hash for cell in cells}) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"check_unsplit": True, "attacks": []},
        {"defenses": [{"name": "gaussian-noise"}, {"name": "shift"}]},
        {"victims": BASE["victims"] | {"share_updates": True}, "attacks": [{"name": "which-weights", "knowledge": ["K4", "updates"]}]},
        {
            "adversary": {"name": "feature-space-hijacking", "knowledge": "K1", "options": {"steps": 2}},
            "attacks": [],
        },
    ],
    ids=["unsplit", "noise", "updates", "active"],
)  # fmt: skip
def test_so_have_cells_of_other_kinds(changes, tmp_path):
    e = experiment_from(BASE | {"defenses": [{"name": "shift"}]} | changes)
    (cell,) = study([e], tmp_path / "s.db", **IN_HERE)
    assert cell.error == ""
    alone = run(e, plugins=plugin_manager([SAMPLE_PLUGIN]))
    assert cell.result.numbers_hash == alone.numbers_hash


def test_processes_find_what_this_one_finds(done, tmp_path):
    """Also without any one-file plugin registered here: each process loads it."""
    _, cells = done
    others = study(grid_from(GRID), tmp_path / "s.db", workers=2, plugins=[SAMPLE_PLUGIN])
    assert [c.result.numbers_hash for c in others] == [c.result.numbers_hash for c in cells]
    assert [c.key for c in others] == [c.key for c in cells]


# -- no work twice --------------------------------------------------------------------------------------


def test_cells_share_their_public_phase_and_their_undefended_arm(done):
    db, _ = done
    assert kinds_in(db) == ["arm"] * 4 + ["grades"] * 4 + ["public"] * 2
    assert len(list(db.with_name("s.files").glob("arms/*"))) == 4


def test_what_is_done_is_not_run_again_and_another_attack_reads_what_is_kept(done):
    db, cells = done
    before = pieces_in(db)
    again = study(grid_from(GRID), db, **IN_HERE)
    assert pieces_in(db) == before
    assert [cell.result.numbers_hash for cell in again] == [c.result.numbers_hash for c in cells]

    attacks = [*BASE["attacks"], {"name": "takes-and-idles", "knowledge": "K1"}]
    more = study(grid_from(GRID | {"experiment": BASE | {"attacks": attacks}}), db, **IN_HERE)
    new = {key: each for key, each in pieces_in(db).items() if key not in before}
    assert [kind for kind, *_ in new.values()] == ["grades"] * 4
    assert {key: each for key, each in pieces_in(db).items() if key in before} == before
    for old, cell in zip(cells, more, strict=True):
        assert (
            cell.result.numbers["undefended"]["attacks"][0]
            == old.result.numbers["undefended"]["attacks"][0]
        )
        assert cell.key != old.key
    study(grid_from(GRID), db, **IN_HERE)  # the list of cells is the one of before


def test_evidence_that_was_removed_is_made_again_where_an_attack_reads_it(done, tmp_path):
    db, cells = done
    with sqlite3.connect(db) as source, sqlite3.connect(tmp_path / "s.db") as copy:
        source.backup(copy)  # without its files
        copy.execute("DELETE FROM pieces WHERE kind = 'grades'")
    again = study(grid_from(GRID), tmp_path / "s.db", **IN_HERE)
    assert [c.result.numbers_hash for c in again] == [c.result.numbers_hash for c in cells]


def test_an_arm_of_which_files_are_gone_is_run_again(tmp_path):
    db, e = tmp_path / "s.db", experiment_from(BASE)
    (before,) = study([e], db, **IN_HERE)
    next(
        db.with_name("s.files").glob("arms/*/evidence-undefended/tokenizer/tokenizer.json")
    ).unlink()
    more = experiment_from(
        BASE | {"attacks": [*BASE["attacks"], {"name": "takes-and-idles", "knowledge": "K1"}]}
    )
    (after,) = study([more], db, **IN_HERE)
    assert after.error == ""
    old, new = (cell.result.numbers["undefended"] for cell in (before, after))
    assert new["attacks"][0] == old["attacks"][0]
    assert kinds_in(db) == ["arm", "grades", "grades", "public"]


def test_files_that_decide_numbers_are_in_the_key(tmp_path, monkeypatch):
    """Data of one's own, a plugin that chooses the cut, and everything in the folder of a model."""
    monkeypatch.chdir(tmp_path)
    data, cutter, model = tmp_path / "data.csv", tmp_path / "cutter.py", tmp_path / "model"
    data.write_text("text\n" + "some words here\n" * 40)
    cutter.write_text(CUTTER.format(head=1))
    tiny_model("llama").save_pretrained(model)
    task = {"name": "own", "options": {"data": "data.csv", "kind": "causal-lm", "text": "text"}}
    e = experiment_from(BASE | {"task": task, "model": {"name": str(model)}, "pretrain": {}})

    def key():
        with_cutter = {"plugins": [SAMPLE_PLUGIN, cutter]}
        return outlook([e], tmp_path / "s.db", **with_cutter).cells[0].key

    keys = [key(), key()]
    data.write_text("text\n" + "other words here\n" * 40)
    keys.append(key())
    cutter.write_text(CUTTER.format(head=0))
    keys.append(key())
    config = model / "config.json"
    config.write_text(config.read_text().replace("rms_norm_eps", "rms_norm_epsilon"))
    keys.append(key())
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


CUTTER = """
from vflair_core import Partition, hookimpl

@hookimpl
def vflair_partition(model, partition):
    return Partition(head={head}, tail=1)
"""


def test_a_tuned_cell_whose_attack_fails_has_failed(tmp_path):
    knob = {"option": "by", "weak": 1e-4, "strong": 1e3}
    learns = {"pretrain": {"steps": 60, "length": 8}, "train": BASE["train"] | {"steps": 40}}
    grid = {
        "experiment": BASE | learns | {"attacks": [{"name": "boom", "knowledge": "K1"}]},
        "axes": {"defense": [SHIFT | {"knob": knob}]},
        "tune": {"keep": 0.5, "trials": 2},
    }
    plugin = tmp_path / "boom.py"
    plugin.write_text(BOOM)
    (cell,) = study(
        grid_from(grid), tmp_path / "s.db", backend="sequential", plugins=[SAMPLE_PLUGIN, plugin]
    )
    assert cell.tuned["value"] is not None
    assert (cell.result, cell.failed) == (None, True)
    assert "boom" in cell.error


BOOM = """
from vflair_core import hookimpl

@hookimpl
def vflair_attacks():
    return {"boom": boom}

def boom(smashed):
    raise RuntimeError("no idea")
"""


def test_a_study_is_read_without_its_plugins_and_its_files(done, tmp_path):
    db, cells = done
    (tmp_path / "s.db").write_bytes(db.read_bytes())
    read = read_study(tmp_path / "s.db")
    assert [(c.key, c.labels, c.result.to_json(), c.grades) for c in read] == [
        (c.key, c.labels, c.result.to_json(), c.grades) for c in cells
    ]


def test_all_that_decides_numbers_is_in_the_key(done, tmp_path):
    _, cells = done
    plugin = tmp_path / "sample_plugin.py"
    plugin.write_text(SAMPLE_PLUGIN.read_text() + "\n# changed\n")
    keys = {
        "as it is": study_keys(GRID, tmp_path / "a.db", SAMPLE_PLUGIN),
        "plugin": study_keys(GRID, tmp_path / "b.db", plugin),
        "an option": study_keys(
            GRID | {"experiment": BASE | {"train": BASE["train"] | {"steps": 5}}},
            tmp_path / "c.db",
            SAMPLE_PLUGIN,
        ),
    }
    assert keys["as it is"] == [cell.key for cell in cells]
    assert not set(keys["plugin"]) & set(keys["as it is"])
    assert not set(keys["an option"]) & set(keys["as it is"])


def study_keys(grid, db, plugin):
    return [cell.key for cell in outlook(grid_from(grid), db, plugins=[plugin]).cells]


def test_observers_are_told_of_a_new_cell_what_they_are_told_of_its_run(done, tmp_path):
    """All but what is only there while it happens; of a cell that was there before, nothing."""
    _, cells = done
    plugin = tmp_path / "listener.py"
    plugin.write_text(LISTENER.format(log=str(tmp_path / "log")))
    told = {}
    for name in ("study", "again", "run"):
        if name == "run":
            files = [SAMPLE_PLUGIN, plugin]
            run(
                cells[2].experiment,
                plugins=plugin_manager(files),
                out=tmp_path / "r",
                keep_evidence=True,
            )
        else:
            (tmp_path / "log").touch()
            study(
                [cells[2].experiment],
                tmp_path / "s.db",
                backend="sequential",
                plugins=[SAMPLE_PLUGIN, plugin],
            )
        log = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
        told[name] = log[log.find("run_started") :] if "run_started" in log else ""
        (tmp_path / "log").unlink(missing_ok=True)
    assert told["again"] == ""
    assert told["study"].splitlines() == told["run"].splitlines()
    assert "evaluated defended 4" in told["run"]


LISTENER = """
from vflair_core import hookimpl

def tell(*words):
    with open({log!r}, "a") as file:
        print(*words, file=file)

@hookimpl
def vflair_run_started(experiment):
    tell("run_started", experiment.digest)

@hookimpl
def vflair_arm_started(arm, seed):
    tell("arm_started", arm, seed)

@hookimpl
def vflair_step_finished(arm, step, loss):
    tell("step", arm, step, loss)

@hookimpl
def vflair_evaluated(arm, step, metrics):
    tell("evaluated", arm, step, sorted(metrics.items()))

@hookimpl
def vflair_attack_finished(arm, name, grade):
    tell("attack", arm, name, grade["attack_performance"], grade["verdict"])

@hookimpl
def vflair_run_finished(result):
    tell("run_finished", result.numbers_hash)
"""


# -- tuning ---------------------------------------------------------------------------------------------


def test_a_defense_is_tuned_then_attacked_at_the_setting_that_was_found(tmp_path):
    knob = {"option": "by", "weak": 1e-4, "strong": 1e3}
    learns = BASE | {"pretrain": {"steps": 60, "length": 8}, "train": BASE["train"] | {"steps": 40}}
    grid = {
        "experiment": learns,
        "axes": {"defense": [{"label": "none"}, SHIFT | {"knob": knob}]},
        "tune": {"keep": 0.8, "trials": 4},
    }
    db = tmp_path / "s.db"
    plain, tuned = study(grid_from(grid), db, **IN_HERE)
    facts = tuned.tuned
    performances = {trial["value"]: trial["main_performance"] for trial in facts["trials"]}
    best = plain.result.numbers["undefended"]["main_performance"]
    assert facts["target"] == pytest.approx(facts["chance"] + 0.8 * (best - facts["chance"]))
    enough = [value for value, reached in performances.items() if reached >= facts["target"]]
    assert facts["value"] == max(enough)
    assert tuned.experiment.defenses[0].options == {"by": facts["value"]}
    assert tuned.result.numbers["defended"]["main_performance"] == performances[facts["value"]]
    assert kinds_in(db) == ["arm"] * (1 + len(performances)) + ["grades"] * 2 + ["public"]
    assert len(list(db.with_name("s.files").glob("arms/*"))) == 2  # no evidence of other trials
    before = pieces_in(db)
    study(grid_from(grid), db, **IN_HERE)
    assert pieces_in(db) == before


def test_where_the_undefended_model_has_learned_nothing_there_is_nothing_to_keep(tmp_path):
    knob = {"option": "by", "weak": 1e-4, "strong": 1e3}
    axes = {"defense": [SHIFT | {"knob": knob}]}
    lazy = BASE | {"train": BASE["train"] | {"steps": 0}, "pretrain": {}}
    (cell,) = study(grid_from({"experiment": lazy, "axes": axes}), tmp_path / "s.db", **IN_HERE)
    assert cell.error.startswith("The undefended model is no better than chance")
    assert (cell.result, cell.failed, cell.tuned["value"]) == (None, False, None)


# -- what goes wrong ------------------------------------------------------------------------------------

UNLUCKY = """
import os, pathlib, signal, time
from vflair_core import hookimpl

@hookimpl
def vflair_step_finished(arm, step, loss):
    place = pathlib.Path({place!r})
    if arm == "defended" and (place / "armed").exists():
        {action}
"""
ACTIONS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "slow": '(place / "reached").touch(); time.sleep(60)',
}


@pytest.fixture
def unlucky(tmp_path):
    """A plugin that does something bad while a defended arm trains, as long as a file is there."""
    (tmp_path / "armed").touch()

    def make(action):
        plugin = tmp_path / f"{action}.py"
        plugin.write_text(UNLUCKY.format(action=ACTIONS[action], place=str(tmp_path)))
        return [SAMPLE_PLUGIN, plugin]

    return make


def test_a_piece_that_fails_keeps_its_error_and_the_others_go_on(tmp_path):
    attacks = [{"name": "vocabulary-search", "knowledge": "K1"}]  # needs more than it is granted
    wrong = BASE | {"victims": BASE["victims"] | {"count": 4000}}
    each = [experiment_from(BASE), experiment_from(wrong)]
    db = tmp_path / "s.db"
    fine, failed = study(each, db, **IN_HERE)
    assert fine.result is not None
    assert failed.failed
    assert failed.error.startswith("undefended: ")
    assert "4000" in failed.error
    before = pieces_in(db)
    study(each, db, **IN_HERE)
    assert pieces_in(db) == before  # it is not tried again by itself
    study(each, db, retry=True, **IN_HERE)
    assert {k for k, (*_, e) in pieces_in(db).items() if e} == {
        k for k, (*_, e) in before.items() if e
    }
    with pytest.raises(ExperimentError, match=r"VocabularySearch needs head.*Nothing was run"):
        study([experiment_from(BASE | {"attacks": attacks})], db, **IN_HERE)


@pytest.mark.slow
def test_a_process_that_is_killed_costs_its_own_piece_only(tmp_path, unlucky):
    plugins = unlucky("killed")
    cells = study(grid_from(GRID), tmp_path / "s.db", workers=2, plugins=plugins)
    assert [cell.result is not None for cell in cells] == [True, True, False, False]
    assert all("ended from outside" in cell.error for cell in cells[2:])
    (tmp_path / "armed").unlink()
    cells = study(grid_from(GRID), tmp_path / "s.db", workers=2, plugins=plugins, retry=True)
    assert all(cell.result is not None for cell in cells)


PROGRAM = """
import sys
from vflair_core.experiments.studies.grid import grid_from
from vflair_core.experiments.studies.outlook import outlook
from vflair_core.experiments.studies.study import study
from vflair_core.testing import tiny_model
if __name__ == "__main__":
    study(grid_from({grid!r}), {db!r}, workers=2, plugins={plugins!r})
"""


@pytest.fixture
def begun(tmp_path, unlucky):
    """A study in a process of its own that has done all but the defended arms, which take very long."""
    plugins, db = unlucky("slow"), tmp_path / "s.db"
    code = PROGRAM.format(grid=GRID, db=str(db), plugins=[str(file) for file in plugins])
    (tmp_path / "program.py").write_text(code)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        while not (tmp_path / "reached").exists():
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.1)
        yield process, db, plugins
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.stderr.close()
        process.wait()


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_with_what_was_not_done(begun, done, tmp_path):
    process, db, plugins = begun
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = pieces_in(db)
    assert {"public", "arm"} <= {kind for kind, *_ in before.values()}
    (tmp_path / "armed").unlink()
    cells = study(grid_from(GRID), db, backend="sequential", plugins=plugins)
    after = pieces_in(db)
    assert before.items() <= after.items()
    assert len(after) == 10
    assert [c.result.numbers_hash for c in cells] == [c.result.numbers_hash for c in done[1]]


@pytest.mark.slow
def test_a_first_ctrl_c_lets_end_what_is_running(begun, tmp_path):
    process, db, _ = begun
    before = pieces_in(db)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    time.sleep(1)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)  # a second one does not wait
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"KeyboardInterrupt" in said
    assert before.items() <= pieces_in(db).items()


def test_without_joblib_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(ExperimentError, match=r"vflair-core\[study\].*Nothing was run"):
        study(grid_from(GRID), tmp_path / "s.db", **IN_HERE)
