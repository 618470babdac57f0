"""Several data parties with one model party: own data, own halves, own gradients, and one body they share."""

from __future__ import annotations

import copy

import pytest
import torch

from vflair_core import Partition, hookimpl, join, plugin_manager, split
from vflair_core.errors import ProtocolError
from vflair_core.testing import tiny_batch, tiny_model
from vflair_core.training.fine_tuning import FineTuning, Train
from vflair_core.training.tuning import Lora, tune

RATE = 0.1
SGD = Train(steps=4, optimizer="sgd", learning_rate=RATE, clip=0.0)


class Crowd:
    """Two data parties, whose own weights differ, and beside each the whole model it is half of."""

    def __init__(self, kind="llama", partition=None, count=2):
        partition = partition or Partition(1, 1)
        self.wholes = [tiny_model(kind, seed=n) for n in range(count)]
        first, *others = map(copy.deepcopy, self.wholes)
        party, model_party = split(first, partition, wire=True)
        joining = [join(other, model_party, partition, wire=True) for other in others]
        self.parties, self.model_party = [party, *joining], model_party
        self.held = dict(model_party.named_parameters())
        for whole in self.wholes:
            self.give_body(whole)
        self.batches = [
            tiny_batch(whole, labels="tokens", seed=10 + n, rows=2 + n)
            for n, whole in enumerate(self.wholes)
        ]

    def give_body(self, whole):
        names = dict(whole.named_parameters())
        with torch.no_grad():
            for name, weight in self.held.items():
                names[name].copy_(weight)

    def by_hand(self, n):
        """Gradients of the n-th whole model on the n-th batch: all of one process."""
        whole = self.wholes[n]
        whole.zero_grad()
        whole.train()(**self.batches[n], use_cache=False).loss.backward()
        return {name: weight.grad.clone() for name, weight in whole.named_parameters()}

    def backward(self, n):
        self.parties[n].model.train()
        self.parties[n].model(**self.batches[n], use_cache=False).loss.backward()

    def body(self):
        return {name: weight.detach().clone() for name, weight in self.held.items()}


@pytest.fixture(params=[Partition(1, 1), Partition(2, 0)], ids=lambda p: p.kind)
def crowd(request):
    return Crowd(partition=request.param)


def test_each_party_computes_with_its_own_halves_and_the_shared_body(crowd):
    for party, whole, batch in zip(crowd.parties, crowd.wholes, crowd.batches, strict=True):
        assert torch.equal(party.model(**batch).logits, whole(**batch).logits)
    own, other = (dict(party.named_parameters()) for party in crowd.parties)
    assert not any(torch.equal(own[name], other[name]) for name in own if own[name].dim() > 1)


def test_each_party_receives_the_gradient_of_its_own_loss(crowd):
    for n in (0, 1, 0):  # the last one again: the other went in between
        crowd.parties[n].model.zero_grad()
        crowd.backward(n)
    for n, party in enumerate(crowd.parties):
        expected = crowd.by_hand(n)
        for name, weight in party.named_parameters():
            assert torch.equal(weight.grad, expected[name]), name


def test_gradients_of_the_shared_weights_do_not_mix(crowd):
    crowd.backward(0)
    crowd.backward(1)
    for n, times in ((1, 1), (0, 2)):  # a second backward of the first adds to the first alone
        if n == 0:
            crowd.backward(0)
        expected = crowd.by_hand(n)
        for name, weight in crowd.held.items():
            assert torch.equal(weight.grad, times * expected[name]), name


def test_each_party_is_told_the_norms_of_its_own_gradients(crowd):
    from vflair_core.training.two_phase_commit import joint_norms

    for n in (0, 1):
        crowd.backward(n)
    for n in (0, 1):
        expected = [gradient.norm() for gradient in crowd.by_hand(n).values()]
        assert torch.equal(
            torch.stack(joint_norms(crowd.parties[n], list(crowd.parties[n].parameters()))),
            torch.stack(expected),
        )


def test_in_turns_each_commit_is_a_step_with_its_own_gradients(crowd):
    tunings = [FineTuning(party, SGD) for party in crowd.parties]
    for n in (0, 1, 1, 0):
        crowd.give_body(crowd.wholes[n])
        before, gradients = crowd.body(), crowd.by_hand(n)
        tunings[n].step(crowd.batches[n])
        for name, weight in crowd.held.items():
            assert torch.allclose(weight, before[name] - RATE * gradients[name], atol=1e-7), name
        with torch.no_grad():
            for name, weight in crowd.wholes[n].named_parameters():
                weight.sub_(RATE * gradients[name])
    assert [party.step for party in crowd.parties] == [2, 2]


