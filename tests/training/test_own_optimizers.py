"""An optimizer of the user's own: the model party takes the same steps with its weights, or training does not begin."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from support.trainers import STEPS, assert_equal_weights, halves_of, logged, rows_for, trainer_of
from vflair_core import Partition, SplitCallback
from vflair_core.errors import ProtocolError
from vflair_core.testing import tiny_batch
from vflair_core.training.fine_tuning import FineTuning, Train

CUTS = [Partition(1, 1), Partition(1, 0)]


def is_plain(name):
    return "norm" in name or "bias" in name or "ln_" in name


def groups_of(model, rule, *options):
    """One group for each of `options`; `rule` says which a weight is in by its name."""
    return [
        {"params": [w for n, w in model.named_parameters() if rule(n) == number], **each}
        for number, each in enumerate(options)
    ]


def adamw(model, rule, *options):
    return torch.optim.AdamW(groups_of(model, rule, *options), lr=1e-2)


def same_steps(kind, partition, folder, build, schedule=None, **callback):
    """Train whole and split with what `build` makes of each model, and compare."""
    whole, data_party, model_party = halves_of(kind, partition)
    logs = []
    for model, callbacks in (
        (whole, []),
        (data_party.model, [SplitCallback(data_party, **callback)]),
    ):
        optimizer = build(model)
        optimizers = (optimizer, schedule(optimizer) if schedule else None)
        logs.append(
            logged(trainer_of(model, folder, *callbacks, optimizers=optimizers, max_grad_norm=0.3))
        )
    assert logs[0] == logs[1]
    assert_equal_weights(whole, data_party, model_party)
    return model_party.shared.optimizer


BETAS = ({"betas": (0.8, 0.9), "weight_decay": 0.2}, {"betas": (0.95, 0.99), "weight_decay": 0.0})


@pytest.mark.parametrize("partition", CUTS, ids=lambda partition: partition.kind)
def test_one_group_that_decays_everything(partition, tmp_path):
    same_steps(
        "llama",
        partition,
        tmp_path,
        lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3),
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_betas_and_decay_by_kind_of_weight(kind, tmp_path):
    optimizer = same_steps(
        kind, Partition(1, 1), tmp_path, lambda model: adamw(model, is_plain, *BETAS)
    )
    assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.9), (0.95, 0.99)]


def test_a_rule_by_name_reaches_weights_that_the_data_party_has_none_like(tmp_path):
    rule = lambda name: int("norm" in name)  # noqa: E731 - as a user writes it
    build = lambda model: adamw(model, rule, *BETAS)  # noqa: E731
    same_steps("llama", Partition(1, 0), tmp_path, build, group_of=rule)


def deeper_is_slower(name):
    block = name.partition("layers.")[2].partition(".")[0]
    return int(block) + 1 if block else 0


def test_rates_that_fall_from_block_to_block(tmp_path):
    options = [{"lr": 1e-2 * 0.5**n} for n in range(5)]

    def build(model):
        return adamw(model, deeper_is_slower, *options)

    same_steps("llama", Partition(1, 1), tmp_path, build, group_of=deeper_is_slower)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS + 1),
        lambda optimizer: LambdaLR(optimizer, [lambda n: 0.5**n, lambda n: 1 / (n + 1)]),
    ],
    ids=["momentum goes in a cycle", "a rate for each group"],
)
def test_what_a_scheduler_changes_is_changed_at_both(schedule, tmp_path):
    same_steps(
        "llama",
        Partition(1, 1),
        tmp_path,
        lambda model: adamw(model, is_plain, *BETAS),
        schedule,
    )


def test_fine_tuning_takes_what_a_scheduler_changes_beside_the_rate():
    _, data_party, model_party = halves_of("llama", Partition(1, 1))
    tuning = FineTuning(data_party, Train(learning_rate=1e-2))
    schedule = OneCycleLR(tuning.optimizer, max_lr=1e-2, total_steps=4)
    for n in range(3):
        tuning.step(
            tiny_batch(data_party.model, labels="tokens", seed=n), rate=schedule.get_last_lr()[0]
        )
        theirs = model_party.shared.optimizer.param_groups[0]
        assert theirs["betas"] == tuning.optimizer.param_groups[0]["betas"]
        schedule.step()
    assert theirs["betas"] != (0.9, 0.999)


@pytest.mark.parametrize(
    ("partition", "rule", "callback", "why"),
    [
        (Partition(1, 0), lambda n: int("attn" in n), {}, "the data party holds none like it"),
        (Partition(1, 1), lambda n: int(".0." in n), {}, "weights like it in other blocks"),
        (Partition(1, 1), is_plain, {"group_of": lambda n: 0}, "has this weight in group 1"),
        (
            Partition(1, 1),
            is_plain,
            {"group_of": lambda n: 7},
            "groups of the optimizer are 0 to 1",
        ),
    ],
)
def test_groups_that_cannot_be_told_are_refused_before_the_first_step(
    partition, rule, callback, why, tmp_path
):
    _, data_party, model_party = halves_of("llama", partition)
    before = [weight.clone() for weight in model_party.parameters()]
    optimizer = adamw(data_party.model, rule, *BETAS)
    trainer = trainer_of(
        data_party.model,
        tmp_path,
        SplitCallback(data_party, **callback),
        optimizers=(optimizer, None),
    )
    with pytest.raises(ProtocolError, match=why):
        trainer.train()
    assert all(map(torch.equal, before, model_party.parameters()))


def test_an_optimizer_with_a_past_that_the_model_party_lacks_is_refused(tmp_path):
    _, data_party, _ = halves_of("llama", Partition(1, 1))
    trainer = trainer_of(data_party.model, tmp_path)
    trainer.train()  # without the model party
    trainer.add_callback(SplitCallback(data_party))
    with pytest.raises(ProtocolError, match="has been used before, and the model party's has not"):
        trainer.train()


def test_an_optimizer_that_both_used_goes_on(tmp_path):
    whole, data_party, model_party = halves_of("llama", Partition(1, 1))
    witness = trainer_of(whole, tmp_path)
    trainer = trainer_of(data_party.model, tmp_path, SplitCallback(data_party))
    for _ in range(2):
        assert logged(trainer) == logged(witness)
    assert_equal_weights(whole, data_party, model_party)


class WithHead(nn.Module):
    """A model with a head of the user's own beside it, which is scored on the last hidden state."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        torch.manual_seed(0)
        self.head = nn.Linear(64, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.model(input_ids, attention_mask=attention_mask).logits)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten() % 3)
        return {"loss": loss, "logits": logits}


