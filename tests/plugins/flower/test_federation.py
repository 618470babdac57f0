"""A real SuperLink and real SuperNodes on loopback, with TLS and keys: Flower starts the parties, our stream carries the steps."""

from __future__ import annotations

import json
import signal
from types import SimpleNamespace

import pytest

pytest.importorskip("flwr.serverapp", reason="Flower is not installed: nox -s flower")

import torch
from safetensors.torch import load_file

from support.flower_premises import make_premises
from support.flower_processes import federation
from support.flower_witness import WithoutFlower
from vflair_core import merge

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def flower(tmp_path_factory):
    """A federation with alice and bob, who keep running from test to test."""
    premises = make_premises(tmp_path_factory.mktemp("flower"))
    with federation(premises.folder) as made:
        for name, config in premises.nodes.items():
            made.node(name, **config, share_adapters=True)
        yield SimpleNamespace(federation=made, premises=premises)


def report_of(premises):
    return json.loads((premises.folder / "model-party" / "run.json").read_text())


def losses(report, name):
    rounds = [told for stage, told in report["stages"].items() if stage.startswith("round")]
    return [loss for told in rounds for loss in told[name]["losses"]]


def test_two_nodes_fine_tune_as_without_flower_and_their_adapters_are_averaged(flower):
    premises = flower.premises
    options = {**premises.run, "rounds": 2, "average": True, "round-timeout": 600.0}
    run = flower.federation.run(**options)
    assert flower.federation.finished(run) == "finished:completed"
    witness = WithoutFlower(options, premises.texts)  # the shared weights take the mean of both
    for number in range(2):
        witness.round(number)
        mean = witness.average()
    report = report_of(premises)
    assert report["lost"] == []
    assert report["stages"]["join"] == {"alice": {"examples": 5}, "bob": {"examples": 3}}
    for name in premises.texts:
        assert losses(report, name) == witness.losses[name]
        folder = premises.folder / "nodes" / name / f"run-{run}"
        assert not (folder / "between-rounds").exists()
        own = load_file(folder / "data_party.safetensors")
        assert own.keys() == mean.keys()
        assert all(torch.equal(own[n], w) for n, w in mean.items())
    theirs = load_file(premises.folder / "model-party" / "model_party.safetensors")
    trained = {n: w for n, w in witness.model_party.named_parameters() if w.requires_grad}
    assert trained.keys() == theirs.keys()  # and so none of a data party's
    assert all(torch.equal(theirs[n], w) for n, w in trained.items())
    merged = merge(
        premises.folder / "nodes" / "alice" / f"run-{run}",
        premises.folder / "model-party",
        premises.folder / "merged",
        adapter=True,
    )
    assert (merged / "adapter_model.safetensors").exists()


def test_a_node_that_is_killed_is_reported_and_the_rest_goes_on(flower):
    premises, made = flower.premises, flower.federation
    options = {"steps": 300, "node-timeout": 5.0, "round-timeout": 600.0}
    run = made.run(**{**premises.run, **options})
    made.start("run", "flwr", "log", run, "here")
    made.wait(lambda: "bob has begun (round 1)" in made.log("run"), "bob does not begin")
    made.end("bob", signal.SIGKILL)
    assert made.finished(run, 600) == "finished:completed"
    report = report_of(premises)
    (lost,) = report["lost"]
    assert (lost["node"], lost["stage"]) == ("bob", "round 1")
    assert "silent for" in lost["why"]
    assert len(losses(report, "alice")) == 300
    assert "bob" not in report["stages"]["round 1"]


def test_a_node_whose_key_nobody_registered_is_refused(flower):
    made = flower.federation
    process = made.node("mallory", register=False, data="none", folder="none")
    made.wait(lambda: process.poll() is not None, "mallory is not refused")
    assert process.returncode != 0
    assert "Failed to activate SuperNode" in made.log("mallory")


def test_no_process_of_flowers_outlives_its_superlink_and_supernodes(tmp_path):
    with federation(tmp_path) as made:
        made.node("carol", data="none", folder="none")
        # two programs, and a SuperExec beside each
        made.wait(lambda: len(made.alive()) == 4, "not every SuperExec was started")
    assert made.alive() == []
