"""The process of an attack sees its folder and its packages, and changes nothing that is kept."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import nullcontext
from types import ModuleType

import pytest

from support.paths import CHEATING_ATTACKS, SAMPLE_PLUGIN
from support.small_models import LLAMA
from vflair_core import attack_again, plugin_manager, run
from vflair_core.attacks import fence, isolation
from vflair_core.attacks.fence import IMPORTED, fence_here
from vflair_core.errors import AttackError
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.experiment import AttackSpec

FENCED = pytest.mark.skipif(fence_here() == "none", reason="this system has no Landlock")


@pytest.fixture
def pm():
    plugins = [SAMPLE_PLUGIN, CHEATING_ATTACKS]
    return plugin_manager(plugins, entry_point_group="vflair.none")


def spied(pm, path, *, out=None, **changes):
    spec = {"name": "spy", "knowledge": "K0", "options": {"path": str(path)}}
    table = {
        "task": {"name": "words"},
        "model": {"config": LLAMA, "vocab_size": 300},
        "partition": {"head": 1, "tail": 1},
        "train": {"steps": 1, "batch_size": 4, "max_length": 12},
        "victims": {"count": 3, "max_length": 12, "bypass": 1},
        "attacks": [spec],
        **changes,
    }
    return run(experiment_from(table), plugins=pm, out=out, keep_evidence=out is not None)


@FENCED
def test_an_attack_sees_no_other_process_and_no_file_that_is_not_its_own(pm, tmp_path):
    secret = tmp_path / "truth.json"
    secret.write_text("the private text")
    result = spied(pm, secret)
    (grade,) = result.numbers["undefended"]["attacks"]
    assert not any(grade["budget"].values()), grade["budget"]
    assert not secret.with_suffix(".spy").exists()
    assert result.cost["undefended"]["attack_worker"] == "landlock"


@FENCED
def test_without_the_fence_the_same_attack_sees_all_of_it(pm, tmp_path, monkeypatch):
    """So the test above can fail. The result says where the attack was, too."""
    secret = tmp_path / "truth.json"
    secret.write_text("the private text")
    monkeypatch.setattr(isolation, "FENCE", "support.no_fence")
    (grade,) = spied(pm, secret).numbers["undefended"]["attacks"]
    seen = {name for name, found in grade["budget"].items() if found}
    assert {"memory", "folder", "files", "variables", "path", "written"} <= seen
    assert (
        spied(pm, secret, attacks=[], isolation="inline").cost["undefended"]["attack_worker"]
        == "inline"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the calls are Linux's")
def test_without_landlock_the_process_that_knows_the_truth_cannot_be_looked_into(
    pm, tmp_path, monkeypatch
):
    secret = tmp_path / "truth.json"
    secret.write_text("the private text")
    monkeypatch.setattr(isolation, "FENCE", "support.no_landlock")
    monkeypatch.setattr(fence, "_version", lambda: 0)
    options = {"path": str(secret), "process": os.getpid()}
    spy = {"name": "spy", "knowledge": "K0", "options": options}
    result = spied(pm, secret, attacks=[spy])
    (grade,) = result.numbers["undefended"]["attacks"]
    assert {name for name, found in grade["budget"].items() if found} == {"path", "written"}
    assert result.cost["undefended"]["attack_worker"] == "memory"
    monkeypatch.setattr(fence, "unseen", nullcontext)
    monkeypatch.setattr(isolation, "unseen", nullcontext)
    (grade,) = spied(pm, secret, attacks=[spy]).numbers["undefended"]["attacks"]
    assert grade["budget"]["folder"] or os.geteuid() == 0  # without capabilities root's is closed


@FENCED
def test_kept_evidence_and_its_truth_are_out_of_reach_and_private(pm, tmp_path):
    out = tmp_path / "run"
    key = out / "evidence-undefended" / "answer-key.json"
    (grade,) = spied(pm, key, out=out).numbers["undefended"]["attacks"]
    assert not grade["budget"]["path"]
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    again = attack_again(
        out, [AttackSpec("spy", options={"path": str(key)}, knowledge="K0")], plugins=pm
    )
    assert not any(again["undefended"][0].budget.values())


def test_the_truth_is_written_when_the_attacks_have_ended(pm, tmp_path, monkeypatch):
    """Without a fence an attack that opens the file finds none in the run."""
    monkeypatch.setattr(isolation, "FENCE", "support.no_fence")
    key = tmp_path / "evidence-undefended" / "answer-key.json"
    (grade,) = spied(pm, key, out=tmp_path).numbers["undefended"]["attacks"]
    assert grade["budget"]["folder"]
    assert not grade["budget"]["path"]
    assert key.exists()


def test_who_writes_in_its_files_changes_no_evidence(pm, tmp_path):
    out = tmp_path / "run"
    honest = {"name": "first-row", "knowledge": "K1"}
    (first,) = spied(pm, "", out=out, attacks=[honest]).numbers["undefended"]["attacks"]
    before = {p.name: p.read_bytes() for p in (out / "evidence-undefended").glob("*.safetensors")}
    attack_again(out, [AttackSpec("vandal", knowledge="K3")], plugins=pm)
    after = {p.name: p.read_bytes() for p in (out / "evidence-undefended").glob("*.safetensors")}
    assert after == before
    again = attack_again(out, [AttackSpec("first-row", knowledge="K1")], plugins=pm)
    assert again["undefended"][0].attack_performance == first["attack_performance"]


def test_evidence_that_was_changed_is_not_attacked(pm, tmp_path):
    spied(pm, "", out=tmp_path, attacks=[])
    path = tmp_path / "evidence-undefended" / "main.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(AttackError, match=r"main.safetensors in .* is not what the run wrote"):
        attack_again(tmp_path, [AttackSpec("vandal", knowledge="K3")], plugins=pm)


def test_packages_that_are_installed_from_elsewhere_are_within_the_fence(monkeypatch, tmp_path):
    """An editable install may be found by a hook, and its folder be in no list of places."""
    package = ModuleType("a_plugin_from_elsewhere")
    package.__path__ = [str(tmp_path / "there")]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setenv(IMPORTED, isolation._imported())
    assert tmp_path / "there" in fence._libraries()


def test_a_folder_of_packages_is_within_the_fence_as_a_whole(monkeypatch, tmp_path):
    """Libraries beside packages have no Python in them: numpy.libs, nvidia."""
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site-packages")])
    assert tmp_path / "site-packages" in fence._libraries()
