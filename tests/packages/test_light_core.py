"""The core embedded in somebody's program: no torch before it is used, no program, no adapters, and plain words for both."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from support.paths import EXAMPLES
from vflair_core import (
    Lora,
    Partition,
    VflairError,
    load_adapter,
    load_model_party,
    merge,
    split,
    tune,
)
from vflair_core.cli.main import main
from vflair_core.experiments.config import read_experiment
from vflair_core.experiments.run import run
from vflair_core.testing import tiny_model

EXTRAS = ("cyclopts", "rich", "peft", "accelerate")
NO_PEFT = r"need peft, which is not installed.* pip install 'vflair-core\[lora\]'"


def without(names, code, *words):
    """Run `code` in a process in which nothing of these names can be imported."""
    block = f"import sys\nsys.modules.update(dict.fromkeys({names!r}))\n"
    command = [sys.executable, "-W", "error", "-c", block + code, *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)


@pytest.fixture
def no_peft(monkeypatch):
    """Nobody finds peft, whether or not it was imported before."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)


def test_importing_the_core_loads_pythons_own_modules_only():
    code = "before = set(sys.modules)\nimport vflair_core\nprint(*{n.partition('.')[0] for n in set(sys.modules) - before})"
    done = without((), code)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) - sys.stdlib_module_names == {"vflair_core"}


SPLIT = """
from pathlib import Path
from vflair_core import FineTuning, Partition, Train, load_data_party, load_model_party, merge, split
from vflair_core.testing import tiny_batch, tiny_model

whole = tiny_model("llama")
batch = tiny_batch(whole, labels="tokens")
expected = whole(**batch).loss
out = Path(sys.argv[1])
whole.save_pretrained(out / "whole")
data_party, model_party = split(whole, Partition(head=1, tail=1))
loss = data_party.model(**batch).loss
assert loss.equal(expected)
loss.backward()

model_party = load_model_party(out / "whole", Partition(head=1, tail=1))
data_party = load_data_party(out / "whole", Partition(head=1, tail=1), channel=model_party.handle)
losses = [FineTuning(data_party, Train(steps=2)).step(batch) for _ in range(2)]
assert losses[0] == expected.item() > losses[1]
data_party.model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False, pad_token_id=0)
data_party.save(out / "data")
model_party.save(out / "model")
print(*sorted(path.name for path in merge(out / "data", out / "model", out / "merged").iterdir()))
"""


def test_splitting_training_saving_and_merging_need_no_program_and_no_adapters(tmp_path):
    done = without(EXTRAS, SPLIT, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout.split()


@pytest.mark.parametrize(
    ("missing", "told"),
    [(("cyclopts",), "cyclopts"), (("rich",), "rich"), (("cyclopts", "rich"), "cyclopts and rich")],
)
def test_the_program_without_its_extra_is_one_line(missing, told):
    code = "import runpy\nrunpy.run_module('vflair_core.cli', run_name='__main__')"
    done = without(missing, code)
    assert done.returncode == 1
    assert done.stderr == (
        f"vflair: The program needs {told}, not installed here. Install the extra: "
        "python -m pip install 'vflair-core[cli]'.\n"
    )
    assert not done.stdout


def test_the_program_with_its_extra_is_the_program():
    done = without(
        (),
        "import runpy\nsys.argv = ['vflair', '--help']\nrunpy.run_module('vflair_core.cli', run_name='__main__')",
    )
    assert done.returncode == 0, done.stderr
    assert "Split learning of large language models." in done.stdout


# -- adapters without peft -------------------------------------------------------------------------------


def test_an_experiment_without_adapters_needs_no_peft(no_peft):
    pytest.importorskip("vflair_tasks")
    result = run(small(lora=0))
    assert 0 <= result.numbers["undefended"]["main_performance"] <= 1


def test_an_experiment_with_adapters_is_refused_before_anything_is_computed(no_peft, tmp_path):
    pytest.importorskip("vflair_tasks")
    told = []
    with pytest.raises(VflairError, match=NO_PEFT):
        run(small(lora=2), report=lambda phase, *_: told.append(phase), out=tmp_path / "out")
    assert set(told) == {"building the task"}
    assert not (tmp_path / "out").exists()


def small(*, lora):
    overrides = [
        *("pretrain.steps=1", "train.steps=1", "victims.count=2", "attacks=[]", "defenses=[]"),
        *("task.options={records=0.5, train_examples=16, test_examples=4}", f"train.lora.r={lora}"),
        'isolation="inline"',
    ]
    return read_experiment(EXAMPLES / "toy.toml", overrides)


def test_what_needs_peft_says_what_to_install(no_peft, tmp_path):
    whole = tiny_model("gpt2")
    whole.save_pretrained(tmp_path / "whole")
    data_party, model_party = split(whole, Partition(head=1, tail=1))
    for act in (
        lambda: tune(data_party, ["head"], adapters=Lora(r=2)),
        lambda: load_adapter(data_party, model_party, tmp_path),
        lambda: load_model_party(tmp_path / "whole", adapter=tmp_path),
    ):
        with pytest.raises(VflairError, match=NO_PEFT):
            act()
    assert tune(data_party, ["head"], adapters=Lora(r=0))


def test_serving_adapters_without_peft_is_refused_before_a_model_is_loaded(no_peft, capsys):
    words = ["serve", "--model", "no-such-model", "--listen", "127.0.0.1:0", "--insecure-loopback"]
    with pytest.raises(SystemExit):
        main([*words, "--lora", "r=8"])
    assert "vflair-core[lora]" in capsys.readouterr().err


def test_parts_with_adapters_are_not_joined_without_peft(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    whole = tiny_model("gpt2")
    data_party, model_party = split(whole, Partition(head=1, tail=1))
    for party in (data_party, model_party):
        tune(party, adapters=Lora(r=2))
    data_party.save(tmp_path / "data")
    model_party.save(tmp_path / "model")
    monkeypatch.setattr("vflair_core.partition.adapters.importlib.util.find_spec", lambda _: None)
    with pytest.raises(VflairError, match=NO_PEFT):
        merge(tmp_path / "data", tmp_path / "model", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
