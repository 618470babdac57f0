"""Victims in batches: what is their own in the messages, who stands beside them, and defenses that need a batch."""

from __future__ import annotations

import copy
from collections import Counter

import attrs
import pytest
import torch
from safetensors.torch import load_file

import vflair_attacks
import vflair_defenses
from support.paths import CHEATING_ATTACKS, SAMPLE_PLUGIN, TASK_KINDS
from support.small_models import LLAMA
from vflair_attacks.label_enumeration import LabelEnumeration
from vflair_attacks.label_reconstruction import BatchLabelReconstruction
from vflair_core import Example, Partition, Task, plugin_manager, run, split
from vflair_core.attacks.attack import launch
from vflair_core.attacks.halves import halves
from vflair_core.attacks.observables import Observables
from vflair_core.cli.terminal import _remarks
from vflair_core.errors import ExperimentError
from vflair_core.experiments.capture import record_victims
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.experiment import Victims
from vflair_core.experiments.victims import companions_of, with_companions
from vflair_core.testing import numbers_as_texts, tiny_model, tiny_tokenizer
from vflair_core.training.fine_tuning import FineTuning, Train
from vflair_defenses.decoy_rows import DecoyRows
from vflair_defenses.gaussian_noise import GaussianNoise

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HBT = Partition(1, 1)


def examples_of(lengths, labels=None):
    generator = torch.Generator().manual_seed(1)
    texts = numbers_as_texts([torch.randint(3, 50, (n,), generator=generator) for n in lengths])
    return [Example(t, label=None if labels is None else labels[n]) for n, t in enumerate(texts)]


def sent(model, examples, beside=(), *, defenses=(), kind="causal-lm", gradients=True):
    """What an attacker sees of the examples, without dropout, and what crossed."""
    party, _ = split(
        copy.deepcopy(model), HBT, tokenizer=tiny_tokenizer(64), defenses=defenses, seed=0
    )
    for defense in defenses:
        defense.prepare(numbers_as_texts([torch.arange(3, 40)]), party)
    party.defenses.task_kind = kind
    FineTuning(party, Train())  # opens the session in which a step can be skipped
    crossed = record_victims(party, examples, companions=beside, max_length=16, gradients=gradients)
    seen = Observables(crossed.transcript.messages, victims=len(examples), spots=crossed.spots)
    return seen, crossed


# -- what is whose ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [True, False])
def test_a_victims_part_of_a_batch_is_what_crosses_of_it_alone(gradients):
    """Its gradient is that of its own loss, times its share of the labels of the batch."""
    model, examples = tiny_model("llama"), examples_of([5, 9])
    beside = [examples_of([8, 6]), examples_of([3, 7])]
    alone, _ = sent(model, examples, gradients=gradients)
    together, crossed = sent(model, examples, beside, gradients=gradients)
    assert {len(r.tensor) for r in crossed.transcript.messages if r.role == "smashed"} == {3}
    assert list(together) == list(alone)
    for name in ("smashed", "returned", "lengths", "mask"):
        torch.testing.assert_close(together[name], alone[name])
    if gradients:
        share = torch.tensor([4 / 16, 8 / 16])  # of 4 + 7 + 5 and of 8 + 2 + 6 labels
        torch.testing.assert_close(together["share"], share)
        for role in ("hidden_grad", "smashed_grad"):
            torch.testing.assert_close(together[role], share[:, None, None] * alone[role])


def test_of_classes_each_example_has_the_same_share():
    model = tiny_model("bert", "classification", num_labels=2, **NO_DROPOUT)
    examples, beside = examples_of([5, 9], [0, 1]), [examples_of([8, 6, 3], [1, 0, 1])] * 2
    alone, _ = sent(model, examples, kind="classification")
    together, _ = sent(model, examples, beside, kind="classification")
    assert together["share"].tolist() == [0.25, 0.25]
    torch.testing.assert_close(together["returned"], alone["returned"])
    torch.testing.assert_close(together["hidden_grad"], alone["hidden_grad"] / 4)


