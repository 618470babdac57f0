"""The Trainer saves, resumes and goes back to its best step, and both parties with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from support.paths import KILLED_TRAINER
from support.trainers import assert_equal_weights, halves_of, logged, trainer_of
from vflair_core import Defense, Lora, Partition, SplitCallback, merge, tune
from vflair_core.errors import CheckpointError, PartitionError, ProtocolError
from vflair_core.partition.adapters import inject_adapter

CUTS = [Partition(1, 1), Partition(1, 0)]
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_grad_norm": 0.3, "max_steps": 6}


def parties(tmp_path, partition=CUTS[0], kind="gpt2", **options):
    whole, data_party, model_party = halves_of(kind, partition, **options)
    model_party.checkpoints = tmp_path / "model party"
    return whole, data_party, model_party


def split_trainer(data_party, tmp_path, *callbacks, **options):
    return trainer_of(
        data_party.model,
        tmp_path / "trainer",
        SplitCallback(data_party),
        *callbacks,
        **{**SAVING, **options},
    )


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **parts):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("partition", CUTS, ids=lambda partition: partition.kind)
@pytest.mark.parametrize("stop", [3, 5])
def test_a_run_that_broke_off_goes_on_as_the_trainer_does_on_the_whole_model(
    partition, stop, tmp_path
):
    whole, data_party, _ = parties(tmp_path, partition)
    expected = logged(trainer_of(whole, tmp_path / "whole", **{**SAVING, "save_strategy": "no"}))
    with pytest.raises(KeyboardInterrupt):
        logged(split_trainer(data_party, tmp_path, StopAt(stop)))
    _, again, model_party = parties(tmp_path, partition)  # as a new process would
    trainer = split_trainer(again, tmp_path)
    assert logged(trainer, resume_from_checkpoint=True) == expected
    assert_equal_weights(whole, again, model_party)
    assert again.step == SAVING["max_steps"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_of_peft_are_resumed_too(tmp_path):
    def adapted():
        whole, data_party, model_party = parties(tmp_path, kind="llama")
        for owner in (data_party, model_party):
            tune(owner, adapters=Lora(r=2))
        tune(whole, adapters=Lora(r=2), slices=data_party.slices)
        return whole, data_party, model_party

    whole, data_party, _ = adapted()
    expected = logged(trainer_of(whole, tmp_path / "whole", **{**SAVING, "save_strategy": "no"}))
    with pytest.raises(KeyboardInterrupt):
        logged(split_trainer(data_party, tmp_path, StopAt(3)))
    _, again, model_party = adapted()
    assert logged(split_trainer(again, tmp_path), resume_from_checkpoint=True) == expected
    assert_equal_weights(whole, again, model_party)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_model_that_peft_wraps_is_resumed_too(tmp_path):
    def wrapped():
        _, data_party, model_party = parties(tmp_path, kind="llama")
        tune(model_party, ["body"])
        torch.manual_seed(0)
        targets = [f"model.layers.{n}.self_attn.q_proj" for n in (0, 3)]
        model = peft.get_peft_model(data_party.model, peft.LoraConfig(target_modules=targets))
        return data_party, model_party, model

    def trainer(data_party, model, *more):
        callbacks = (SplitCallback(data_party), *more)
        return trainer_of(model, tmp_path / "trainer", *callbacks, **SAVING)

    data_party, _, model = wrapped()
    expected = logged(trainer(data_party, model))
    shutil.rmtree(tmp_path / "trainer")
    data_party, _, model = wrapped()
    with pytest.raises(KeyboardInterrupt):
        logged(trainer(data_party, model, StopAt(5)))
    data_party, _, model = wrapped()
    assert logged(trainer(data_party, model), resume_from_checkpoint=True) == expected


class Noise(Defense):
    """Adds noise of its own stream."""

    def on_smashed(self, smashed, exchange):
        return smashed + 0.1 * torch.randn(smashed.shape, generator=exchange.generator)


def test_the_noise_of_a_defense_goes_on_where_it_was(tmp_path):
    _, data_party, _ = parties(tmp_path, defenses=[Noise()], seed=4)
    expected = logged(split_trainer(data_party, tmp_path))
    shutil.rmtree(tmp_path / "trainer")
    _, data_party, _ = parties(tmp_path, defenses=[Noise()], seed=4)
    with pytest.raises(KeyboardInterrupt):
        logged(split_trainer(data_party, tmp_path, StopAt(3)))
    _, again, _ = parties(tmp_path, defenses=[Noise()], seed=9)
    assert logged(split_trainer(again, tmp_path), resume_from_checkpoint=True) == expected


def test_the_best_step_is_loaded_at_both_and_old_ones_are_dropped_at_both(tmp_path):
    options = SAVING | {
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "save_total_limit": 2,
        "greater_is_better": True,  # so that the last step is not the best one
    }
    whole, data_party, model_party = parties(tmp_path)
    witness = trainer_of(whole, tmp_path / "whole", **options)
    trainer = split_trainer(data_party, tmp_path, **options)
    assert logged(trainer) == logged(witness)
    assert trainer.state.best_global_step == witness.state.best_global_step < 6
    assert_equal_weights(whole, data_party, model_party)
    assert data_party.step == trainer.state.best_global_step
    ours = {path.name for path in (tmp_path / "trainer").glob("checkpoint-*")}
    assert len(ours) == 2
    theirs = {path.name for path in (tmp_path / "model party").glob("run-*/step-*")}
    assert len(theirs) <= 3  # one more may wait to be dropped at the next save
    assert {f"step-{int(name.rpartition('-')[2]):08d}" for name in ours} <= theirs


def test_what_was_saved_can_be_merged(tmp_path):
    whole, data_party, _ = parties(tmp_path)
    logged(trainer_of(whole, tmp_path / "whole", **{**SAVING, "save_strategy": "no"}))
    logged(split_trainer(data_party, tmp_path))
    (part,) = (tmp_path / "model party").glob("run-*/step-00000006")
    merge(tmp_path / "trainer" / "checkpoint-6", part, out=tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    names = dict(whole.named_parameters())
    assert all(torch.equal(weight, names[name]) for name, weight in merged.named_parameters())


def test_saving_that_the_model_party_does_not_allow_is_refused_before_the_first_step(tmp_path):
    _, data_party, _ = halves_of("gpt2", Partition(1, 1))
    with pytest.raises(ProtocolError, match=r"model_party\.checkpoints = folder"):
        split_trainer(data_party, tmp_path).train()
    assert data_party.step == 0


def test_a_checkpoint_without_the_data_partys_part_is_refused(tmp_path):
    _, data_party, _ = parties(tmp_path)
    logged(split_trainer(data_party, tmp_path))
    (tmp_path / "trainer" / "checkpoint-6" / "data_party.safetensors").unlink()
    with pytest.raises(CheckpointError, match="Go on from another checkpoint of this run"):
        split_trainer(data_party, tmp_path).train(resume_from_checkpoint=True)


def test_after_training_the_model_is_no_whole_one_either(tmp_path):
    _, data_party, _ = parties(tmp_path)
    trainer = split_trainer(data_party, tmp_path)
    trainer.train()
    with pytest.raises(PartitionError, match="vflair merge"):
        trainer.save_model(str(tmp_path / "final"))


def run(folder, *more):
    return subprocess.Popen(
        [sys.executable, str(KILLED_TRAINER), str(folder), *more],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(KILLED_TRAINER.parents[1]), *sys.path])},
    )


def losses_of(process, until=None):
    found = {}
    for line in process.stdout:
        if line.startswith("{"):
            continue  # the Trainer's own
        step, loss = line.split()
        found[int(step)] = loss
        if int(step) == until:
            process.kill()
            break
    process.stdout.close()
    process.wait()
    return found


def test_killed_twice_it_takes_the_steps_of_the_whole_model(tmp_path):
    witness = run(tmp_path / "whole", "whole")
    expected = losses_of(witness)
    first = losses_of(run(tmp_path / "split"), until=3)
    second = losses_of(run(tmp_path / "split"), until=6)
    checkpoints = (tmp_path / "split" / "trainer").glob("checkpoint-*/trainer_state.json")
    max(checkpoints, key=lambda path: int(path.parent.name[11:])).unlink()  # killed while it saved
    last = losses_of(run(tmp_path / "split"))
    assert first | second | last == expected
    assert len(expected) == 8
    assert 1 not in last


def test_without_the_optimizer_both_begin_with_a_fresh_one(tmp_path):
    options = {**SAVING, "save_only_model": True}
    whole, data_party, _ = parties(tmp_path)
    witness = trainer_of(whole, tmp_path / "whole", StopAt(5), **options)
    with pytest.raises(KeyboardInterrupt):
        logged(witness)
    with pytest.raises(KeyboardInterrupt):
        logged(split_trainer(data_party, tmp_path, StopAt(5), **options))
    whole, again, model_party = parties(tmp_path)
    expected = logged(trainer_of(whole, tmp_path / "whole", **options), resume_from_checkpoint=True)
    found = logged(split_trainer(again, tmp_path, **options), resume_from_checkpoint=True)
    assert found == expected
    assert_equal_weights(whole, again, model_party)


@pytest.mark.filterwarnings("ignore:Already found a .peft_config.:UserWarning")
def test_two_adapters_are_refused_before_the_first_step(tmp_path):
    _, data_party, _ = parties(tmp_path, kind="llama")
    config = peft.LoraConfig(target_modules=["q_proj"])
    for name in ("one", "two"):
        inject_adapter(data_party.model, config, seed=0, name=name)
    with pytest.raises(CheckpointError, match="There are 2 adapters"):
        split_trainer(data_party, tmp_path).train()
    assert data_party.step == 0
