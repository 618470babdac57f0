"""An undefended fine-tuning is done once for all depths of the cut, and each depth has the numbers of its own run."""

from __future__ import annotations

import attrs
import pytest

from support.paths import SAMPLE_PLUGIN, TASK_KINDS
from support.small_models import ZAMBA2
from vflair_core import plugin_manager, run
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.cut_sweep import run_cuts
from vflair_core.experiments.run import run_sharing
from vflair_core.experiments.shared_training import at_any_depth
from vflair_core.experiments.studies.grid import grid_from
from vflair_core.experiments.studies.outlook import outlook
from vflair_core.experiments.studies.study import study
from vflair_core.hookspecs import hookimpl

LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
CLASSES = {
    "name": "manual-chapters",
    "options": {"chapters": 2, "examples_per_chapter": 8, "public_characters": 2000},
}
BASE = {
    "task": {"name": "words"},
    "model": {"config": LLAMA, "vocab_size": 300},
    "partition": {"head": 1, "tail": 1},
    "train": {"steps": 4, "batch_size": 4, "max_length": 16, "learning_rate": 0.01},
    "victims": {"count": 4, "max_length": 12, "bypass": 2},
    "attacks": [{"name": "first-row", "knowledge": "K1"}],
    "isolation": "inline",
    "threads": 1,
}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 64}
BERT = {
    "model_type": "bert", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ALBERT = {**BERT, "model_type": "albert", "embedding_size": 16}
VARIED = {
    "weights": {},
    "HT": {"partition": {"head": 1, "tail": 0}},
    "adapters": {"train": {**BASE["train"], "lora": {"r": 2}}},
    "adapters that drop": {"train": {**BASE["train"], "lora": {"r": 2, "dropout": 0.3}}},
    "no clipping, evaluated": {"train": {**BASE["train"], "clip": 0.0, "evaluate_every": 1}},
    "dropout everywhere, tied": {
        "model": {"config": GPT2, "vocab_size": 300},
        "victims": {**BASE["victims"], "dropout": True},
    },
    "dropout, HT, tied": {
        "model": {"config": GPT2, "vocab_size": 300},
        "partition": {"head": 1, "tail": 0},
    },
    "a named block": {"train": {**BASE["train"], "trainable": ["blocks.3"]}},
    "public phase, packed": {
        "pretrain": {"steps": 2, "length": 8},
        "train": {**BASE["train"], "packing": True},
    },
    "through the codec, shared updates": {
        "wire": True,
        "victims": {**BASE["victims"], "share_updates": True},
    },
    "asked": {"victims": {**BASE["victims"], "phase": "inference"}},
    "classes": {"task": CLASSES, "model": {"config": BERT, "vocab_size": 300}},
}
T5 = {
    "model_type": "t5", "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 2,
}  # fmt: skip
DEBERTA = {
    **BERT, "model_type": "deberta-v2", "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
    "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
}  # fmt: skip
ZAMBA = {
    **ZAMBA2,
    "model_type": "zamba2",
    "num_hidden_layers": 6,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba", "mamba"],
}
COHERE = {
    **LLAMA, "model_type": "cohere2", "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}  # fmt: skip
LONG = {**BASE["train"], "max_length": 48}
APART = {
    "an encoder that all blocks of the decoder read": {
        "task": {"name": "reversed"},
        "model": {"config": T5, "vocab_size": 300},
        "train": LONG,
        "victims": {**BASE["victims"], "max_length": 48},
    },
    "positions that all blocks read": {
        "task": CLASSES,
        "model": {"config": DEBERTA, "vocab_size": 300},
    },
    "blocks of several kinds that share weights": {"model": {"config": ZAMBA, "vocab_size": 300}},
    "windows in some blocks": {"model": {"config": COHERE, "vocab_size": 300}},
    "a block that changes sides": {
        "train": {**BASE["train"], "trainable": ["blocks.1", "task_head"]}
    },
    "blocks of shared weights": {"task": CLASSES, "model": {"config": ALBERT, "vocab_size": 300}},
}


class Steps:
    """Counts the steps of fine-tuning by arm."""

    def __init__(self):
        self.arms = []

    @hookimpl
    def vflair_step_finished(self, arm, step, loss):
        self.arms.append(arm)


def watched():
    manager, steps = plugin_manager([SAMPLE_PLUGIN, TASK_KINDS]), Steps()
    manager.register(steps)
    return manager, steps


def at(head, **changes):
    e = experiment_from({**BASE, **changes})
    return attrs.evolve(e, partition=attrs.evolve(e.partition, head=head))


@pytest.mark.parametrize("changes", APART.values(), ids=APART)
def test_where_depth_changes_what_crosses_or_in_which_order_it_is_summed_each_trains(
    changes, tmp_path
):
    manager, steps = watched()
    for head in (1, 2):
        shared = run_sharing(tmp_path, at(head, **changes), plugins=manager, out=None)
        assert shared.numbers_hash == run(at(head, **changes), plugins=manager).numbers_hash
    assert len(steps.arms) == 16


def test_masks_that_one_cut_sends_and_another_does_not_are_counted_where_they_cross(tmp_path):
    """Of alternating blocks the body has both kinds, or one: then another mask crosses, or none."""
    gemma = {
        **LLAMA, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 8, "initializer_range": 0.2,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
    }  # fmt: skip
    manager, steps = watched()
    counted = set()
    for head in (1, 2):
        e = at(head, model={"config": gemma, "vocab_size": 300})
        shared = run_sharing(tmp_path, e, plugins=manager, out=None)
        assert shared.numbers_hash == run(e, plugins=manager).numbers_hash
        counted.add(str(shared.numbers["undefended"]["crossed"]))
    assert len(counted) == 2
    assert len(steps.arms) == 16


@pytest.mark.parametrize("changes", VARIED.values(), ids=VARIED)
def test_what_is_taken_over_is_what_a_run_of_its_own_finds(changes, tmp_path):
    manager, steps = watched()
    first, second = at(1, **changes), at(2, **changes)
    run_sharing(tmp_path, first, plugins=manager, out=None)
    trained = len(steps.arms)
    shared = run_sharing(tmp_path, second, plugins=manager, out=None)
    assert len(steps.arms) == trained == 4
    alone = run(second, plugins=manager)
    assert shared.numbers_hash == alone.numbers_hash
    assert shared.samples == alone.samples


def test_what_it_cost_is_counted_where_it_is_taken_over_and_named(tmp_path):
    manager, _ = watched()
    first = run_sharing(tmp_path, at(1), plugins=manager, out=None).cost["undefended"]
    taken = run_sharing(tmp_path, at(2), plugins=manager, out=None).cost["undefended"]
    alone = run_sharing(tmp_path / "other", at(2), plugins=manager, out=None).cost["undefended"]
    assert taken["messages_by_kind"].pop("open") == alone["messages_by_kind"].pop("open") + 1
    for counted in ("messages_by_kind", "messages_by_role", "bytes", "rows", "tokens"):
        for cost in (taken, alone):
            cost[counted].pop("norms received", None)  # of a session that is opened
        assert taken[counted] == alone[counted]
    assert taken["tokens_per_second"]["fine-tuning"] == first["tokens_per_second"]["fine-tuning"]
    assert taken.pop("trained_at") == {"head": 1, "tail": 1, "disclose": []}
    assert set(taken) == set(alone) == set(first)


def test_a_defended_arm_is_trained_at_each_cut(tmp_path):
    manager, steps = watched()
    for head in (1, 2):
        defended = at(head, defenses=[{"name": "shift"}])
        run_sharing(tmp_path, defended, plugins=manager, out=None)
    assert steps.arms == ["undefended"] * 4 + ["defended"] * 8


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {**BASE["train"], "trainable": ["head"]}},
        {"train": {**BASE["train"], "trainable": ["model_party"]}},
        {"train": {**BASE["train"], "lora": {"r": 2, "full": ["tail"]}}},
        {"train": {"steps": 0}},
        {"wire": True, "wire_dtype": "int8"},
        {"devices": ["cpu"]},
        {"save": True},
        {"partition_plugin": "any"},
    ],
    ids=str,
)
def test_what_may_differ_by_depth_is_not_shared(changes):
    assert at_any_depth(at(1, **changes)) is None


