"""The apps take the steps of the same parties without Flower, and tell no more than what is named."""

from __future__ import annotations

import json
import threading
import time

import pytest

pytest.importorskip("flwr.serverapp", reason="Flower is not installed: nox -s flower")

import torch
from flwr.app import RecordDict
from flwr.serverapp.strategy import FedMedian
from safetensors.torch import load_file

from support.flower_grid import RUN, ThisProcess
from support.flower_witness import WithoutFlower
from vflair_core import ChannelError, Defense, ExperimentError
from vflair_flower import data_party_app as apps
from vflair_flower.data_party_app import data_party_app
from vflair_flower.handover import KEY
from vflair_flower.model_party_app import fed_avg, lead
from vflair_flower.options import read_node_options, read_run_options
from vflair_flower.served_half import served


@pytest.fixture
def led(premises, grid):
    """A function that leads a whole run with these options, and returns its report."""

    def leads(strategy=fed_avg, by=grid, **options):
        by.config = {**premises.run, "sharing": "turns", **options}
        premises.said = []
        lead(by, read_run_options(by.config), strategy(), premises.said.append)
        return json.loads((premises.folder / "model-party" / "run.json").read_text())

    return leads


def half(premises, name):
    """What a node has at the end of a run."""
    return load_file(premises.folder / "nodes" / name / f"run-{RUN}" / "data_party.safetensors")


def losses(report, name):
    """The losses of a node over all rounds."""
    rounds = [told for stage, told in report["stages"].items() if stage.startswith("round")]
    return [loss for told in rounds for loss in told[name]["losses"]]


def without_flower(premises, **options):
    return WithoutFlower({**premises.run, "sharing": "turns", **options}, premises.texts)


def test_losses_and_halves_are_those_of_the_same_parties_without_flower(premises, led):
    report = led(rounds=2)
    witness = without_flower(premises, rounds=2)
    for number in range(2):
        witness.round(number)
    for name in premises.texts:
        assert losses(report, name) == witness.losses[name]
        own = half(premises, name)
        assert all(torch.equal(own[n], w) for n, w in witness.adapters(name).items())
    model_party = load_file(premises.folder / "model-party" / "model_party.safetensors")
    trained = {n: w for n, w in witness.model_party.named_parameters() if w.requires_grad}
    assert trained.keys() == model_party.keys()
    assert all(torch.equal(model_party[n], w) for n, w in trained.items())


def test_two_rounds_are_one_of_twice_the_steps(premises, led):
    # In turns nodes of one round follow each other, so one node alone.
    premises.nodes.pop("bob")
    alone = ThisProcess(premises.run, premises.nodes)
    twice = led(by=alone, rounds=2, **{"min-nodes": 1})
    once = led(by=alone, steps=4, **{"min-nodes": 1})
    assert losses(twice, "alice") == losses(once, "alice")


def test_adapters_are_averaged_after_each_round_when_asked(premises, grid, led):
    for config in premises.nodes.values():
        config["share-adapters"] = True
    report = led(rounds=2, average=True)
    witness = without_flower(premises, rounds=2)
    for number in range(2):
        witness.round(number)
        mean = witness.average()
    for name in premises.texts:
        assert losses(report, name) == witness.losses[name]
        own = half(premises, name)
        assert all(torch.equal(own[n], w) for n, w in mean.items())
    held = {n for n, _ in witness.tunings["alice"].party.named_parameters()}
    crossed = {n for reply in grid.came for r in reply.content.array_records.values() for n in r}
    assert crossed == set(mean) <= held


def test_a_median_of_flowers_does_as_well(premises, led):
    for config in premises.nodes.values():
        config["share-adapters"] = True

    def median():
        return FedMedian(
            fraction_evaluate=0.0, min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1
        )

    led(strategy=median, average=True)
    witness = without_flower(premises)
    witness.round(0)
    both = [witness.adapters(name) for name in premises.texts]
    for name in premises.texts:
        own = half(premises, name)
        for key in both[0]:  # the median of two is their mean
            torch.testing.assert_close(own[key], (both[0][key] + both[1][key]) / 2)