def test_a_victim_is_found_among_decoys_and_their_labels_are_of_the_loss():
    """The hidden states are those that it has alone; the decoys of three real rows bring as many labels as their twins."""
    model, examples = tiny_model("llama"), examples_of([6, 6])
    beside = [examples_of([6]), examples_of([6])]
    alone, _ = sent(model, examples)
    seen, crossed = sent(model, examples, beside, defenses=[DecoyRows(count=6)])
    torch.testing.assert_close(seen["smashed"], alone["smashed"])
    assert seen["share"].tolist() == [0.125, 0.125]
    torch.testing.assert_close(seen["hidden_grad"], alone["hidden_grad"] / 8)
    assert {spot.row for spot in crossed.spots} != {0}


def test_a_victim_without_a_label_has_no_share_to_divide_by():
    """Of one token nothing is learnt."""
    together, _ = sent(
        tiny_model("llama"), examples_of([1, 5]), [examples_of([6]), examples_of([6])]
    )
    assert together["share"].tolist() == [1.0, pytest.approx(4 / 9)]
    assert not together["hidden_grad"][0].any()


def test_attacks_on_labels_know_their_victims_share_of_the_loss():
    """Through noise of a known scale: with a share of 1, the prior and not the gradient would decide."""
    model = tiny_model("bert", "classification", num_labels=4, **NO_DROPOUT)
    labels = [n % 4 for n in range(32)]
    examples = examples_of([6] * 32, labels)
    beside = [examples_of([6] * 7, [1, 2, 3, 0, 1, 2, 3])] * 32
    noise = GaussianNoise(
        noise_multiplier=0.0, clip=float("inf"), gradient_multiplier=0.02, gradient_clip=1.0
    )
    seen, _ = sent(model, examples, beside, defenses=[noise], kind="classification")
    tail = halves(model, HBT)[1]
    knowledge = {
        **seen,
        "tail": tail,
        "partition": HBT,
        "task_kind": "classification",
        "gradient_mechanism": noise.gradient_mechanism(),
    }
    for attack in (LabelEnumeration(), BatchLabelReconstruction(iterations=100)):
        right = {
            share: float((launch(attack, known).labels == torch.tensor(labels)).float().mean())
            for share, known in (
                ("told", knowledge),
                ("taken for 1", {**knowledge, "share": torch.ones(32)}),
            )
        }
        assert right["told"] >= 0.9
        assert right["taken for 1"] <= 0.5


# -- who stands beside a victim --------------------------------------------------------------------------


def chosen(*, companions=3, labels=(0, 1) * 20, kind="classification", victims=None):
    train = [Example(f"{n}", label=label) for n, label in enumerate(labels)]
    names = ("zero", "one") if kind == "classification" else ()
    task = Task("t", kind, labels=names, train=train, test=train[:2], public=["c"])
    there = {"count": 8, "companions": companions, "max_length": 16, **(victims or {})}
    table = {"task": {"name": "t"}, "model": {"name": "m"}, "train": {"steps": 0}, "victims": there}
    e = experiment_from(table)
    return e, task, companions_of(e, task)


def test_companions_are_no_victims_and_go_round():
    _, _, rows = chosen()
    flat = [row for some in rows for row in some]
    assert min(flat) >= 8
    assert len(set(flat)) == len(flat) == 24  # 32 are there
    assert rows == chosen()[2]
    assert all(len(set(some)) == 20 for some in chosen(companions=20)[2])


@pytest.mark.parametrize("companions", [1, 3])
def test_one_at_least_is_of_another_class(companions):
    labels = [0] * 30 + [1] * 10
    for victim, rows in enumerate(chosen(companions=companions, labels=labels)[2]):
        assert len(set(rows)) == companions
        assert any(labels[row] != labels[victim] for row in rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"companions": 33},
            r"victims.companions = 33 beside victims.count = 8 needs 41 train examples.* has 40",
        ),
        ({"labels": [0] * 40}, "are of the class of victim 0, and companions need another"),
    ],
)
def test_too_few_companions_are_refused_with_the_reason(options, words):
    with pytest.raises(ExperimentError, match=words):
        chosen(**options)