def test_a_round_takes_one_step_with_the_mean_of_all_gradients(crowd):
    crowd.model_party.sharing = "mean"
    tunings = [FineTuning(party, SGD) for party in crowd.parties]
    before, gradients = crowd.body(), [crowd.by_hand(n) for n in (0, 1)]
    tunings[0].step(crowd.batches[0])
    assert all(torch.equal(weight, before[name]) for name, weight in crowd.held.items())
    tunings[1].step(crowd.batches[1])
    for name, weight in crowd.held.items():
        mean = (gradients[0][name] + gradients[1][name]) / 2
        assert torch.allclose(weight, before[name] - RATE * mean, atol=1e-7), name
    for n, party in enumerate(crowd.parties):  # the weights of one's own take one's own gradient
        whole = dict(crowd.wholes[n].named_parameters())
        for name, weight in party.named_parameters():
            expected = whole[name] - RATE * gradients[n][name]
            assert torch.allclose(weight, expected, atol=1e-7), name


def test_a_clipped_round_takes_the_mean_of_the_clipped_gradients():
    crowd, clip = Crowd(), 0.2
    crowd.model_party.sharing = "mean"
    train = Train(steps=4, optimizer="sgd", learning_rate=RATE, clip=clip)
    tunings = [FineTuning(party, train) for party in crowd.parties]
    before, gradients = crowd.body(), [crowd.by_hand(n) for n in (0, 1)]
    for tuning, batch in zip(tunings, crowd.batches, strict=True):
        tuning.step(batch)
    norms = [torch.stack([g.norm() for g in own.values()]).norm() for own in gradients]
    factors = [clip / norm for norm in norms]
    assert all(factor < 1 for factor in factors)
    for name, weight in crowd.held.items():
        mean = sum(f * own[name] for f, own in zip(factors, gradients, strict=True)) / 2
        assert torch.allclose(weight, before[name] - RATE * mean, atol=1e-7), name


def test_who_has_committed_waits_for_the_round_to_end():
    crowd = Crowd(count=3)
    crowd.model_party.sharing = "mean"
    tunings = [FineTuning(party, SGD) for party in crowd.parties]
    tunings[0].step(crowd.batches[0])
    for _ in range(2):  # a refused message leaves the session as it was
        with pytest.raises(ProtocolError, match="waits for 2 other data parties"):
            tunings[0].step(crowd.batches[0])
    with pytest.raises(ProtocolError, match="A round is under way"):
        crowd.model_party.sharing = "turns"
    for n in (1, 2):
        tunings[n].step(crowd.batches[n])
    tunings[0].step(crowd.batches[0])
    assert crowd.parties[0].step == 2


def test_a_round_goes_on_without_a_party_that_closes():
    crowd = Crowd()
    crowd.model_party.sharing = "mean"
    tunings = [FineTuning(party, SGD) for party in crowd.parties]
    before, gradients = crowd.body(), crowd.by_hand(0)
    tunings[0].step(crowd.batches[0])
    crowd.parties[1].close()
    for name, weight in crowd.held.items():
        assert torch.allclose(weight, before[name] - RATE * gradients[name], atol=1e-7), name
    with pytest.raises(ProtocolError, match="no session"):
        crowd.parties[1].model(**crowd.batches[1])


def test_who_skips_is_left_out_of_the_mean():
    crowd = Crowd()
    crowd.model_party.sharing = "mean"
    tunings = [FineTuning(party, SGD) for party in crowd.parties]
    before, gradients = crowd.body(), crowd.by_hand(0)
    tunings[0].step(crowd.batches[0])
    with torch.no_grad():
        next(crowd.parties[1].parameters()).fill_(float("nan"))
    tunings[1].step(crowd.batches[1])
    for name, weight in crowd.held.items():
        assert torch.allclose(weight, before[name] - RATE * gradients[name], atol=1e-7), name


