"""Where a defense stands: every place is called when the docs say so, and nothing slips past it."""

from __future__ import annotations

import pytest
import torch
from attrs import define, field
from torch import nn

from vflair_core.communication.transcript import Transcript
from vflair_core.defenses.defense import Defense
from vflair_core.testing import tiny_batch

PROMPT = ("input_ids", "attention_mask")
GENERATION = {"max_new_tokens": 4, "min_new_tokens": 4}


@define(eq=False)
class Recording(Defense):
    """Changes nothing and writes down each call: (place, exchange, tensor)."""

    calls: list = field(factory=list)

    def note(self, place, tensor, exchange):
        exchange.memo[place] = exchange.memo.get(place, 0) + 1
        self.calls.append((place, exchange, dict(exchange.memo), tensor.detach().clone()))
        return tensor

    def on_embeddings(self, embeddings, exchange):
        return self.note("on_embeddings", embeddings, exchange)

    def on_smashed(self, smashed, exchange):
        return self.note("on_smashed", smashed, exchange)

    def on_returned(self, returned, exchange):
        return self.note("on_returned", returned, exchange)

    def on_gradient(self, gradient, exchange):
        return self.note("on_gradient", gradient, exchange)

    def on_smashed_grad(self, gradient, exchange):
        return self.note("on_smashed_grad", gradient, exchange)

    def seen(self, *places):
        return [(place, exchange.phase) for place, exchange, _, _ in self.calls if place in places]


class AddOne(Defense):
    def on_smashed(self, smashed, exchange):
        return smashed + 1.0


class Identity(Defense):
    def on_embeddings(self, embeddings, exchange):
        return embeddings

    def on_smashed(self, smashed, exchange):
        return smashed * 1

    def on_returned(self, returned, exchange):
        return returned * 1

    def on_gradient(self, gradient, exchange):
        return gradient * 1

    def on_smashed_grad(self, gradient, exchange):
        return gradient * 1

    def expand(self, batch, exchange):
        return dict(batch)

    def contract(self, outputs, exchange):
        return outputs

    def penalty(self, exchange):
        return torch.zeros(())


def train_and_write(party, **generation):
    """One training step, then a text, greedy or as asked: every phase there is but plain evaluation."""
    batch = tiny_batch(party.model, padding="left", labels="tokens")
    party.model.train()
    out = party.model(**batch)
    out.loss.backward()
    party.model.eval()
    prompt = {key: batch[key] for key in PROMPT}
    written = party.model.generate(**prompt, **GENERATION, **({"do_sample": False} | generation))
    return out, written


@pytest.mark.parametrize("tail", [1, 0])
def test_each_place_is_called_once_an_exchange_in_the_order_of_the_round(cut, tail):
    defense = Recording()
    parties = cut("gpt2", 1, tail, defenses=[defense], seed=0)
    train_and_write(parties.data_party)
    forward = ("on_embeddings", "on_smashed", "on_returned")
    phases = ["train", "prefill", "decode", "decode", "decode"]
    assert defense.seen(*forward) == [(place, phase) for phase in phases for place in forward]
    assert defense.seen("on_gradient", "on_smashed_grad") == [
        ("on_gradient", "train"),
        ("on_smashed_grad", "train"),
    ]
    assert [place for place, *_ in defense.calls[:5]] == [
        *forward,
        "on_gradient",
        "on_smashed_grad",
    ]


def test_evaluation_without_a_cache_is_the_phase_eval(cut):
    defense = Recording()
    parties = cut("llama", defenses=[defense])
    with torch.no_grad():
        parties.data_party.model(**tiny_batch(parties.whole), use_cache=False)
    assert {exchange.phase for _, exchange, _, _ in defense.calls} == {"eval"}


def test_all_places_of_one_call_agree_on_its_phase(cut):
    # The cache is made inside the model here: at the embeddings there is none yet.
    defense = Recording()
    parties = cut("llama", defenses=[defense])
    with torch.no_grad():
        parties.data_party.model(**tiny_batch(parties.whole), use_cache=True)
    assert len({exchange.phase for _, exchange, _, _ in defense.calls}) == 1


def test_an_exchange_says_what_a_defense_needs_to_know(cut):
    defense = Recording()
    parties = cut("gpt2", defenses=[defense], seed=0)
    parties.data_party.connection.step = 0
    batch = tiny_batch(parties.whole, padding="left", labels="tokens")
    parties.data_party.model.train()
    parties.data_party.model(**batch).loss.backward()
    roles = {
        "on_embeddings": ("embeddings", "smashed"),
        "on_smashed": ("hidden_states", "smashed"),
        "on_returned": ("returned", "returned"),
        "on_gradient": ("hidden_grad", "hidden_grad"),
        "on_smashed_grad": ("smashed_grad", "smashed_grad"),
    }
    assert [place for place, *_ in defense.calls] == list(roles)
    for place, exchange, _, tensor in defense.calls:
        assert (exchange.name, exchange.role) == roles[place]
        assert (exchange.phase, exchange.step, exchange.axes) == ("train", 0, "BTD")
        assert tensor.shape == (*batch["input_ids"].shape, 16)
        assert torch.equal(exchange.mask, batch["attention_mask"]), place
        assert torch.equal(exchange.batch["input_ids"], batch["input_ids"])
        assert isinstance(exchange.generator, torch.Generator)
    assert len({exchange.number for _, exchange, _, _ in defense.calls}) == 1