def test_guarantees_count_the_rounds_of_a_companion():
    """Of 4 companions that go round 8 victims, 3 at a time, each crosses 6 times; a victim once, a training not at all."""
    _, task, rows = chosen(labels=(0, 1) * 6, kind="causal-lm")
    assert Counter(row for some in rows for row in some) == dict.fromkeys((8, 9, 10, 11), 6)
    party, _ = split(tiny_model("llama"), HBT, tokenizer=tiny_tokenizer(64))
    FineTuning(party, Train())
    beside = [[task.row("train", row) for row in some] for some in rows]
    victims = [task.row("train", n) for n in range(8)]
    record_victims(party, victims, companions=beside, max_length=16, gradients=True)
    assert party.releases.gradients == party.releases.messages == 6


# -- whole runs ------------------------------------------------------------------------------------------


@pytest.fixture
def pm():
    manager = plugin_manager([SAMPLE_PLUGIN, TASK_KINDS], entry_point_group="vflair.none")
    manager.register(vflair_attacks)
    manager.register(vflair_defenses)
    return manager


def experiment(defense="", *, model_type="bert", **options):
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return experiment_from(
        {
            "task": {"name": "two-words"},
            "model": {"vocab_size": 300, "config": {"model_type": model_type, **sizes}},
            "partition": {"head": 1, "tail": 1},
            "train": {"steps": 4, "batch_size": 8, "max_length": 16},
            "victims": {"count": 24, "companions": 7, "known": 12, "max_length": 16},
            "threads": 1,
            "defenses": [{"name": defense, "options": options}] if defense else [],
            "attacks": [
                {"name": "direction-scoring", "knowledge": ["K0", "known_labels"]},
                {"name": "label-enumeration", "knowledge": "K3"},
            ],
        }
    )


def test_marvell_is_attacked_in_a_run_and_hides_labels(pm):
    """Both attacks are right without it, and much less so with it; the control, undefended again, is right too."""
    result = run(experiment("marvell", power=50.0), plugins=pm)
    plain, hidden = (result.numbers[arm]["attacks"] for arm in ("undefended", "defended"))
    assert all(grade["attack_performance"] >= 0.9 for grade in plain)
    assert all(grade["attack_performance"] <= 0.8 for grade in hidden)
    assert all(grade["positive_control"] >= 0.9 for grade in hidden)


def test_norms_that_match_change_the_messages_of_victims_in_batches(pm):
    plain = run(experiment("norm-matching", strength=10.0), plugins=pm).numbers["defended"]
    none = run(experiment("norm-matching", strength=0.0), plugins=pm).numbers["defended"]
    assert plain["attacks"] != none["attacks"]


def test_updates_beside_batches_are_the_victims_own(pm, tmp_path):
    """They cross once more for them, alone, so what is shared is what is shared without companions."""
    shared = []
    for companions in (0, 3):
        e = experiment_from(
            {
                "task": {"name": "words"},
                "model": {"vocab_size": 300, "config": LLAMA},
                "partition": {"head": 1, "tail": 1},
                "train": {"steps": 1, "max_length": 16},
                "victims": {
                    "count": 4,
                    "bypass": 2,
                    "companions": companions,
                    "share_updates": True,
                },
                "threads": 1,
                "attacks": [{"name": "label-least-squares", "knowledge": ["K3", "updates"]}],
            }
        )
        out = tmp_path / str(companions)
        run(e, plugins=pm, out=out, keep_evidence=True)
        shared.append(load_file(out / "evidence-undefended" / "updates-main.safetensors"))
    assert shared[0].keys() == shared[1].keys()
    for name, gradient in shared[0].items():
        torch.testing.assert_close(shared[1][name], gradient)


def test_disclosed_positions_of_a_batch_are_refused(pm):
    table = {
        "task": {"name": "words"},
        "model": {"vocab_size": 300, "config": LLAMA},
        "partition": {"head": 1, "tail": 0, "only_scored": True},
        "victims": {"count": 4, "companions": 2},
    }
    with pytest.raises(
        ExperimentError, match=r"some row of a batch scores.*victims.companions = 0"
    ):
        run(experiment_from(table), plugins=pm)


def test_a_model_of_two_stacks_is_refused_before_anything_private_crosses(pm):
    table = {
        "task": {"name": "reversed"},
        "model": {
            "vocab_size": 300,
            "config": {"model_type": "t5", "d_model": 16, "num_layers": 2},
        },
        "victims": {"count": 4, "companions": 2},
    }
    with pytest.raises(ExperimentError, match=r"has two stacks.*set victims.companions = 0"):
        run(experiment_from(table), plugins=pm)


