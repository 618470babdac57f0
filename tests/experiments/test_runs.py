"""Whole experiments, small: what they promise, what they hide from attacks, what they write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from support.paths import SAMPLE_PLUGIN
from support.small_models import LLAMA
from vflair_core import Transcript, hookimpl, plugin_manager, run
from vflair_core.errors import AttackError, ExperimentError, PluginError, VflairError
from vflair_core.experiments.config import experiment_from

BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
BASE = {
    "task": {"name": "words"},
    "model": {"config": LLAMA, "vocab_size": 300},
    "partition": {"head": 1, "tail": 1},
    "train": {"steps": 6, "batch_size": 4, "max_length": 16, "learning_rate": 0.01},
    "victims": {"count": 4, "max_length": 12, "bypass": 2, "queries": 2},
    "isolation": "inline",
}


@pytest.fixture
def pm():
    return plugin_manager([SAMPLE_PLUGIN], entry_point_group="vflair.none")


def small(**changes):
    table = {**BASE, **changes}
    return experiment_from(table)


def test_the_undefended_split_takes_the_unsplit_models_steps(pm):
    result = run(small(check_unsplit=True, pretrain={"steps": 3, "length": 8}), plugins=pm)
    assert result.numbers["undefended"]["unsplit_losses_equal"] is True


def test_the_comparison_with_the_unsplit_model_can_fail(pm):
    """A defense that moves the smashed data makes other losses, so equal losses are no tautology."""
    result = run(small(defenses=[{"name": "shift"}]), plugins=pm)
    assert result.numbers["defended"]["losses"] != result.numbers["undefended"]["losses"]


def test_ht_with_a_tied_model_is_compared_with_an_untied_unsplit_model(pm):
    tied = {**LLAMA, "tie_word_embeddings": True}
    result = run(
        small(
            check_unsplit=True,
            model={"config": tied, "vocab_size": 300},
            partition={"head": 1, "tail": 0},
        ),
        plugins=pm,
    )
    numbers = result.numbers["undefended"]
    assert numbers["untied"] == ["lm_head.weight"]
    assert numbers["unsplit_losses_equal"] is True


def test_equal_seeds_give_equal_numbers_and_other_seeds_other_ones(pm):
    attacks = [{"name": "first-row", "knowledge": "K1"}]
    first, second, third = (
        run(small(attacks=attacks, defenses=[{"name": "shift"}], seed=seed), plugins=pm)
        for seed in (3, 3, 4)
    )
    assert first.numbers == second.numbers
    assert first.numbers_hash == second.numbers_hash != third.numbers_hash


def test_installing_a_plugin_changes_no_number(pm):
    class Bystander:
        @hookimpl
        def vflair_attacks(self):
            return {"unused": lambda smashed: smashed}

        @hookimpl
        def vflair_step_finished(self, step, loss):
            torch.rand(3)

        @hookimpl
        def vflair_message_sent(self, role, nbytes):
            assert nbytes >= 0

    attacks = [{"name": "first-row", "knowledge": "K1"}]
    alone = run(small(attacks=attacks), plugins=pm)
    pm.register(Bystander())
    assert run(small(attacks=attacks), plugins=pm).numbers == alone.numbers


def test_evaluating_more_often_changes_no_training_step(pm):
    often = {**BASE["train"], "evaluate_every": 2}
    dropout = {**LLAMA, "attention_dropout": 0.3}
    model = {"config": dropout, "vocab_size": 300}
    rare = run(small(model=model), plugins=pm).numbers["undefended"]["losses"]
    assert run(small(model=model, train=often), plugins=pm).numbers["undefended"]["losses"] == rare


def test_an_attack_in_the_worker_finds_no_truth_and_inline_it_does(pm):
    attacks = [{"name": "peek", "knowledge": "K0"}]
    inside = run(small(attacks=attacks, isolation="process"), plugins=pm)
    (hidden,) = inside.numbers["undefended"]["attacks"]
    assert hidden["attack_performance"] <= hidden["floor"]
    beside = run(small(attacks=attacks, isolation="inline"), plugins=pm)
    (seen,) = beside.numbers["undefended"]["attacks"]
    assert seen["attack_performance"] == 1.0
    assert beside.numbers["undefended"]["isolation"] == "inline"


def test_a_result_is_written_and_its_transcript_can_be_read_again(pm, tmp_path):
    e = small(defenses=[{"name": "shift"}], save=True, attacks=[{"name": "first-row"}])
    result = run(e, plugins=pm, out=tmp_path)
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["numbers"] == json.loads(json.dumps(result.numbers))
    assert written["numbers_hash"] == result.numbers_hash
    roles = {
        record.role for record in Transcript.load(tmp_path / "transcript.safetensors").messages
    }
    assert roles == {"smashed", "structure", "returned", "hidden_grad", "smashed_grad"}
    plain = Transcript.load(tmp_path / "transcript-undefended.safetensors").messages
    assert len(plain) == len(Transcript.load(tmp_path / "transcript.safetensors").messages)
    assert {p.name for p in (tmp_path / "defended").iterdir()} == {
        "data_party.safetensors",
        "model_party.safetensors",
        "tokenizer",
    }


def test_the_parties_save_disjoint_weights_that_make_the_whole_model(pm, tmp_path):
    from safetensors.torch import load_file

    run(small(save=True), plugins=pm, out=tmp_path)
    halves = [load_file(path) for path in sorted((tmp_path / "undefended").glob("*.safetensors"))]
    assert not set(halves[0]) & set(halves[1])
    assert "model.layers.1.mlp.up_proj.weight" in halves[1]
    assert "model.embed_tokens.weight" in halves[0]


def test_classification_runs_with_an_encoder_and_learns(pm):
    result = run(
        small(
            task={"name": "two-words"},
            model={"config": BERT, "vocab_size": 300},
            train={"steps": 60, "batch_size": 16, "max_length": 20, "learning_rate": 0.01},
            attacks=[{"name": "last-label", "knowledge": "K0"}],
        ),
        plugins=pm,
    )
    numbers = result.numbers["undefended"]
    first, last = (numbers["evaluations"][n]["metrics"] for n in (0, -1))
    assert last["loss"] < 0.9 * first["loss"]
    assert numbers["metric"] == "accuracy"
    (grade,) = numbers["attacks"]
    assert grade["target"] == "labels"
    assert grade["attack_performance"] <= grade["floor"]


def test_observers_hear_of_everything_that_happens(pm, tmp_path):
    heard = []

    class Ear:
        @hookimpl
        def vflair_run_started(self, experiment):
            heard.append("started")

        @hookimpl
        def vflair_model_partitioned(self, data_party_weights, model_party_weights):
            heard.append(("partitioned", data_party_weights > model_party_weights > 0))

        @hookimpl
        def vflair_step_finished(self, step, loss):
            heard.append(("step", step))

        @hookimpl
        def vflair_epoch_finished(self, epoch, step):
            heard.append(("epoch", epoch, step))

        @hookimpl
        def vflair_evaluated(self, step, metrics):
            heard.append(("evaluated", step, sorted(metrics)))

        @hookimpl
        def vflair_checkpoint_saved(self, path, step):
            heard.append(("saved", Path(path).name))

        @hookimpl
        def vflair_attack_finished(self, name, grade):
            heard.append(("attack", name))

        @hookimpl
        def vflair_message_received(self, kind, role, direction):
            heard.append((kind, role, direction))

        @hookimpl
        def vflair_run_finished(self, result):
            heard.append("finished")

    pm.register(Ear())
    run(small(save=True, attacks=[{"name": "first-row"}]), plugins=pm, out=tmp_path, strict=True)
    assert heard[:2] == ["started", ("partitioned", True)]
    assert [h for h in heard if h[0] == "step"] == [("step", n) for n in range(1, 7)]
    assert ("epoch", 1, 6) in heard
    assert ("evaluated", 0, ["loss", "perplexity", "token_accuracy"]) in heard
    assert ("saved", "model_party.safetensors") in heard
    assert ("forward", "returned", "received") in heard
    assert ("backward", "smashed_grad", "received") in heard
    assert heard[-2:] == [("attack", "first-row"), "finished"]


def test_a_failed_run_is_told_and_raised(pm):
    heard = []

    class Ear:
        @hookimpl
        def vflair_run_failed(self, experiment, error):
            heard.append(type(error))

    pm.register(Ear())
    with pytest.raises(PluginError, match=r"No plugin offers task 'wrds'. Did you mean 'words'"):
        run(small(task={"name": "wrds"}), plugins=pm)
    assert heard == [PluginError]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"task": {"name": "words", "options": {"trian": 3}}}, PluginError, "Did you mean 'train'"),
        ({"attacks": [{"name": "first-rw"}]}, PluginError, "Did you mean 'first-row'"),
        (
            {"attacks": [{"name": "first-row", "knowledge": "K0"}]},
            AttackError,
            "needs embeddings, which it is not granted. Granted: ",
        ),
        (
            {"attacks": [{"name": "first-row", "knowledge": "K9"}]},
            AttackError,
            "no knowledge called",
        ),
        (
            {"defenses": [{"name": "shift", "options": {"bye": 1}}]},
            PluginError,
            "Did you mean 'by'",
        ),
        ({"victims": {**BASE["victims"], "count": 99}}, ExperimentError, "victims.count is 99"),
        ({"partition": {"head": 3, "tail": 1}}, VflairError, "must lie between 0 and 2"),
        ({"channel": "carrier://x"}, VflairError, "No plugin opens the channel 'carrier://x'"),
        ({"devices": ["cpu", "cpu"]}, VflairError, "No plugin places the model party on cpu, cpu"),
        ({"partition_plugin": "me"}, ExperimentError, "No plugin 'me' answers vflair_partition"),
        ({"save": True}, ExperimentError, "needs an output folder"),
    ],
)
def test_what_does_not_fit_says_what_is_possible(pm, changes, error, words):
    with pytest.raises(error, match=words):
        run(small(**changes), plugins=pm)


def test_decisions_of_plugins_are_taken_when_the_experiment_asks(pm):
    from vflair_core import LocalChannel, Partition

    asked = []

    class Decider:
        @hookimpl
        def vflair_partition(self, model, partition):
            return Partition(0, 1)

        @hookimpl
        def vflair_open_channel(self, url, options):
            asked.append(url)
            return LocalChannel(options["handle"], wire=True) if url == "test:1" else None

        @hookimpl
        def vflair_place(self, model_party, devices):
            asked.append(tuple(devices))
            return True

    pm.register(Decider(), "decider")
    plain = run(small(), plugins=pm)
    assert not asked
    assert plain.numbers["undefended"]["partition"]["head"] == 1
    chosen = run(
        small(partition_plugin="decider", channel="test:1", devices=["cpu", "cpu"]), plugins=pm
    )
    assert chosen.numbers["undefended"]["partition"]["head"] == 0
    assert asked == [("cpu", "cpu"), "test:1"]
    assert chosen.config_hash != plain.config_hash


def test_the_noise_cannot_be_drawn_again_by_who_knows_the_experiment_and_not_the_text():
    from vflair_core import Example, Task
    from vflair_core.experiments.context import noise_seed
    from vflair_core.randomness import stream_seed

    def task(text):
        return Task(name="t", kind="causal-lm", train=[Example(text)], test=[Example("x")])

    ours = noise_seed(0, task("private"))
    assert ours == noise_seed(0, task("private"))
    assert ours != noise_seed(0, task("privatf"))
    assert ours not in {
        stream_seed(0, name) for name in ("noise", "noise ", "order", "dropout", "weights")
    }


def test_one_attack_at_two_levels_is_judged_against_itself(pm):
    """The same attack twice, once seeing more: each has its own undefended reference."""
    attacks = [{"name": "first-row", "knowledge": k} for k in ("K1", "K4")]
    result = run(
        small(attacks=attacks, defenses=[{"name": "shift", "options": {"by": 0.0}}]), plugins=pm
    )
    undefended, defended = (result.numbers[arm]["attacks"] for arm in ("undefended", "defended"))
    assert [g["knowledge"] for g in defended] == ["K1", "K4"]
    assert [g["attack_performance"] for g in defended] == [
        g["attack_performance"] for g in undefended
    ]
    assert len(result.cost["defended"]["attack_seconds"]) == 2


def test_attacks_that_fail_a_control_or_find_nothing_rank_no_defense(pm):
    result = run(
        small(attacks=[{"name": "peek"}], defenses=[{"name": "shift"}], isolation="process"),
        plugins=pm,
    )
    assert "uninformative" in result.numbers["undefended"]["attacks"][0]["verdict"]
    assert result.numbers["dcs"]["per_attack"][0]["normalised"] is None
    assert result.numbers["dcs"]["normalised_worst"] is None


@pytest.mark.parametrize(
    ("knowledge", "expected"),
    [
        (["K2"], {"head": "pretrained", "tail": "pretrained"}),
        (["K2", "current_head"], {"head": "current", "tail": "pretrained"}),
        (["K2", "current_tail"], {"head": "pretrained", "tail": "current"}),
        (["K3"], {"head": "current", "tail": "current"}),
    ],
)
def test_head_and_tail_are_the_best_that_is_granted(pm, knowledge, expected):
    """The attack `which-weights` reports through its budget whether a half has moved in training."""
    attacks = [{"name": "which-weights", "knowledge": knowledge}]
    result = run(small(attacks=attacks), plugins=pm)
    budget = result.numbers["undefended"]["attacks"][0]["budget"]
    assert {
        name: "current" if budget[name] else "pretrained" for name in ("head", "tail")
    } == expected


def test_everything_that_can_be_granted_is_there_when_it_is_asked_for(pm):
    attacks = [{"name": "ask-all", "knowledge": ["K4", "in_domain", "few_labelled", "queries"]}]
    result = run(small(attacks=attacks, isolation="process"), plugins=pm)
    counts = result.numbers["undefended"]["attacks"][0]["budget"]
    assert 0 < counts["body"] < counts["model"]
    assert counts["odd_rows_of_query"] == 0
    assert (counts["in_domain"], counts["labelled"], counts["public"]) == (20, 16, 60)
    assert counts["rounds"] > 0


def test_an_observer_hears_which_arm_it_is(pm):
    heard = set()

    class Ear:
        @hookimpl
        def vflair_step_finished(self, arm, step, loss):
            heard.add(("step", arm))

        @hookimpl
        def vflair_message_sent(self, arm, role):
            heard.add(("sent", arm))

        @hookimpl
        def vflair_evaluated(self, arm, metrics):
            heard.add(("evaluated", arm))

    pm.register(Ear())
    run(small(defenses=[{"name": "shift"}]), plugins=pm)
    kinds, arms = ("step", "sent", "evaluated"), ("undefended", "defended")
    assert heard == {(kind, arm) for kind in kinds for arm in arms}
