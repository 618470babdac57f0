"""Transformers' Trainer with `SplitCallback`: the losses and norms of the Trainer on the unsplit model."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import TrainerCallback

from support.trainers import STEPS, assert_equal_weights, halves_of, logged, trainer_of
from vflair_core import Defense, Partition, SplitCallback
from vflair_core.errors import ProtocolError
from vflair_core.training.fine_tuning import FineTuning, Train
from vflair_core.training.tuning import Lora, tune
from vflair_core.training.two_phase_commit import agree

CUTS = [Partition(1, 1), Partition(1, 0)]


@pytest.mark.parametrize("partition", CUTS, ids=lambda partition: partition.kind)
@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": 0.3, "weight_decay": 0.1, "warmup_steps": 2},
        {"max_grad_norm": 0.5, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"},
        {"max_grad_norm": 0.5, "bf16": True},
        {"max_grad_norm": 0.0, "optim": "sgd"},
        {"optim": "adamw_torch", "adam_beta2": 0.9, "adam_epsilon": 1e-4},
    ],
    ids=["decay", "accumulation", "bf16", "sgd unclipped", "betas"],
)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_losses_and_norms_equal_those_of_the_trainer_on_the_whole_model(
    kind, options, partition, tmp_path
):
    whole, data_party, model_party = halves_of(kind, partition)
    expected = logged(trainer_of(whole, tmp_path, **options))
    callback = SplitCallback(data_party)
    assert logged(trainer_of(data_party.model, tmp_path, callback, **options)) == expected
    assert len({loss for loss, *_ in expected}) == STEPS
    assert_equal_weights(whole, data_party, model_party)
    assert data_party.step == STEPS


def test_without_the_callback_the_losses_differ(tmp_path):
    whole, data_party, _ = halves_of("llama", Partition(1, 1))
    expected = logged(trainer_of(whole, tmp_path))
    assert logged(trainer_of(data_party.model, tmp_path)) != expected


@pytest.mark.parametrize("partition", CUTS, ids=lambda partition: partition.kind)
def test_classification_with_adapters_equals_the_whole_model(partition, tmp_path):
    whole, data_party, model_party = halves_of("bert", partition, "classification")
    options = {"adapters": Lora(r=2, dropout=0.1), "seed": 1}
    tune(whole, slices=data_party.slices, **options)
    tune(data_party, **options)
    tune(model_party, **options)
    expected = logged(trainer_of(whole, tmp_path, labels="classes"))
    callback = SplitCallback(data_party)
    found = logged(trainer_of(data_party.model, tmp_path, callback, labels="classes"))
    assert found == expected


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_model_wrapped_by_peft_can_be_trained(tmp_path):
    whole, data_party, model_party = halves_of("llama", Partition(1, 1))
    models = []
    for model, blocks in ((whole, "0123"), (data_party.model, "03"), (model_party.model, "12")):
        targets = [f"model.layers.{n}.self_attn.q_proj" for n in blocks]
        models.append(peft.get_peft_model(model, peft.LoraConfig(target_modules=targets)))
    names = dict(whole.named_parameters())
    for name, weight in (*data_party.named_parameters(), *model_party.named_parameters()):
        names[name].data.copy_(weight.data)
    expected = logged(trainer_of(models[0], tmp_path))
    assert logged(trainer_of(models[1], tmp_path, SplitCallback(data_party))) == expected


def test_it_may_train_twice_and_leaves_the_arguments_as_they_were(tmp_path):
    whole, data_party, _ = halves_of("llama", Partition(1, 1))
    witness = trainer_of(whole, tmp_path, max_grad_norm=0.3)
    trainer = trainer_of(data_party.model, tmp_path, SplitCallback(data_party), max_grad_norm=0.3)
    for _ in range(2):
        witness.optimizer = trainer.optimizer = None
        assert logged(trainer) == logged(witness)
    assert trainer.args.max_grad_norm == 0.3


class Raise(TrainerCallback):
    def on_step_end(self, args, state, control, **parts):
        raise KeyboardInterrupt


def test_clipping_outlives_a_run_that_broke_off(tmp_path):
    _, data_party, _ = halves_of("llama", Partition(1, 1))
    callback = SplitCallback(data_party)
    trainer = trainer_of(data_party.model, tmp_path, callback, Raise(), max_grad_norm=0.3)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Raise)
    trainer.train()
    assert trainer.args.max_grad_norm == 0.3


def test_a_gradient_that_is_not_finite_skips_the_step_of_both(tmp_path):
    _, data_party, model_party = halves_of("llama", Partition(1, 1))
    next(model_party.parameters()).register_hook(lambda gradient: gradient * torch.nan)
    both = [*data_party.parameters(), *model_party.parameters()]
    before = [p.clone() for p in both]
    trainer_of(data_party.model, tmp_path, SplitCallback(data_party)).train()
    assert all(map(torch.equal, before, both))
    assert data_party.step == STEPS


class Counting(Defense):
    """Counts the steps it is told of."""

    steps = 0

    def after_step(self):
        self.steps += 1


def test_defenses_are_told_of_each_step(tmp_path):
    defense = Counting()
    _, data_party, _ = halves_of("llama", Partition(1, 1), defenses=[defense])
    callback = SplitCallback(data_party)
    options = {"gradient_accumulation_steps": 2}
    trainer_of(data_party.model, tmp_path, callback, **options).train()
    assert defense.steps == STEPS


def test_an_optimizer_that_the_model_party_cannot_build_is_refused(tmp_path):
    _, data_party, _ = halves_of("llama", Partition(1, 1))
    trainer = trainer_of(data_party.model, tmp_path, SplitCallback(data_party), optim="adagrad")
    with pytest.raises(ProtocolError, match=r"cannot build a Adagrad; it knows sgd, adam, adamw"):
        trainer.train()


def test_half_precision_whose_scale_the_trainer_keeps_to_itself_is_refused():
    _, data_party, _ = halves_of("llama", Partition(1, 1))
    with pytest.raises(ProtocolError, match="Use bf16=True, or FineTuning with scaler"):
        SplitCallback(data_party).on_train_begin(SimpleNamespace(fp16=True), None, None)


@pytest.fixture
def one_of_two_processes():
    store = FakeStore()
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=store)
    yield
    torch.distributed.destroy_process_group()


def with_the_trainer(data_party, folder):
    trainer_of(data_party.model, folder, SplitCallback(data_party)).train()


def with_fine_tuning(data_party, folder):
    FineTuning(data_party, Train(steps=2))


def with_a_loop_of_ones_own(data_party, folder):
    agree(data_party, data_party.parameters(), clip=1.0, rate=0.1)


@pytest.mark.parametrize("train", [with_the_trainer, with_fine_tuning, with_a_loop_of_ones_own])
@pytest.mark.usefixtures("one_of_two_processes")
def test_one_of_several_processes_does_not_train_by_itself(train, tmp_path):
    _, data_party, model_party = halves_of("llama", Partition(1, 1))
    with pytest.raises(ProtocolError, match="one of 2 processes"):
        train(data_party, tmp_path)
    assert data_party.step == 0
    assert model_party.shared.optimizer is None


def test_copies_of_the_model_on_several_devices_are_refused(tmp_path):
    _, data_party, _ = halves_of("llama", Partition(1, 1))
    trainer = trainer_of(data_party.model, tmp_path, SplitCallback(data_party))
    args = trainer.args
    args._n_gpu = 2
    with pytest.raises(ProtocolError, match="CUDA_VISIBLE_DEVICES=0"):
        SplitCallback(data_party).on_train_begin(args, trainer.state, trainer.control)
