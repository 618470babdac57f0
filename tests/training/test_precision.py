"""Loss scaling, autocast, accumulation, schedulers: the steps of the textbook loop, and unscaled defenses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vflair_core import Defense, Partition, split
from vflair_core.communication.optimizers import make_optimizer
from vflair_core.testing import tiny_batch, tiny_model
from vflair_core.training.fine_tuning import FineTuning, Train, train_unsplit

CUTS = [Partition(1, 1), Partition(1, 0)]
TRAIN = Train(steps=5, learning_rate=0.01, clip=0.3)


@pytest.fixture(params=CUTS, ids=lambda partition: partition.kind)
def halves(request):
    whole = tiny_model("llama")
    party, model_party = split(copy.deepcopy(whole), request.param, wire=True)
    return whole, party, model_party


def batches_for(whole, count=5):
    return [tiny_batch(whole, padding="right", labels="tokens", seed=n) for n in range(count)]


def scaled_unsplit(whole, batches, scaler, train, *, spoil=None):
    """The loop of torch's documentation: scale, unscale, clip, step, update."""
    weights = list(whole.parameters())
    optimizer = make_optimizer(weights, train.optimizer_spec())
    whole.train()
    losses = []
    for step, batch in enumerate(batches):
        loss = whole(**batch, use_cache=False).loss
        scaler.scale(loss).backward()
        if step == spoil:
            dict(whole.named_parameters())["model.layers.2.mlp.up_proj.weight"].grad[0] = torch.inf
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(weights, train.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)


def test_scaled_losses_equal_those_of_the_textbook_loop(halves):
    whole, party, _ = halves
    ours, theirs = scaler(), scaler()
    expected = scaled_unsplit(whole, batches_for(whole), theirs, TRAIN)
    fine_tuning = FineTuning(party, TRAIN, scaler=ours)
    assert [fine_tuning.step(batch) for batch in batches_for(whole)] == expected
    assert ours.get_scale() == theirs.get_scale() == 2.0**14  # grew twice in five steps
    assert party.loss_scale == 1.0


def test_an_overflow_at_the_model_party_alone_skips_both_and_shrinks_the_scale(halves):
    whole, party, model_party = halves
    ours, theirs = scaler(), scaler()
    expected = scaled_unsplit(whole, batches_for(whole), theirs, TRAIN, spoil=1)
    weight = dict(model_party.named_parameters())["model.layers.2.mlp.up_proj.weight"]
    fine_tuning, losses, count = FineTuning(party, TRAIN, scaler=ours), [], [0]

    def spoil(p):
        count[0] += 1
        if count[0] == 2:
            p.grad[0] = torch.inf

    weight.register_post_accumulate_grad_hook(spoil)
    for number, batch in enumerate(batches_for(whole)):
        before = [p.clone() for p in (*party.parameters(), *model_party.parameters())]
        losses.append(fine_tuning.step(batch))
        after = [*party.parameters(), *model_party.parameters()]
        stayed = all(map(torch.equal, before, after))
        assert stayed is (number == 1)
    assert losses == expected
    assert ours.get_scale() == theirs.get_scale()


class Watching(Defense):
    """Notes the gradients that come to it."""

    covers = frozenset({"gradients"})

    def __init__(self):
        self.seen = []

    def on_gradient(self, gradient, exchange):
        self.seen.append(gradient.clone())
        return gradient

    def on_smashed_grad(self, gradient, exchange):
        self.seen.append(gradient.clone())
        return gradient


class Sign(Defense):
    """Sends signs only, of whatever comes: an overflow is no longer to be seen in them."""

    covers = frozenset({"gradients"})

    def on_gradient(self, gradient, exchange):
        return gradient.nan_to_num(0.0).sign()


def test_defenses_get_gradients_without_the_scale():
    whole = tiny_model("llama")
    seen = []
    for own in (None, scaler()):
        defense = Watching()
        party, _ = split(copy.deepcopy(whole), Partition(1, 1), defenses=[defense])
        fine_tuning = FineTuning(party, TRAIN, scaler=own)
        for batch in batches_for(whole, 2):
            fine_tuning.step(batch)
        seen.append(defense.seen)
    assert len(seen[0]) == 4
    assert all(map(torch.equal, *seen))  # the scale is a power of two


def test_an_overflow_that_a_defense_hides_skips_the_step_all_the_same():
    whole = tiny_model("llama")
    party, model_party = split(whole, Partition(1, 1), defenses=[Sign()])
    party.model.requires_grad_(False)  # nothing of ours tells of the overflow
    huge = torch.amp.GradScaler("cpu", init_scale=3e38)
    fine_tuning = FineTuning(party, Train(steps=2, clip=0.0), scaler=huge)
    batch = tiny_batch(whole, labels="tokens")
    with torch.no_grad():
        party.model.lm_head.weight.mul_(1e3)
    before = [p.clone() for p in model_party.parameters()]
    fine_tuning.step(batch)
    assert all(map(torch.equal, before, model_party.parameters()))
    assert huge.get_scale() < 2e38


def test_autocast_losses_equal_those_of_the_whole_model(halves):
    whole, party, _ = halves
    with torch.autocast("cpu", torch.bfloat16):
        expected = train_unsplit(whole, batches_for(whole), TRAIN)
        fine_tuning = FineTuning(party, TRAIN)
        losses = [fine_tuning.step(batch) for batch in batches_for(whole)]
    assert losses == expected
    plain = tiny_model("llama")
    assert losses != train_unsplit(plain, batches_for(whole), TRAIN)


def test_accumulated_gradients_equal_those_of_the_textbook_loop(halves):
    whole, party, _ = halves
    batches = batches_for(whole, 6)
    optimizer = make_optimizer(list(whole.parameters()), TRAIN.optimizer_spec())
    whole.train()
    expected = []
    for first in (0, 3):
        losses = []
        for batch in batches[first : first + 3]:
            loss = whole(**batch, use_cache=False).loss / 3
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(whole.parameters(), TRAIN.clip)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(torch.stack(losses).sum()))
    fine_tuning = FineTuning(party, TRAIN)
    assert [fine_tuning.step(*batches[first : first + 3]) for first in (0, 3)] == expected


def test_a_torch_scheduler_sets_the_rate_of_both_parties(halves):
    whole, party, model_party = halves
    optimizers = [make_optimizer(list(whole.parameters()), TRAIN.optimizer_spec())]
    fine_tuning = FineTuning(party, TRAIN)
    optimizers.append(fine_tuning.optimizer)
    theirs, ours = (
        torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2) for o in optimizers
    )
    whole.train()
    for batch in batches_for(whole):
        loss = whole(**batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(whole.parameters(), TRAIN.clip)
        optimizers[0].step()
        optimizers[0].zero_grad()
        theirs.step()
        assert fine_tuning.step(batch, rate=ours.get_last_lr()[0]) == float(loss.detach())
        rate = model_party.shared.optimizer.param_groups[0]["lr"]
        assert rate == ours.get_last_lr()[0]
        ours.step()