def test_the_memo_is_shared_within_an_exchange_and_empty_at_the_next(cut):
    defense = Recording()
    parties = cut("gpt2", defenses=[defense])
    batch = tiny_batch(parties.whole, labels="tokens")
    for _ in range(2):
        defense.calls.clear()
        parties.data_party.model(**batch, use_cache=False).loss.backward()
        remembered = [sorted(memo) for _, _, memo, _ in defense.calls]
        places = [place for place, *_ in defense.calls]
        assert remembered == [sorted(places[: n + 1]) for n in range(5)]
        assert all(count == 1 for count in defense.calls[-1][2].values())


def test_the_mask_in_a_decode_step_covers_the_new_position_only(cut):
    defense = Recording()
    parties = cut("gpt2", defenses=[defense])
    train_and_write(parties.data_party)
    found = [
        e.mask.shape
        for place, e, _, t in defense.calls
        if place == "on_smashed" and e.phase == "decode"
    ]
    assert found == [(3, 1)] * 3


def test_noise_of_equal_seeds_is_equal_and_of_others_is_not(cut):
    class Noise(Defense):
        def on_smashed(self, smashed, exchange):
            return smashed + torch.randn(smashed.shape, generator=exchange.generator)

    def logits(seed):
        parties = cut("gpt2", defenses=[Noise(), Noise()], seed=seed)
        return parties.data_party.model(**tiny_batch(parties.whole)).logits

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    assert not torch.equal(logits(None), logits(None))


def test_two_equal_defenses_have_a_random_stream_each(cut):
    @define  # equal by value, as frozen options are
    class Noise(Defense):
        drawn: list = field(factory=list, eq=False)

        def on_smashed(self, smashed, exchange):
            self.drawn.append(exchange.generator)
            return smashed

    defenses = [Noise(), Noise()]
    parties = cut("gpt2", defenses=defenses, seed=1)
    parties.data_party.model(**tiny_batch(parties.whole))
    assert defenses[0] == defenses[1]
    assert defenses[0].drawn[0] is not defenses[1].drawn[0]


@pytest.mark.parametrize(("head", "tail"), [(1, 1), (0, 1), (1, 0)])
@pytest.mark.parametrize("generation", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_no_smashed_payload_crosses_undefended(cut, kind, generation, head, tail):
    inner, outer = Recording(), Recording()
    parties = cut(kind, head, tail, defenses=[inner, AddOne(), outer])
    with parties.data_party.channel.tap(Transcript()) as transcript:
        train_and_write(parties.data_party, **generation)
    sent = [r for r in transcript.messages if r.role == "smashed"]
    undefended = [tensor for place, _, _, tensor in inner.calls if place == "on_smashed"]
    assert [r.phase for r in sent] == ["train", "prefill", "decode", "decode", "decode"]
    for record, twin in zip(sent, undefended, strict=True):
        assert torch.equal(record.tensor, twin + 1.0)
        assert (record.tensor != twin).all()
    others = [
        r.tensor for r in transcript.messages if r.direction == "sent" and r.role != "smashed"
    ]
    assert not [
        t for t in others for twin in undefended if t.shape == twin.shape and torch.equal(t, twin)
    ]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_defense_that_changes_nothing_changes_nothing(cut, kind):
    plain, defended = cut(kind), cut(kind, defenses=[Identity(), Identity()])
    torch.manual_seed(3)
    expected, text = train_and_write(plain.data_party)
    torch.manual_seed(3)
    out, our_text = train_and_write(defended.data_party)
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(our_text, text)
    for side in ("data_party", "model_party"):
        weights = dict(getattr(plain, side).named_parameters())
        for name, weight in getattr(defended, side).named_parameters():
            assert torch.equal(weight.grad, weights[name].grad), name


def test_a_learned_defense_gets_its_gradient(cut):
    class Scale(Defense):
        scale = nn.Parameter(torch.ones(()))

        def on_smashed(self, smashed, exchange):
            return smashed * self.scale

        def parameters(self):
            return (self.scale,)

    defense = Scale()
    parties = cut("llama", defenses=[defense])
    with torch.no_grad():
        defense.scale.fill_(1.1)
    batch = tiny_batch(parties.whole, labels="tokens")
    parties.data_party.model(**batch).loss.backward()
    scale = torch.tensor(
        1.1, requires_grad=True
    )  # by hand: scale what leaves block 0 of the whole model
    parties.whole.model.layers[0].register_forward_hook(lambda _m, _a, out: out * scale)
    parties.whole(**batch).loss.backward()
    assert defense.scale.grad.item() == pytest.approx(scale.grad.item(), rel=1e-5)


def test_what_on_gradient_returns_is_what_crosses_and_what_the_model_party_learns_from(cut):
    class Halve(Defense):
        def on_gradient(self, gradient, exchange):
            return gradient / 2

    plain, defended = cut("gpt2"), cut("gpt2", defenses=[Halve()])
    batch = tiny_batch(plain.whole, labels="tokens")
    for parties in (plain, defended):
        parties.data_party.model(**batch).loss.backward()
    expected = dict(plain.model_party.named_parameters())
    for name, weight in defended.model_party.named_parameters():
        assert torch.allclose(weight.grad, expected[name].grad / 2, atol=1e-7, rtol=1e-5)