# -- the default -----------------------------------------------------------------------------------------


def resolved(*, model="gpt2", labels=(0, 1) * 20, kind="classification", partition=None, **victims):
    e, task, _ = chosen(labels=labels, kind=kind, companions=0)
    e = attrs.evolve(e, victims=Victims(**{"count": 8, **victims}))
    e = attrs.evolve(e, partition=partition or Partition())
    whole = tiny_model(model, "seq2seq" if model == "t5" else "causal-lm")
    return with_companions(e, task, whole).victims.companions


def test_left_out_victims_cross_as_training_does():
    batch = Train().batch_size
    assert resolved() == batch - 1
    assert resolved(companions=2) == 2
    assert resolved(companions=0) == 0
    assert resolved(count=37) == 3  # no more are there
    assert resolved(count=40) == 0
    assert resolved(labels=[1] * 40) == 0  # none of another class is there
    assert resolved(labels=[1] * 40, kind="causal-lm") == batch - 1


def test_left_out_victims_cross_alone_where_a_batch_would_be_another():
    assert resolved(phase="inference") == 0
    assert resolved(model="t5") == 0
    assert resolved(partition=Partition(1, 0, only_scored=True)) == 0


@pytest.mark.parametrize("companions", [None, 0])
def test_a_defense_that_acts_on_who_crosses_alone_hides_nothing_unless_victims_are_alone(
    companions,
):
    pm = plugin_manager([SAMPLE_PLUGIN, CHEATING_ATTACKS], entry_point_group="vflair.none")
    pm.register(vflair_attacks)
    victims = {"count": 6, "max_length": 12} | ({} if companions is None else {"companions": 0})
    table = {
        "task": {"name": "words"},
        "model": {"vocab_size": 300, "config": LLAMA},
        "partition": {"head": 1, "tail": 1},
        "train": {"steps": 1, "batch_size": 4, "max_length": 12},
        "victims": victims,
        "attacks": [{"name": "nearest-embedding", "knowledge": "K1"}],
        "defenses": [{"name": "on-victims"}],
    }
    result = run(experiment_from(table), plugins=pm)
    alone = companions == 0
    there, hidden = (result.numbers[arm] for arm in ("undefended", "defended"))
    assert hidden["companions"] == (0 if alone else 3)
    read = [arm["attacks"][0]["attack_performance"] for arm in (there, hidden)]
    assert (read[1] < read[0]) == alone, read
    said = " ".join(_remarks(result, ["defended"]))
    assert ("ACTS OTHERWISE ON A TEXT ALONE" in said) == alone


# -- dropout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [True, False])
def test_victims_cross_without_dropout_unless_it_is_asked_for(gradients):
    """In training, too: what an attacker is shown is the head's row, and gradients of the whole loss without dropout."""
    dropped = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
    model = tiny_model("gpt2", **dropped)
    examples = examples_of([5, 9])
    party, _model_party = split(copy.deepcopy(model), HBT, tokenizer=tiny_tokenizer(64))
    FineTuning(party, Train())
    options = {"max_length": 16, "gradients": gradients}
    found = [record_victims(party, examples, **options) for _ in range(2)]
    with_dropout = record_victims(party, examples, dropout=True, **options)
    each = [
        [
            r.tensor
            for r in c.transcript.messages
            if r.role in ("smashed", "returned", "hidden_grad")
        ]
        for c in (*found, with_dropout)
    ]
    assert all(map(torch.equal, each[0], each[1]))
    assert all(map(torch.equal, each[0], each[2])) == (not gradients)
    ids = party.tokenizer(examples[0].text, return_tensors="pt")["input_ids"]
    whole = copy.deepcopy(model).eval()
    torch.testing.assert_close(each[0][0], whole(ids, output_hidden_states=True).hidden_states[1])
    phases = {r.phase for r in found[0].transcript.messages}
    assert phases == ({"train", "control"} if gradients else {"eval"}) - {"control"}
    party.model.train()
    assert all(module.training for module in party.model.modules())
