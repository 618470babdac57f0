"""The page about Flower, done as a new user would: its commands on loopback, with a real language model."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib

import pytest

pytest.importorskip("flwr.serverapp", reason="Flower is not installed: nox -s flower")

import torch
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

from support.flower_grid import RUN, ThisProcess
from support.flower_processes import free_port, group_of
from support.flower_witness import WithoutFlower
from support.paths import DOCS
from support.real_model import REAL
from vflair_flower.node_records import read_texts

PAGE = (DOCS / "flower.md").read_text()
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def tried(tmp_path):
    """The folder of the trial, after every command of the page was run there."""
    program = (
        f'set -eu\nvflair() {{ {shlex.quote(sys.executable)} -m vflair_core.cli.main "$@"; }}\n'
    )
    program += "\n".join(blocks("sh"))
    for port in ("9092", "9094", "9095"):
        program = program.replace(port, str(free_port()))
    with (tmp_path / "said").open("w") as said:
        shell = subprocess.Popen(
            ["bash", "-c", program],
            cwd=tmp_path,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        code = shell.wait(900)
        assert code == 0, (tmp_path / "said").read_text()[-6000:]
        yield tmp_path / "trial"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait(60)
        until = time.monotonic() + 30
        while group_of(shell) and time.monotonic() < until:
            time.sleep(0.1)
        assert not group_of(shell)


def losses(report, name):
    rounds = [told for stage, told in report["stages"].items() if stage.startswith("round")]
    return [loss for told in rounds for loss in told[name]["losses"]]


@pytest.mark.parametrize("_", [pytest.param(0, marks=REAL)])
def test_the_trial_of_the_page_gives_the_losses_of_the_same_parties_without_flower(tried, _):
    config = tomllib.loads((tried / "app" / "pyproject.toml").read_text())
    run = config["tool"]["flwr"]["app"]["config"] | {"learning-rate": 1e-3}  # the default
    texts = {
        "alice": read_texts(tried / "alice.jsonl", "note"),
        "bob": read_texts(tried / "bob.csv", "note"),
    }
    assert [len(each) for each in texts.values()] == [3, 2]
    witness = WithoutFlower(run, texts)
    for number in range(run["rounds"]):
        witness.round(number)
        mean = witness.average()
    report = json.loads((tried / "model-party" / "run.json").read_text())
    assert report["lost"] == []
    for name in texts:
        assert losses(report, name) == witness.losses[name]
        (own,) = (tried / name).glob("run-*/data_party.safetensors")
        weights = load_file(own)
        assert all(torch.equal(weights[n], w) for n, w in mean.items())
    assert (tried / "whole" / "adapter_model.safetensors").exists()


def test_the_module_of_the_page_takes_another_strategy_and_defends(premises, grid):
    pytest.importorskip("vflair_defenses", reason="the page uses one of its defenses")
    (text,) = blocks("py")
    text = text.replace("Texts that anyone can have.", "5 9 12 3")  # the tiny tokenizer's words
    mine = {}
    exec(compile(text, "mine.py", "exec"), mine)
    for node in premises.nodes.values():
        node["share-adapters"] = True
    config = {**premises.run, "sharing": "turns", "average": True}
    del grid
    own = ThisProcess(config, premises.nodes, lambda: mine["data_party"])
    mine["model_party"](own, Context(RUN, 1, {}, RecordDict(), config))
    report = json.loads((premises.folder / "model-party" / "run.json").read_text())
    assert report["lost"] == []
    witness = WithoutFlower(config, premises.texts)
    witness.round(0)
    assert losses(report, "alice") != witness.losses["alice"]  # it is defended


def test_the_page_names_every_option():
    from vflair_flower.options import NodeOptions, RunOptions

    for kind in (RunOptions, NodeOptions):
        for each in kind.__attrs_attrs__:
            assert f"`{each.name.replace('_', '-')}" in PAGE, each.name
