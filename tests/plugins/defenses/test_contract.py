"""What every defense owes: it holds on every message of every call, and switched off it is not there."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from attrs import define, field

from vflair_core import Defense, DefenseError, Transcript
from vflair_core.offers import load_target
from vflair_defenses import OFFERED, vflair_defenses

# of each defense: options that defend, and options that switch it off (None: there are none)
CASES = {
    "gaussian-noise": (
        {"gradient_multiplier": 0.1, "gradient_clip": 1.0},
        {"noise_multiplier": 0.0, "clip": math.inf},
    ),
    "laplace-noise": (
        {"gradient_epsilon": 9.0, "gradient_clip": 1.0},
        {"epsilon": math.inf, "clip": math.inf},
    ),
    "sparsification": ({"gradients": True}, {"rate": 0.0, "gradients": True}),
    "top-k": ({"k": 4}, {"k": 0}),
    "quantisation": ({"gradients": True}, {"bits": 0, "gradients": True}),
    "permutation": ({}, None),
    "norm-matching": ({}, {"strength": 0.0}),
    "marvell": ({}, {"power": 0.0}),
    "label-randomised-response": ({"epsilon": 0.0}, {"epsilon": math.inf}),
    "zero-row-padding": ({}, {"scale": 0.0}),
    "decoy-rows": ({}, {"count": 0}),
    "mid": ({"decoder": "linear", "code": 4}, {"noise": 0.0}),
    "adversarial-training": ({}, {"weight": 0.0, "distortion": 0.0}),
    "nopeek": ({}, {"weight": 0.0}),
    "text-obfuscator": ({"clusters": 5}, {"epsilon": math.inf, "close": 0.0, "away": 0.0}),
    "dual-guard": ({"steps": 2, "retention": 0.1}, {"weight": 0.0}),
    "dual-bottleneck": ({"steps": 2}, {"noise": 0.0, "dissimilarity": 0.0}),
    "dx-noise": ({}, {"eta": math.inf}),
    "split-and-denoise": ({"steps": 3}, {"eta": math.inf, "clip": math.inf}),
    "dp-forward": ({}, {"epsilon": math.inf, "clip": math.inf}),
}
TEXT = {"santext", "santext-plus", "custext", "custext-plus", "rantext"}  # test_text_defenses.py
IN_WEIGHTS = {"dual-guard"}  # they change the head itself, before: test_dual_guard.py
BY_EXAMPLE = {"gaussian-noise", "laplace-noise", "norm-matching"}  # they take gradients apart
ROLES = ("smashed", "hidden_grad")
PLACES = ("on_embeddings", "on_smashed", "on_returned", "on_gradient")
CALLS = {
    "train": (("gpt2", 1, 1), ("llama", 2, 0), ("bert", 1, 1), ("bert", 1, 0), ("t5", 1, 1)),
    "generate": (("gpt2", 1, 1), ("llama", 2, 0), ("t5", 1, 1)),
    "beams": (("gpt2", 1, 1), ("t5", 1, 1)),
}
CELLS = [(call, *cut) for call, cuts in CALLS.items() for cut in cuts]


def made(name, options):
    return load_target(vflair_defenses()[name])(**options)


@define(eq=False)
class Watching(Defense):
    """Changes nothing and keeps what passes each place."""

    seen: dict = field(factory=dict)

    def keep(self, place, tensor, exchange):
        self.seen.setdefault((place, exchange.number, exchange.name), []).append(
            tensor.detach().clone()
        )
        return tensor

    def on_embeddings(self, embeddings, exchange):
        return self.keep("on_embeddings", embeddings, exchange)

    def on_smashed(self, smashed, exchange):
        return self.keep("on_smashed", smashed, exchange)

    def on_gradient(self, gradient, exchange):
        return self.keep("on_gradient", gradient, exchange)


def wake(defense):
    """A mapping that starts as the identity defends only once it is trained: move it."""
    prepare = defense.prepare

    def and_move(texts, party):
        prepare(texts, party)
        with torch.no_grad():
            defense.parameters()[-1].fill_(0.01)

    defense.prepare = and_move


def act(party, call, kind):
    """One call of the model; returns what it gave: loss and logits, or ids."""
    torch.manual_seed(7)
    ids = torch.randint(5, 290, (4, 6))
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    if call == "train":
        party.model.train()
        prompt = ids.masked_fill(mask == 0, -100)
        prompt[:, :2] = -100
        labels = torch.tensor([0, 1, 1, 0]) if kind == "bert" else prompt
        options = {} if kind == "bert" else {"use_cache": False}
        out = party.model(input_ids=ids, attention_mask=mask, labels=labels, **options)
        out.loss.backward()
        return [out.loss.detach(), out.logits.detach()]
    party.model.eval()
    beams = 3 if call == "beams" else 1
    written = party.model.generate(
        ids, max_new_tokens=4, min_new_tokens=4, num_beams=beams, do_sample=False, pad_token_id=0
    )
    return [written]


def refused(defense, defended, call, kind, head, tail):
    """Whether the cell is unsupported; then it must say so by name, when it is prepared or when it is met."""
    task = {"bert": "classification", "t5": "seq2seq"}.get(kind, "causal-lm")
    cell = ("HBT" if tail else "HT", task, "train" if call == "train" else "prefill")
    for supported in defense.supports:
        if all("*" in (a, b) or a == b for a, b in zip(cell, supported, strict=True)):
            return False
    words = rf"{type(defense).__name__} (does not support|adds rows)"
    with pytest.raises(DefenseError, match=words):
        act(defended([defense], kind, head, tail).data_party, call, kind)
    return True


def test_every_defense_that_is_offered_is_tested_here():
    assert set(CASES) | TEXT == set(OFFERED)


@pytest.mark.parametrize(("call", "kind", "head", "tail"), CELLS, ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if name not in IN_WEIGHTS])
def test_what_a_defense_covers_never_crosses_as_it_was(name, call, kind, head, tail, defended):
    defense = made(name, CASES[name][0])
    if name == "adversarial-training":
        wake(defense)
    if refused(defense, defended, call, kind, head, tail):
        return
    inner, outer = Watching(), Watching()
    party = defended([inner, defense, outer], kind, head, tail).data_party
    inner.seen.clear()
    outer.seen.clear()
    if call == "train" and kind == "t5" and name in BY_EXAMPLE:
        # The gradient of the position bias, which the body hands on, is a sum over the batch.
        with pytest.raises(DefenseError, match="cannot be parted into examples"):
            act(party, call, kind)
        return
    with party.channel.tap(Transcript()) as transcript:
        act(party, call, kind)
    sent = {
        role: [r.tensor for r in transcript.messages if r.role == role and r.direction == "sent"]
        for role in ("smashed", "hidden_grad")
    }
    places = [p for p in PLACES if getattr(type(defense), p) is not getattr(Defense, p)]
    if {"prompt", "response"} & defense.covers:
        place = "on_embeddings" if "on_embeddings" in places else "on_smashed"
        before, after = _at(place, inner), _at(place, outer)
        assert len(before) >= {"train": 1, "generate": 4, "beams": 4}[call]
        assert len(before) == len(after)
        for plain, changed in zip(before, after, strict=True):
            assert not torch.equal(plain, changed)
        twins = _at("on_smashed", outer)
        assert len(sent["smashed"]) == len(twins)
        assert all(torch.equal(a, b) for a, b in zip(sent["smashed"], twins, strict=True))
    if call == "train" and "on_gradient" in places and "gradients" in defense.covers:
        before = _at("on_gradient", inner)
        assert before
        changed = [not torch.equal(a, b) for a, b in zip(before, sent["hidden_grad"], strict=True)]
        assert (
            all(changed) or name == "zero-row-padding"
        )  # pooled and encoder gradients have no zero rows


def _at(place, watching):
    return [t for (where, _, _), some in watching.seen.items() if where == place for t in some]


@pytest.mark.parametrize(("call", "kind", "head", "tail"), CELLS, ids=str)
@pytest.mark.parametrize("name", [name for name, (_, off) in CASES.items() if off is not None])
def test_a_defense_switched_off_changes_no_bit(name, call, kind, head, tail, defended):
    defense = made(name, CASES[name][1])
    if refused(defense, defended, call, kind, head, tail):
        return
    bare = defended([], kind, head, tail)
    covered = defended([defense], kind, head, tail)
    with bare.data_party.channel.tap(Transcript()) as plain:
        expected = act(bare.data_party, call, kind)
    with covered.data_party.channel.tap(Transcript()) as theirs:
        ours = act(covered.data_party, call, kind)
    assert all(torch.equal(a, b) for a, b in zip(expected, ours, strict=True))
    for a, b in zip(plain.messages, theirs.messages, strict=True):
        assert (a.role, a.name) == (b.role, b.name)
        assert torch.equal(a.tensor, b.tensor), (a.role, a.name)
    if call == "train":
        for side in ("data_party", "model_party"):
            weights = dict(getattr(bare, side).named_parameters())
            for weight_name, weight in getattr(covered, side).named_parameters():
                assert torch.equal(weight.grad, weights[weight_name].grad), weight_name


@pytest.mark.parametrize("name", CASES)
def test_state_makes_an_equal_defense_of_one_that_was_only_built(name, defended):
    kind = "bert" if name in ("marvell", "label-randomised-response") else "gpt2"
    trained, fresh = made(name, CASES[name][0]), made(name, CASES[name][0])
    defended([trained], kind)
    fresh.load_state(copy.deepcopy(trained.state()))
    first, second = trained.state(), fresh.state()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    hidden = torch.randn(5, 16)
    ours, theirs = trained.mechanism(), fresh.mechanism()
    assert type(ours) is type(theirs)
    if ours is not None:
        assert torch.equal(ours.expected(hidden), theirs.expected(hidden))
        assert torch.equal(
            ours.log_likelihood(hidden, hidden[0]), theirs.log_likelihood(hidden, hidden[0])
        )
        assert ours.log_likelihood(hidden, hidden).shape == (5,)
    assert str(trained.guarantee(3)) == str(fresh.guarantee(3))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mid", {"place": "tail"}),
        ("label-randomised-response", {"epsilon": 0.0}),
        ("marvell", {}),
        ("norm-matching", {}),
    ],
)
@pytest.mark.parametrize("tail", [1, 0])
def test_what_covers_labels_changes_every_gradient_that_is_sent(name, options, tail, defended):
    """Labels are in nothing else that crosses: hidden states do not depend on them."""
    defense = made(name, options)
    if refused(defense, defended, "train", "bert", 1, tail):
        return
    assert "labels" in defense.covers
    sent = []
    for defenses in ([], [defense]):
        party = defended(defenses, "bert", 1, tail).data_party
        with party.channel.tap(Transcript()) as transcript:
            act(party, "train", "bert")
        there = [r for r in transcript.messages if r.direction == "sent"]
        sent.append({role: [r.tensor for r in there if r.role == role] for role in ROLES})
    bare, covered = sent
    assert bare["hidden_grad"]
    for plain, changed in zip(bare["hidden_grad"], covered["hidden_grad"], strict=True):
        assert not torch.equal(plain, changed)
    for plain, same in zip(bare["smashed"], covered["smashed"], strict=True):
        assert torch.equal(plain, same)
