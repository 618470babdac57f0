"""Where a run writes: what is there before, what is left of it, and who may read it."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from support.paths import SAMPLE_PLUGIN
from support.small_models import LLAMA
from vflair_core import (
    AttackSpec,
    Transcript,
    attack_again,
    hookimpl,
    plugin_manager,
    run,
    run_cuts,
)
from vflair_core.errors import AttackError, ExperimentError, PluginError
from vflair_core.experiments.config import experiment_from, read_experiment

ATTACK = {"name": "first-row", "knowledge": "K1"}


@pytest.fixture
def pm():
    return plugin_manager([SAMPLE_PLUGIN], entry_point_group="vflair.none")


def small(**changes):
    return experiment_from(
        {
            "task": {"name": "words"},
            "model": {"config": LLAMA, "vocab_size": 300},
            "partition": {"head": 1, "tail": 1},
            "train": {"steps": 1, "batch_size": 4, "max_length": 12},
            "victims": {"count": 3, "max_length": 12, "bypass": 1},
            "defenses": [{"name": "shift"}],
            "attacks": [ATTACK],
            "isolation": "inline",
            **changes,
        }
    )


def stopping(pm, arm, error):
    """Let a run end with `error` in the middle of an arm."""

    class Stop:
        @hookimpl
        def vflair_step_finished(self, arm, step, loss, *, where=arm):
            if arm == where:
                raise error

    pm.register(Stop(), f"stop {arm}")


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- before anything is computed -----------------------------------------------------------------------------


def a_file(folder):
    (folder / "file").write_text("mine")
    return folder / "file"


def deep(folder, length):
    """A folder that can be made, and in which the longest names of a run would not fit."""
    while len(str(folder)) < length - 200:
        folder /= "y" * 99
    return folder / ("y" * (length - len(str(folder)) - 1))


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (a_file, "it is a file"),
        (lambda folder: a_file(folder) / "below", "Not a directory"),
        (lambda folder: folder / ("x" * 300), "File name too long"),
        (lambda folder: deep(folder, 4040), "File name too long"),
        (lambda folder: Path("/proc/nowhere/run"), "No such file"),
    ],
    ids=["a file", "below a file", "name too long", "path too long", "no writable disk"],
)
def test_a_place_that_cannot_be_written_to_is_told_before_anything_is_built(
    pm, tmp_path, place, reason
):
    task = {"name": "no such task"}  # would be told next
    where = place(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ExperimentError, match=rf"Nothing can be written to .*{reason}.*--out"):
        run(small(task=task), plugins=pm, out=where)
    assert contents(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"file"}


def test_a_folder_that_refuses_files_is_told_with_the_reason(pm, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("vflair_core.experiments.output.tempfile.NamedTemporaryFile", refuse)
    with pytest.raises(ExperimentError, match="Read-only file system"):
        run(small(), plugins=pm, out=tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []  # what was made for it is gone


def test_an_experiment_that_cannot_be_built_leaves_no_folder_and_no_run_of_before(pm, tmp_path):
    with pytest.raises(Exception, match="no such task"):
        run(small(task={"name": "no such task"}), plugins=pm, out=tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    run(small(), plugins=pm, out=tmp_path)
    before = contents(tmp_path)
    with pytest.raises(Exception, match="no such task"):
        run(small(task={"name": "no such task"}), plugins=pm, out=tmp_path, overwrite=True)
    assert contents(tmp_path) == before


# -- runs do not mix -----------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_refused_and_nothing_in_it_changes(pm, tmp_path):
    run(small(), plugins=pm, out=tmp_path, keep_evidence=True)
    before = contents(tmp_path)
    with pytest.raises(
        ExperimentError, match=r"holds a run \(undefended, defended done\).*--overwrite"
    ):
        run(small(), plugins=pm, out=tmp_path)
    assert contents(tmp_path) == before
    (tmp_path / "result.json").unlink()
    (tmp_path / "experiment.toml").unlink()
    with pytest.raises(ExperimentError, match=r"holds a run: transcript.*--overwrite"):
        run(small(), plugins=pm, out=tmp_path)


def test_what_a_run_of_before_left_goes_away_and_nothing_else(pm, tmp_path):
    saved = small(save=True, seeds=[0, 1, 2, 3, 4], attacks=[])
    run(saved, plugins=pm, out=tmp_path, keep_evidence=True)
    mine = [
        tmp_path / "notes.txt",
        tmp_path / "seed-3" / "evidence-defended" / "notes.txt",
        tmp_path / "defended-by-me" / "result.json",
    ]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    run(small(defenses=[]), plugins=pm, out=tmp_path, overwrite=True)
    ours = {"result.json", "experiment.toml", "transcript.safetensors"}
    assert set(contents(tmp_path)) == {Path(name) for name in ours} | {
        file.relative_to(tmp_path) for file in mine
    }
    assert all(file.read_text() == "mine" for file in mine)
    with pytest.raises(AttackError, match="holds no evidence"):
        attack_again(tmp_path, [AttackSpec("first-row", knowledge="K1")], plugins=pm)


@pytest.mark.parametrize("name", ["result.json", "experiment.toml"])
def test_a_file_of_that_name_that_no_run_wrote_is_never_replaced(pm, tmp_path, name):
    (tmp_path / name).write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(ExperimentError, match=f"{name} is not of a run"):
            run(small(), plugins=pm, out=tmp_path, overwrite=overwrite)
    assert (tmp_path / name).read_text() == "{}"


def test_nothing_is_written_through_a_link(pm, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "out"
    out.mkdir()
    (out / "evidence-defended").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExperimentError, match="evidence-defended is not of a run"):
        run(small(), plugins=pm, out=out, keep_evidence=True, overwrite=True)


# -- a run that ends early -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "seen"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (RuntimeError("broken"), PluginError)],
    ids=["Ctrl-C", "error"],
)
def test_a_run_that_ends_early_leaves_the_arm_that_was_finished(pm, tmp_path, error, seen):
    whole = run(small(), plugins=pm, out=tmp_path / "whole", keep_evidence=True)
    stopping(pm, "defended", error)
    tmp_path /= "half"
    with pytest.raises(seen) as raised:
        run(small(), plugins=pm, out=tmp_path, keep_evidence=True, strict=True)
    table = json.loads((tmp_path / "result.json").read_text())
    assert table["finished"] is False
    assert table["numbers"] == {"undefended": json.loads(json.dumps(whole.numbers["undefended"]))}
    assert Transcript.load(tmp_path / "transcript-undefended.safetensors").messages
    assert read_experiment(tmp_path / "experiment.toml") == small()
    assert f"What was finished is in {tmp_path}: undefended." in raised.value.__notes__
    with pytest.raises(AttackError, match=r"is unfinished: only undefended is done.*--overwrite"):
        attack_again(tmp_path, [AttackSpec("first-row", knowledge="K1")], plugins=pm)
    with pytest.raises(ExperimentError, match=r"holds an unfinished run \(undefended done\)"):
        run(small(), plugins=pm, out=tmp_path)


def test_a_run_of_which_nothing_was_finished_leaves_nothing(pm, tmp_path):
    stopping(pm, "undefended", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(small(save=True), plugins=pm, out=tmp_path / "a" / "b", keep_evidence=True)
    assert list(tmp_path.iterdir()) == []


def test_of_several_seeds_each_that_was_finished_is_a_run_of_its_own(pm, tmp_path):
    e = small(seeds=[3, 4, 5, 6, 7], defenses=[])
    done = []

    class Stop:
        @hookimpl
        def vflair_attack_finished(self, arm, name, grade):
            done.append(arm)
            if len(done) == 3:
                raise KeyboardInterrupt

    pm.register(Stop())
    with pytest.raises(KeyboardInterrupt):
        run(e, plugins=pm, out=tmp_path, keep_evidence=True)
    others = plugin_manager([SAMPLE_PLUGIN], entry_point_group="vflair.none")
    first = json.loads((tmp_path / "result.json").read_text())
    assert first["finished"] is False
    assert first["experiment"]["seeds"] == [3, 4, 5, 6, 7]
    for seed in (3, 4):
        table = json.loads((tmp_path / f"seed-{seed}" / "result.json").read_text())
        assert table["finished"] is True
        alone = read_experiment(tmp_path / f"seed-{seed}" / "experiment.toml")
        again = run(alone, plugins=others, out=tmp_path / f"again-{seed}", keep_evidence=True)
        assert again.numbers_hash == table["numbers_hash"]
        assert attack_again(
            tmp_path / f"seed-{seed}", [AttackSpec("first-row", knowledge="K1")], plugins=pm
        )
    assert json.loads((tmp_path / "seed-5" / "result.json").read_text())["finished"] is False


def test_a_sweep_that_ends_early_leaves_the_cuts_that_were_finished(pm, tmp_path):
    pytest.importorskip("matplotlib")
    stopping(pm, "defended", KeyboardInterrupt())
    e = small(defenses=[], partition={"head": 1, "tail": 0})
    run_cuts(e, [0, 1], tmp_path / "whole", plugins=pm)
    with pytest.raises(ExperimentError, match=r"holds a run: cuts\.json"):
        run_cuts(e, [2], tmp_path / "whole", plugins=pm)
    run_cuts(e, [2], tmp_path / "whole", plugins=pm, overwrite=True)
    assert {p.name for p in (tmp_path / "whole").iterdir()} == {"head-2", "cuts.json", "cuts.svg"}
    with pytest.raises(Exception, match="head") as raised:
        run_cuts(e, [0, 99], tmp_path / "half", plugins=pm)
    assert json.loads((tmp_path / "half" / "head-0" / "result.json").read_text())["finished"]
    assert any("head-0" in note for note in raised.value.__notes__)
    assert not (tmp_path / "half" / "head-99").exists()


def test_a_disk_that_is_full_costs_no_arm_that_was_finished(pm, tmp_path, monkeypatch):
    save = Transcript.save

    def full(self, path):
        if Path(path).name == "transcript.safetensors.part":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, path)

    monkeypatch.setattr(Transcript, "save", full)
    with pytest.raises(
        ExperimentError, match=r"transcript.safetensors cannot be written: No space left"
    ):
        run(small(), plugins=pm, out=tmp_path)
    table = json.loads((tmp_path / "result.json").read_text())
    assert set(table["numbers"]) >= {"undefended", "defended"}
    assert table["finished"] is False
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


# -- who may read it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_folders_and_files_are_for_nobody_else_whatever_the_umask(pm, tmp_path, umask):
    before = os.umask(umask)
    try:
        run(small(save=True), plugins=pm, out=tmp_path / "a" / "b", keep_evidence=True)
    finally:
        os.umask(before)
    modes = {p.relative_to(tmp_path): stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    wrong = {
        str(path): oct(mode)
        for path, mode in modes.items()
        if mode != (0o700 if (tmp_path / path).is_dir() else 0o600)
    }
    assert not wrong
    assert len(modes) > 20
