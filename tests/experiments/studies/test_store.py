"""The store of a study: one writer, whole pieces, files kept once, and no other file taken for one."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys

import pytest

from vflair_core.errors import ExperimentError
from vflair_core.experiments.studies.store import (
    LARGE,
    MIGRATIONS,
    Outcome,
    drop_blobs,
    opened,
    share_files,
)


def test_what_is_written_is_read_back_and_a_failure_can_be_forgotten(tmp_path):
    with opened(tmp_path / "s.db", write=True) as store:
        store.write(
            "a",
            "arm",
            {"task": "t"},
            Outcome({"x": [1, 2.5, None]}, seconds=2.0, peak_memory_bytes=7),
        )
        store.write("b", "grades", {}, Outcome(error="it broke", trace="Traceback"))
        assert store.found("a") == {"x": [1, 2.5, None]}
        assert store.measured("a") == (2.0, 7)
        assert (store.found("b"), store.error("b"), store.error("a")) == (None, "it broke", "")
        assert list(store.seconds()) == [("arm", {"task": "t"}, 2.0)]
        assert store.forget_failures() == 1
        assert store.error("b") == ""
    with opened(tmp_path / "s.db", write=False) as store:
        assert store.found("a") == {"x": [1, 2.5, None]}


def test_only_one_process_writes_and_others_read_meanwhile(tmp_path):
    path = tmp_path / "s.db"
    with opened(path, write=True) as store:
        store.write("a", "arm", {}, Outcome({}))
        with opened(path, write=False) as reader:
            assert reader.found("a") == {}
        code = f"from vflair_core.experiments.studies.store import opened\nwith opened({str(path)!r}, write=True): pass"
        ended = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert f"Process {os.getpid()} is running the study" in ended.stderr
    with opened(path, write=True):
        pass


def test_a_finished_store_is_read_where_nothing_can_be_written(tmp_path):
    with opened(tmp_path / "s.db", write=True) as store:
        store.write("a", "arm", {}, Outcome({"x": 1}))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.db", "s.db.lock", "s.files"]
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert (modes["s.db"], modes["s.files"]) == (0o600, 0o700)  # private texts are in both
    assert sqlite3.connect(tmp_path / "s.db").execute("PRAGMA journal_mode").fetchone() == (
        "delete",
    )


@pytest.mark.parametrize("write", [True, False])
def test_what_is_no_store_is_refused_and_left_alone(tmp_path, write):
    (tmp_path / "text.db").write_bytes(b"no database at all, and long enough for a header " * 9)
    foreign = sqlite3.connect(tmp_path / "foreign.db")
    foreign.execute("CREATE TABLE mine (x)")
    foreign.commit()
    newer = sqlite3.connect(tmp_path / "newer.db")
    newer.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    newer.commit()
    before = {file.name: file.read_bytes() for file in tmp_path.glob("*.db")}
    for name, told in {
        "text": "is no study",
        "foreign": "but no study",
        "newer": "newer vflair",
    }.items():
        with (
            pytest.raises(ExperimentError, match=told),
            opened(tmp_path / f"{name}.db", write=write),
        ):
            pass
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.db")} == before
    assert not list(tmp_path.glob("text.*[!b]"))  # nothing is made beside what is not ours


def test_a_store_that_is_not_there_is_not_made_by_reading(tmp_path):
    with (
        pytest.raises(ExperimentError, match="vflair study FILE"),
        opened(tmp_path / "s.db", write=False),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_stores_of_several_machines_become_one(tmp_path):
    for name in "ab":
        with opened(tmp_path / f"{name}.db", write=True) as store:
            store.write(name, "arm", {}, Outcome({"of": name}))
            store.write(
                "both", "arm", {}, Outcome({"of": name}) if name == "b" else Outcome(error="lost")
            )
    with opened(tmp_path / "a.db", write=True) as store:
        assert store.take_in(tmp_path / "b.db") == 2
        assert store.take_in(tmp_path / "b.db") == 0
        assert [store.found(key)["of"] for key in ("a", "b", "both")] == ["a", "b", "b"]
        assert store.error("both") == ""


def test_large_files_of_equal_content_are_kept_once_and_go_with_their_last_folder(tmp_path):
    blobs = tmp_path / "blobs"
    for arm in ("arms/x", "arms/y"):
        (tmp_path / arm).mkdir(parents=True)
        (tmp_path / arm / "weights").write_bytes(b"w" * LARGE)
        (tmp_path / arm / "own").write_bytes(arm.encode() * LARGE)
        (tmp_path / arm / "small").write_bytes(b"s")
        share_files(tmp_path / arm, blobs)
    x, y = (tmp_path / arm for arm in ("arms/x", "arms/y"))
    assert (x / "weights").samefile(y / "weights")
    assert not (x / "own").samefile(y / "own")
    assert (y / "own").read_bytes() == b"arms/y" * LARGE
    assert len(list(blobs.iterdir())) == 3
    (y / "own").unlink()
    (y / "weights").unlink()
    drop_blobs(tmp_path)
    assert len(list(blobs.iterdir())) == 2
    assert (x / "weights").read_bytes() == b"w" * LARGE