def heads_over(partition):
    whole, data_party, model_party = halves_of("llama", partition)
    return WithHead(whole), WithHead(data_party.model), data_party, model_party


@pytest.mark.parametrize("partition", CUTS, ids=lambda partition: partition.kind)
def test_a_head_beside_the_model_counts_in_the_norm(partition, tmp_path):
    whole, split, data_party, model_party = heads_over(partition)
    rows = rows_for(data_party.model)
    expected = logged(trainer_of(whole, tmp_path, rows=rows, max_grad_norm=0.1))
    callback = SplitCallback(data_party)
    found = logged(trainer_of(split, tmp_path, callback, rows=rows, max_grad_norm=0.1))
    assert found == expected
    assert_equal_weights(whole.model, data_party, model_party)
    assert torch.equal(whole.head.weight, split.head.weight)


def test_a_gradient_of_such_a_head_that_is_not_finite_skips_the_step_of_both(tmp_path):
    _, split, data_party, model_party = heads_over(Partition(1, 1))
    split.head.weight.register_hook(lambda gradient: gradient * torch.nan)
    before = [w.clone() for w in (*split.parameters(), *model_party.parameters())]
    logged(trainer_of(split, tmp_path, SplitCallback(data_party), rows=rows_for(data_party.model)))
    after = (*split.parameters(), *model_party.parameters())
    assert all(map(torch.equal, before, after))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_prompt_tuning_logs_the_norm_of_its_prompt(tmp_path):
    whole, data_party, model_party = halves_of("llama", Partition(1, 1))
    for weight in model_party.parameters():
        weight.requires_grad_(False)
    models = []
    for model in (whole, data_party.model):
        torch.manual_seed(0)
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        models.append(peft.get_peft_model(model, config))
    expected = logged(trainer_of(models[0], tmp_path, max_grad_norm=0.3))
    found = logged(trainer_of(models[1], tmp_path, SplitCallback(data_party), max_grad_norm=0.3))
    assert found == expected
    assert all(norm > 0 for _, norm, _ in found)


def test_an_optimizer_of_a_part_of_what_is_trained_is_refused(tmp_path):
    _, data_party, _ = halves_of("llama", Partition(1, 1))
    part = [weight for name, weight in data_party.named_parameters() if "mlp" in name]
    optimizers = (torch.optim.AdamW(part, lr=1e-2), None)
    callback = SplitCallback(data_party)
    trainer = trainer_of(data_party.model, tmp_path, callback, optimizers=optimizers)
    with pytest.raises(ProtocolError, match="weights that can be trained"):
        trainer.train()