def test_a_round_has_one_learning_rate():
    crowd = Crowd()
    crowd.model_party.sharing = "mean"
    tunings = [FineTuning(party, SGD) for party in crowd.parties]
    tunings[0].step(crowd.batches[0], rate=0.1)
    with pytest.raises(ProtocolError, match=r"has learning rate 0\.1, not learning rate 0\.2"):
        tunings[1].step(crowd.batches[1], rate=0.2)


@pytest.mark.parametrize("sharing", ["turns", "mean"])
def test_no_step_while_another_party_holds_a_live_graph(sharing):
    crowd = Crowd()
    crowd.model_party.sharing = sharing
    tunings = [FineTuning(party, SGD) for party in crowd.parties]
    kept = crowd.parties[1].model(**crowd.batches[1], use_cache=False).loss
    before = crowd.body()
    if sharing == "mean":
        tunings[0].step(crowd.batches[0])
        step = tunings[1].step  # the last of the round would take the step
    else:
        step = tunings[0].step
    with pytest.raises(ProtocolError, match="still waits for its backward"):
        step(crowd.batches[0])
    assert all(torch.equal(weight, before[name]) for name, weight in crowd.held.items())
    del kept


@pytest.mark.filterwarnings("ignore:The model party's weights are not those:UserWarning")
def test_one_optimizer_serves_all_and_another_one_is_refused():
    crowd = Crowd()
    adam = Train(steps=4, optimizer="adam")
    first = FineTuning(crowd.parties[0], adam)
    first.step(crowd.batches[0])
    optimizer = crowd.model_party.shared.optimizer
    with pytest.raises(ProtocolError, match=r"one optimizer serves all.*'name': 'sgd'"):
        FineTuning(crowd.parties[1], SGD)
    FineTuning(crowd.parties[1], adam).step(crowd.batches[1])
    assert crowd.model_party.shared.optimizer is optimizer
    steps = {float(state["step"]) for state in optimizer.state.values()}
    assert steps == {2.0}
    crowd.parties[0].close()
    crowd.parties[1].close()
    for party in crowd.parties:
        party.connection.open(())
    FineTuning(crowd.parties[1], SGD)


def test_each_party_may_have_adapters_of_its_own(crowd):
    for owner, seed in ((crowd.parties[0], 1), (crowd.parties[1], 2), (crowd.model_party, 3)):
        tune(owner, adapters=Lora(r=2), seed=seed)
    train = Train(steps=3, learning_rate=0.02)
    tunings = [FineTuning(party, train) for party in crowd.parties]
    losses = [[t.step(b) for t, b in zip(tunings, crowd.batches, strict=True)] for _ in range(6)]
    assert all(last < first for first, last in zip(losses[0], losses[-1], strict=True))


def test_a_model_cut_elsewhere_cannot_join():
    _, model_party = split(tiny_model("llama"), Partition(1, 1))
    with pytest.raises(ProtocolError, match="do not hold two halves of the same model"):
        join(tiny_model("llama"), model_party, Partition(2, 1))


def test_a_rule_that_does_not_exist_is_refused():
    _, model_party = split(tiny_model("llama"), Partition(1, 1))
    with pytest.raises(ProtocolError, match=r"no rule 'means'.* Did you mean 'mean'"):
        model_party.sharing = "means"


def test_observers_hear_of_each_party_that_joins():
    heard = []

    class Ear:
        @hookimpl
        def vflair_model_partitioned(self, partition, data_party_weights, model_party_weights):
            heard.append((partition, data_party_weights > model_party_weights > 0))

    plugins = plugin_manager(entry_point_group="vflair.none")
    plugins.register(Ear())
    _, model_party = split(tiny_model("llama"), Partition(1, 1), plugins=plugins)
    join(tiny_model("llama"), model_party, Partition(1, 1), plugins=plugins)
    assert heard == [(Partition(1, 1), True)] * 2


def test_who_keeps_a_forward_cannot_commit_to_a_round_that_then_could_not_end(crowd):
    crowd.model_party.sharing = "mean"
    for party in crowd.parties:
        party.open(SGD.optimizer_spec())
    crowd.backward(1)
    kept = crowd.parties[1].model(**crowd.batches[1], use_cache=False).loss
    with pytest.raises(ProtocolError, match="still waits for its backward"):
        crowd.parties[1].connection.commit(scale=None, rate=RATE, skip=False)
    crowd.parties[0].close()
    kept.backward()
    crowd.parties[1].connection.commit(scale=None, rate=RATE, skip=False)
