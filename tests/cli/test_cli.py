"""The program as a person uses it: once in a process of its own, else in this one, which saves its start."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from support.paths import SAMPLE_PLUGIN, TASK_KINDS
from vflair_core import Partition, split
from vflair_core.cli.app import StandardError
from vflair_core.cli.main import main
from vflair_core.errors import ExperimentError
from vflair_core.experiments.config import read_experiment
from vflair_core.testing import tiny_model

CONFIG = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
EXPERIMENT = """
[task]
name = "words"

[model]
vocab_size = 300
config = { model_type = "llama", hidden_size = 16, intermediate_size = 32, num_hidden_layers = 3, \
num_attention_heads = 2, num_key_value_heads = 2, max_position_embeddings = 64 }

[partition]
head = 1
tail = 0

[train]
steps = 3
batch_size = 4
max_length = 16

[victims]
count = 4
max_length = 12
bypass = 2

[[attacks]]
name = "first-row"
knowledge = "K1"

[[defenses]]
name = "shift"
"""


def vflair(*arguments, code: int = 0, process: bool = False) -> subprocess.CompletedProcess[str]:
    words = [*map(str, arguments)]
    done = _in_process(words) if process else _here(words)
    assert done.returncode == code, done.stderr
    return done


def _in_process(words: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vflair_core.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def _here(words: list[str]) -> subprocess.CompletedProcess[str]:
    """The same, called: output and code as the shell would have them, and no trace left behind."""
    out, errors, code = io.StringIO(), io.StringIO(), 0
    log = logging.getLogger("vflair_core")
    random = torch.get_rng_state()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        patch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)  # for good
        try:
            main(words)
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            for handler in [h for h in log.handlers if isinstance(h, StandardError)]:
                log.removeHandler(handler)
            log.setLevel(logging.NOTSET)
            torch.set_rng_state(random)
    return subprocess.CompletedProcess(words, code, out.getvalue(), errors.getvalue())


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("experiment") / "small.toml"
    path.write_text(EXPERIMENT)
    return path


def test_a_run_with_a_one_file_plugin_shows_and_writes_its_result(file, tmp_path):
    run = ("run", file, "--plugin", SAMPLE_PLUGIN, "--out", tmp_path, "-o", "train.steps=2")
    done = vflair(*run, process=True)
    for word in (
        "undefended",
        "defended",
        "first-row",
        "K1",
        "AP",
        "floor",
        "DCS",
        "guarantee",
        "MB",
    ):
        assert word in done.stdout, word
    assert len(done.stdout.splitlines()) <= 10
    assert "private" not in done.stdout
    held = re.search(
        r"parameters: data party ([\d,]+), model party ([\d,]+), total ([\d,]+)", done.stderr
    )
    data_party, model_party, total = (int(each.replace(",", "")) for each in held.groups())
    assert data_party + model_party == total
    assert "[0:00:" in done.stderr
    for phase in ("building the model", "undefended: fine-tuning", "defended: victims"):
        assert f"] {phase}\n" in done.stderr, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "experiment.toml",
        "result.json",
        "transcript.safetensors",
        "transcript-undefended.safetensors",
    }
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["numbers"]["defended"]["losses"]) == 2
    again = (
        *("run", tmp_path / "experiment.toml", "--plugin", SAMPLE_PLUGIN, "--out", tmp_path),
        "--json",
    )
    assert "--overwrite" in vflair(*again, code=1).stderr
    assert (
        json.loads(vflair(*again, "--overwrite").stdout)["numbers_hash"] == result["numbers_hash"]
    )
    told = vflair(*again[:-1], "--overwrite", "--verbose")
    assert "private" in told.stdout  # a text, and what was recovered of it
    assert "shift: " in told.stdout  # what the defense promises
    assert "step finished: arm defended, step 2" in told.stderr


def test_kept_evidence_is_attacked_again_with_the_same_outcome(file, tmp_path):
    inline = ("-o", "isolation=inline")  # the attacks that come later run in a process of their own
    vflair("run", file, "--plugin", SAMPLE_PLUGIN, "--out", tmp_path, "--keep-evidence", *inline)
    then = json.loads((tmp_path / "result.json").read_text())["numbers"]
    options = ("first-row", "--knowledge", "K1", "--plugin", SAMPLE_PLUGIN)
    now = json.loads(vflair("attack", tmp_path, *options, "--json").stdout)
    for arm in ("undefended", "defended"):
        assert now[arm][0]["attack_performance"] == then[arm]["attacks"][0]["attack_performance"]
        assert now[arm][0]["verdict"] == then[arm]["attacks"][0]["verdict"]
    table = vflair("attack", tmp_path, *options).stdout
    assert "first-row" in table
    assert "undefended" in table
    refused = vflair("attack", tmp_path, "--plugin", SAMPLE_PLUGIN, code=1)
    assert "Name one or more attacks" in refused.stderr
    refused = vflair("attack", tmp_path, *options, "--device", "gpu", code=1)
    assert "'gpu'" in refused.stderr
    assert "Possible here: auto, cpu" in refused.stderr


def test_explain_says_what_crosses_and_who_owns_what(file):
    facts = json.loads(vflair("explain", file, "--plugin", SAMPLE_PLUGIN, "--json").stdout)
    roles = {(row["role"], row["direction"]) for row in facts["crossings"]}
    assert {("smashed", "sent"), ("returned", "received"), ("hidden_grad", "sent")} <= roles
    assert facts["owners"]["model.embed_tokens.weight"] == "data party"
    assert facts["owners"]["lm_head.weight"] == "model party"
    assert any("HT training hands the labels over" in note for note in facts["notes"])
    config = AutoConfig.for_model("llama", **CONFIG, vocab_size=300, tie_word_embeddings=False)
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert facts["totals"]["both"]["parameters"] == whole
    assert facts["shapes"]["lm_head.weight"] == [300, 16]
    told = vflair("explain", file, "--plugin", SAMPLE_PLUGIN).stdout
    assert f"{whole:,}" in told
    assert re.search(r"hidden_states .* \[4, \d+, 16\]", told)
    assert "lm_head.weight" not in told
    assert (
        "lm_head.weight" in vflair("explain", file, "--plugin", SAMPLE_PLUGIN, "--weights").stdout
    )


def test_show_lists_options_knowledge_and_text():
    facts = json.loads(vflair("show", "first-row", "--plugin", SAMPLE_PLUGIN, "--json").stdout)
    assert facts["knowledge"]["needs"] == ["smashed", "mask", "embeddings"]
    shift = json.loads(vflair("show", "shift", "--plugin", SAMPLE_PLUGIN, "--json").stdout)
    assert shift["options"] == [{"name": "by", "type": "float", "default": "1.0"}]


def test_list_names_what_plugins_offer_and_which_models_are_verified():
    names = {
        row["name"]
        for row in json.loads(vflair("list", "tasks", "--plugin", SAMPLE_PLUGIN, "--json").stdout)
    }
    assert {"words", "two-words"} <= names
    assert "llama · causal-lm" in json.loads(vflair("list", "models", "--json").stdout)


def test_list_alone_shows_how_it_is_used():
    assert "Usage: vflair list" in vflair("list").stdout


def test_an_experiment_file_may_begin_with_a_byte_order_mark(file, tmp_path):
    marked = tmp_path / "marked.toml"
    marked.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_experiment(marked) == read_experiment(file)
    marked.write_text(file.read_text(), encoding="utf-16")
    with pytest.raises(ExperimentError, match="Save it as UTF-8"):
        read_experiment(marked)


@pytest.mark.parametrize("name", ["own", "gsm8k", "planted-records", "gaussian-noise"])
def test_show_says_of_each_option_what_it_is(name):
    done = vflair("show", name)
    facts = json.loads(vflair("show", name, "--json").stdout)
    explained = name != "planted-records"  # a function whose options explain themselves
    for option in facts["options"]:
        assert ("about" in option) == explained
        assert option.get("about", "")[:30] in done.stdout
    assert "Args:" not in done.stdout
    if name == "own":
        about = {option["name"]: option["about"] for option in facts["options"]}
        assert {
            "private_patterns",
            "private_spans",
            "separator",
            "quoting",
            "metric",
            "join",
        } <= set(about)
        assert about["empty"].startswith("``error`` or ``drop``")


def test_a_task_is_listed_by_its_card_and_shown_with_an_example_and_its_private_spans():
    listed = {
        row["name"]: row
        for row in json.loads(vflair("list", "tasks", "--plugin", TASK_KINDS, "--json").stdout)
    }
    card = listed["passages"]
    assert card["kind"] == "question-answering"
    assert card["sizes"] == {"train": 48, "test": 12}
    assert card["metric"] == "exact_match"
    assert "kind" not in listed["pairs"]  # it has no card
    table = vflair("list", "tasks", "--plugin", TASK_KINDS).stdout
    assert "question-answering" in table
    assert "train 48, test 12" in " ".join(table.split())
    shown = json.loads(vflair("show", "colours", "--plugin", TASK_KINDS, "--json").stdout)[
        "example"
    ]
    assert shown["text"] == "Read: «Ada» wears red. Colour:"
    assert shown["answer"] == ["red"]
    bare = json.loads(
        vflair("show", "colours", "-o", "template=false", "--plugin", TASK_KINDS, "--json").stdout
    )
    assert bare["example"]["text"] == "«Ada» wears red."
    assert bare["options"] == [{"name": "template", "type": "bool", "default": "True"}]


def test_a_task_that_cannot_be_made_is_shown_all_the_same_with_the_reason():
    done = vflair("show", "absent", "--plugin", TASK_KINDS)
    assert "There is no table at nowhere" in " ".join(done.stdout.split())


def test_merge_joins_two_folders_and_lists_what_it_wrote(tmp_path):
    data_party, model_party = split(tiny_model("llama"), Partition(1, 1))
    data_party.save(tmp_path / "data")
    model_party.save(tmp_path / "model")
    folders = (tmp_path / "data", tmp_path / "model")
    done = json.loads(vflair("merge", *folders, "--out", tmp_path / "out", "--json").stdout)
    assert done["out"] == str(tmp_path / "out")
    assert set(done["files"]) == {"config.json", "generation_config.json", "model.safetensors"}
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expected = tiny_model("llama").state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert "is there already" in vflair("merge", *folders, "--out", tmp_path / "out", code=1).stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "nowhere.toml"], "There is no experiment file nowhere.toml"),
        (["show", "first-rwo", "--plugin", SAMPLE_PLUGIN], "Did you mean 'first-row'"),
        (
            ["list", "attcks"],
            "Did you mean 'attacks'? Possible: attacks, defenses, tasks, commands, models",
        ),
        (["run", str(Path(__file__).parent)], "cannot be read: Is a directory"),
        (["plugins", "--plugin", "nowhere.py"], "There is no Python file"),
        (["merge", "nowhere", "nowhere", "--out", "x"], "no data_party.safetensors in nowhere"),
        (["dance"], "No plugin offers command 'dance'"),
        (["lsit"], "Did you mean 'list'? Commands of vflair itself: list, "),
    ],
)
def test_mistakes_end_in_one_sentence_and_code_one(arguments, said):
    done = vflair(*arguments, code=1)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