def test_nothing_is_shared_that_is_not_the_same():
    same = at_any_depth(at(1))
    assert same == at_any_depth(at(3)) == at_any_depth(at(1, partition={"head": 1, "tail": 2}))
    for other in (
        {"partition": {"head": 1, "tail": 0}},
        {"seed": 1},
        {"train": {**BASE["train"], "learning_rate": 0.02}},
        {"threads": 2},
        {"model": {"config": GPT2, "vocab_size": 300}},
    ):
        assert at_any_depth(at(1, **other)) != same


def test_a_run_at_several_cuts_trains_once(tmp_path):
    manager, steps = watched()
    rows = run_cuts(at(1), [1, 0, 2], tmp_path, plugins=manager)
    assert len(steps.arms) == 4
    assert [row.head for row in rows] == [1, 0, 2]
    found = run(at(2), plugins=manager).numbers["undefended"]
    assert rows[-1].attack_performance == found["attacks"][0]["attack_performance"]
    assert rows[-1].main_performance == found["main_performance"]


GRID = {
    "experiment": BASE,
    "vary": {"partition.head": [1, 2]},
    "axes": {"defense": [{"label": "none"}, {"label": "shift", "defenses": [{"name": "shift"}]}]},
}


@pytest.mark.parametrize(("backend", "workers"), [("sequential", 1), ("loky", 2)])
def test_a_study_trains_once_for_all_depths_and_leaves_no_weights(tmp_path, backend, workers):
    db = tmp_path / "s.db"
    options = {"plugins": [SAMPLE_PLUGIN], "backend": backend, "workers": workers}
    cells = study(grid_from(GRID), db, **options)
    plugins = plugin_manager([SAMPLE_PLUGIN])
    for cell in cells:
        assert cell.result.numbers_hash == run(cell.experiment, plugins=plugins).numbers_hash
    taken = {
        c.experiment.partition.head: "trained_at" in c.result.cost["undefended"] for c in cells
    }
    assert sorted(taken.values()) == [False, True]
    assert not list((tmp_path / "s.files" / "trained").rglob("*.safetensors"))
    assert outlook(grid_from(GRID), db, plugins=[SAMPLE_PLUGIN]).left == {}