def test_flower_carries_what_is_named_and_nothing_of_a_record(premises, grid, led):
    led()
    everything = b"".join(
        record.deflate() if hasattr(record, "deflate") else repr(record).encode()
        for message in (*grid.sent, *grid.came)
        for record in message.content.values()
    )
    told = {
        key
        for reply in grid.came
        for record in (
            *reply.content.config_records.values(),
            *reply.content.metric_records.values(),
        )
        for key in record
    }
    assert told == {"examples", "num-examples", "loss", "losses"}
    assert not [n for reply in grid.came for r in reply.content.array_records.values() for n in r]
    for texts in premises.texts.values():
        for text in texts:
            assert text.encode() not in everything
    tokens = [m.content["vflair-handover"]["token"] for m in grid.sent]
    assert len(set(tokens)) == 2
    assert "vflair_" not in repr(premises.said)


def test_a_node_that_shares_no_adapters_is_left_out_where_they_are_asked_for(premises, led):
    premises.nodes["alice"]["share-adapters"] = True
    report = led(average=True)
    (lost,) = report["lost"]
    assert (lost["node"], lost["stage"]) == ("bob", "join")
    assert "does not let its adapters be averaged" in lost["why"]
    assert len(losses(report, "alice")) == 2
    assert "Node bob is lost (join)" in " ".join(premises.said)


def test_a_node_that_does_not_answer_is_reported_and_the_rest_goes_on(premises, grid, led):
    grid.dead.add("bob")
    report = led(**{"round-timeout": 3.0})
    assert report["lost"] == [{"node": "bob", "stage": "join", "why": "no reply within 3 seconds"}]
    premises.texts.pop("bob")
    witness = without_flower(premises)
    witness.round(0)
    assert losses(report, "alice") == witness.losses["alice"]


def test_an_error_at_a_node_tells_others_its_kind_and_no_word_of_a_record(premises, led):
    secret = premises.folder / "bob.csv"
    secret.write_text("note,more\nthe pin is 4096\n" + '"never closed')
    premises.nodes["bob"]["text"] = "more"
    report = led()
    (lost,) = report["lost"]
    assert "TaskError" in lost["why"]
    for word in ("pin", "4096", "closed", str(premises.folder)):
        assert word not in lost["why"]


def test_a_run_of_which_no_node_is_left_fails_and_says_why(premises, led):
    for config in premises.nodes.values():
        config["text"] = "nothing"
    with pytest.raises(ExperimentError, match=r"No node is left.*alice \(join\).*bob \(join\)"):
        led()
    report = json.loads((premises.folder / "model-party" / "run.json").read_text())
    assert [lost["node"] for lost in report["lost"]] == ["alice", "bob"]


def test_a_run_waits_for_its_nodes_as_long_as_it_says(led):
    with pytest.raises(ExperimentError, match=r"2 nodes are here after 1 seconds .* wants 3"):
        led(**{"min-nodes": 3, "round-timeout": 1.0})


class Zeros(Defense):
    """Sends nothing at all."""

    covers = frozenset({"prompt", "response"})

    def on_smashed(self, smashed, exchange):
        return torch.zeros_like(smashed)


def defended_app():
    return data_party_app(defenses=lambda: [Zeros()])


def test_a_data_party_defends_what_crosses(premises, led):
    plain = led()
    defended = led(by=ThisProcess(premises.run, premises.nodes, defended_app))
    assert losses(plain, "alice") != losses(defended, "alice")


def test_a_node_gives_up_when_the_model_party_is_gone_and_keeps_nothing(premises, monkeypatch):
    monkeypatch.setattr(apps, "GRACE", 0.5)
    run = read_run_options({**premises.run, "steps": 10**6, "node-timeout": 0.5})
    own = read_node_options(premises.nodes["alice"])
    failed = []

    def train(node):
        try:
            apps.train(node)
        except ChannelError as error:
            failed.append(error)

    with served(run) as half:
        content = RecordDict({KEY: half.admit(1).record()})
        node = apps.Node(run, own, content, own.of_run(RUN), apps.Defended())
        apps.join(node)
        assert node.left.exists()
        at_work = threading.Thread(target=train, args=(node,))
        at_work.start()
        until = time.monotonic() + 60
        while not any(half.party.steps.values()) and time.monotonic() < until:
            time.sleep(0.01)
        assert any(half.party.steps.values())
    at_work.join(60)
    assert "cannot be reached" in str(failed[0])
    assert not node.left.exists()
