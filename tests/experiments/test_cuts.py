"""One experiment at several cuts: each is an ordinary run, and all of them stand in one table and one plot."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET

import pytest

from support.paths import SAMPLE_PLUGIN
from vflair_core import plugin_manager, run
from vflair_core.cli.main import main
from vflair_core.cli.terminal import show_cuts
from vflair_core.errors import ExperimentError
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.cut_sweep import Recovery, draw, run_cuts

MODEL = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def small(**changes):
    return experiment_from(
        {
            "task": {"name": "words"},
            "model": {"config": MODEL, "vocab_size": 300},
            "partition": {"head": 1, "tail": 1},
            "train": {"steps": 2, "batch_size": 4, "max_length": 16},
            "victims": {"count": 3, "max_length": 12, "bypass": 1},
            "attacks": [{"name": "first-row", "knowledge": "K1"}],
            "isolation": "inline",
            **changes,
        }
    )


@pytest.fixture
def pm():
    return plugin_manager([SAMPLE_PLUGIN], entry_point_group="vflair.none")


def test_each_cut_gives_what_a_run_of_its_own_gives(pm, tmp_path):
    experiment = small(defenses=[{"name": "shift"}])
    rows = run_cuts(experiment, [1, 0], tmp_path, plugins=pm)
    assert [(row.head, row.arm) for row in rows] == [
        (1, "undefended"), (1, "defended"), (0, "undefended"), (0, "defended"),
    ]  # fmt: skip
    alone = run(experiment, plugins=pm).numbers
    for row, arm in zip(rows[:2], ("undefended", "defended"), strict=True):
        (grade,) = alone[arm]["attacks"]
        assert row.attack_performance == grade["attack_performance"]
        assert row.floor == grade["floor"]
        assert row.main_performance == alone[arm]["main_performance"]
    written = json.loads((tmp_path / "cuts.json").read_text())
    assert [entry["head"] for entry in written] == [1, 1, 0, 0]
    assert (
        json.loads((tmp_path / "head-0" / "result.json").read_text())["experiment"]["partition"][
            "head"
        ]
        == 0
    )
    texts = "".join(ET.parse(tmp_path / "cuts.svg").getroot().itertext())
    for words in (
        "first-row (K1), undefended",
        "first-row (K1), defended",
        "floor",
        "recovered (AP)",
    ):
        assert words in texts


@pytest.mark.parametrize(
    ("changes", "heads", "words"),
    [({"attacks": []}, [0, 1], "no .*attacks"), ({}, [1, 1], "once"), ({}, [], "once")],
)
def test_what_gives_no_curve_is_refused_before_anything_runs(changes, heads, words, pm, tmp_path):
    with pytest.raises(ExperimentError, match=words):
        run_cuts(small(**changes), heads, tmp_path / "out", plugins=pm)
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_nothing_is_run(pm, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ExperimentError, match=r"vflair-core\[report\].*Nothing was run"):
        run_cuts(small(), [0], tmp_path / "out", plugins=pm)


def test_a_list_of_cuts_that_is_none_is_named(tmp_path, capsys):
    (tmp_path / "e.toml").write_text('[task]\nname = "words"\n[model]\nname = "m"\n')
    with pytest.raises(SystemExit):
        main(["run", str(tmp_path / "e.toml"), "--heads", "1;2"])
    assert "--heads '1;2' is no list" in capsys.readouterr().err


def test_a_number_that_says_nothing_is_marked_in_table_file_and_plot(tmp_path, capsys):
    rows = [
        Recovery(0, "defended", "vmi", "K3", 0.4, (0.3, 0.5), 0.1, 0.9, "ok", 0.5, 0.5),
        Recovery(1, "defended", "vmi", "K3", 0.9, (0.8, 1.0), 0.1, 0.9, "positive control failed", 0.5, 0.2),
    ]  # fmt: skip
    texts = "".join(ET.parse(draw(rows, tmp_path / "cuts.svg")).getroot().itertext())
    assert "hollow: a control failed, or uninformative" in texts
    assert "hollow" not in "".join(
        ET.parse(draw(rows[:1], tmp_path / "sound.svg")).getroot().itertext()
    )
    show_cuts(rows, tmp_path, as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert [row["verdict"] for row in said] == ["ok", "positive control failed"]
    assert [row["positive_control"] for row in said] == [0.5, 0.2]
    show_cuts(rows, tmp_path, as_json=False)
    assert "control" in capsys.readouterr().out