def test_a_file_that_is_damaged_is_trained_anew_and_one_that_nobody_wants_goes(tmp_path):
    manager, steps = watched()
    run_sharing(tmp_path, at(1), plugins=manager, out=None)
    (kept,) = tmp_path.glob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:500])
    shared = run_sharing(tmp_path, at(2), plugins=manager, out=None)
    assert len(steps.arms) == 8
    assert shared.numbers_hash == run(at(2), plugins=manager).numbers_hash
    db = tmp_path / "s.db"
    (tmp_path / "s.files" / "trained" / "old").mkdir(parents=True)
    study(grid_from(GRID), db, plugins=[SAMPLE_PLUGIN], backend="sequential")
    assert not list((tmp_path / "s.files" / "trained").glob("*"))


def test_where_the_first_fails_the_next_trains(tmp_path):
    """Four blocks, of which a head of nine cannot be."""
    grid = {**GRID, "vary": {"partition.head": [9, 1, 2]}}
    cells = study(grid_from(grid), tmp_path / "s.db", plugins=[SAMPLE_PLUGIN], backend="sequential")
    assert [bool(cell.error) for cell in cells] == [c.experiment.partition.head == 9 for c in cells]
    done = [c for c in cells if c.result]
    assert [("trained_at" in c.result.cost["undefended"]) for c in done if not c.experiment.defenses] == [False, True]  # fmt: skip
