"""Defenses that act around the whole model: penalties, added rows, counterparts, and what is refused."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from vflair_core.defenses.defense import Defense
from vflair_core.errors import DefenseError
from vflair_core.parties.split import split
from vflair_core.partition.partition import Partition
from vflair_core.testing import tiny_batch


def rotation(seed, width=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator))[0]


class Rotate(Defense):
    def __init__(self, seed):
        self.matrix = rotation(seed)

    def on_smashed(self, smashed, exchange):
        return smashed @ self.matrix

    def counterpart(self):
        inverse = nn.Linear(16, 16, bias=False)
        inverse.weight = nn.Parameter(self.matrix.clone())  # x W^T undoes x W: W is orthogonal
        return inverse


class Shift(Rotate):
    """Does not commute with a rotation."""

    def on_smashed(self, smashed, exchange):
        return smashed + 3.0

    def counterpart(self):
        inverse = nn.Linear(16, 16)
        inverse.weight = nn.Parameter(torch.eye(16))
        inverse.bias = nn.Parameter(torch.full((16,), -3.0))
        return inverse


@pytest.mark.parametrize("wire", [False, True], ids=["clones", "wire"])
@pytest.mark.parametrize("tail", [1, 0])
@pytest.mark.parametrize(
    "seeds", [[0], [0, 1], [0, None], [None, 0]], ids=["one", "two", "rotate-shift", "shift-rotate"]
)
def test_counterparts_undo_at_the_model_party_what_was_done_here(cut, seeds, tail, wire):
    defenses = [Shift(0) if seed is None else Rotate(seed) for seed in seeds]
    parties = cut("llama", 1, tail, defenses=defenses, wire=wire)
    batch = tiny_batch(parties.whole, labels="tokens")
    expected, ours = parties.whole(**batch), parties.data_party.model(**batch)
    assert torch.allclose(ours.logits, expected.logits, atol=1e-3)
    expected.loss.backward()
    ours.loss.backward()
    theirs = dict(parties.whole.named_parameters())
    for name, weight in (
        *parties.data_party.named_parameters(),
        *parties.model_party.named_parameters(),
    ):
        assert torch.allclose(weight.grad, theirs[name].grad, atol=1e-3), name
    prompt = {key: batch[key] for key in ("input_ids", "attention_mask")}
    texts = [
        m.generate(**prompt, max_new_tokens=4, do_sample=False)
        for m in (parties.whole, parties.data_party.model)
    ]
    assert torch.equal(*texts)


def test_a_layer_norm_may_be_a_counterpart(cut):
    class Normed(Defense):
        def counterpart(self):
            return nn.LayerNorm(16)

    parties = cut("llama", defenses=[Normed()])
    batch = tiny_batch(parties.whole)
    parties.whole.model.layers[0].register_forward_hook(
        lambda _m, _a, out: nn.functional.layer_norm(out, (16,))
    )
    ours, expected = parties.data_party.model(**batch).logits, parties.whole(**batch).logits
    assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.Sequential(nn.Linear(16, 16)), nn.Conv1d(1, 1, 1)], ids=str
)
def test_a_counterpart_of_another_kind_is_refused_by_name(cut, module):
    class Odd(Defense):
        def counterpart(self):
            return module

    words = rf"Odd asks the model party for a {type(module).__name__}\. It builds nn.Linear and nn.LayerNorm"
    with pytest.raises(DefenseError, match=words):
        cut("llama", defenses=[Odd()])


def test_a_penalty_is_added_to_the_loss_in_training_only(cut):
    class Two(Defense):
        def penalty(self, exchange):
            assert exchange.phase == "train"
            seen.append(float(exchange.memo["loss"].detach()))
            return torch.tensor(2.0)

    seen = []
    parties = cut("llama", defenses=[Two()])
    batch = tiny_batch(parties.whole, labels="tokens")
    expected = parties.whole(**batch).loss
    assert torch.equal(parties.data_party.model(**batch).loss, expected)
    parties.data_party.model.train()
    assert torch.equal(parties.data_party.model(**batch).loss, expected + 2.0)
    assert seen == [float(expected.detach())]


def test_a_penalty_sees_the_memo_of_its_exchange_and_trains_what_it_was_made_of(cut):
    class Shrink(Defense):
        def on_smashed(self, smashed, exchange):
            exchange.memo["smashed"] = smashed
            return smashed

        def penalty(self, exchange):
            return exchange.memo["smashed"].square().mean()

    parties = cut("llama", defenses=[Shrink()])
    parties.data_party.model.train()
    batch = tiny_batch(parties.whole, labels="tokens")
    parties.data_party.model(**batch).loss.backward()
    kept = []
    parties.whole.model.layers[0].register_forward_hook(lambda _m, _a, out: kept.append(out))
    (parties.whole(**batch).loss + kept[0].square().mean()).backward()
    expected = dict(parties.whole.named_parameters())
    for name, weight in parties.data_party.named_parameters():
        gradient = expected[name].grad
        assert (weight.grad - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


def test_every_exchange_of_a_forward_is_asked_for_its_penalty():
    class One(Defense):
        def penalty(self, exchange):
            seen.append(exchange.number)
            return torch.ones(())

    seen = []
    options = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2}
    config = AutoConfig.for_model("t5", vocab_size=64, decoder_start_token_id=0, **options)
    model = AutoModelForSeq2SeqLM.from_config(config)
    party, _ = split(copy.deepcopy(model), Partition(1, 1), defenses=[One()])
    ids = torch.randint(3, 60, (2, 5))
    torch.manual_seed(0)
    ours = party.model.train()(input_ids=ids, labels=ids).loss
    torch.manual_seed(0)
    expected = model.train()(input_ids=ids, labels=ids).loss
    assert len(seen) == len(set(seen)) == 2  # the encoder's and the decoder's
    assert torch.equal(ours, expected + 2.0)


def test_rows_that_are_added_cross_and_are_dropped_again(cut):
    class Decoys(Defense):
        def expand(self, batch, exchange):
            return {key: torch.cat([value, value.flip(0)]) for key, value in batch.items()}

        def contract(self, outputs, exchange):
            outputs["logits"] = outputs["logits"].chunk(2)[0]
            return outputs

    parties = cut("llama", defenses=[Decoys()])
    batch = tiny_batch(parties.whole, rows=3, length=7)
    out = parties.data_party.model(**batch, use_cache=False)
    assert torch.allclose(out.logits, parties.whole(**batch).logits, atol=1e-5)
    assert parties.data_party.channel.traffic["smashed", "sent"].rows == 2 * 3 * 7


@pytest.mark.parametrize(
    ("supports", "phase"),
    [
        ({("HBT", "*", "train")}, "prefill"),
        ({("HT", "*", "*")}, "train"),
        ({("*", "*", "decode")}, "train"),
    ],
)
def test_a_cell_that_a_defense_does_not_support_is_refused_by_name(cut, supports, phase):
    class Picky(Defense):
        def on_smashed(self, smashed, exchange):
            return smashed

    Picky.supports = frozenset(supports)
    parties = cut("llama", 1, 1, defenses=[Picky()])
    batch = tiny_batch(parties.whole, labels="tokens")
    before = parties.data_party.channel.messages
    if phase == "train":
        parties.data_party.model.train()
        act = functools.partial(parties.data_party.model, **batch)
    else:
        act = functools.partial(
            parties.data_party.model.generate, batch["input_ids"], max_new_tokens=2
        )
    with pytest.raises(
        DefenseError, match=rf"Picky does not support HBT × \S+ × {phase}.*It supports"
    ):
        act()
    assert parties.data_party.channel.messages == before


def test_axes_that_a_defense_cannot_defend_are_refused_by_name(cut):
    class Transposed(Defense):
        axes = frozenset({"TBD"})

        def on_smashed(self, smashed, exchange):
            return smashed

    parties = cut("llama", defenses=[Transposed()])
    with pytest.raises(
        DefenseError, match=r"Transposed cannot defend 'hidden_states': its axes are 'BTD'"
    ):
        parties.data_party.model(**tiny_batch(parties.whole))


def test_a_bypass_switches_every_place_off_and_on_again(cut):
    class Zero(Defense):
        def on_smashed(self, smashed, exchange):
            return smashed * 0

        def counterpart(self):
            return nn.LayerNorm(16)

    parties = cut("llama", defenses=[Zero()])
    batch = tiny_batch(parties.whole)
    expected = parties.whole(**batch).logits
    parties.data_party.defenses.bypassed = True
    assert torch.equal(parties.data_party.model(**batch).logits, expected)
    parties.data_party.defenses.bypassed = False
    assert not torch.allclose(parties.data_party.model(**batch).logits, expected)


def test_an_integer_mask_of_the_attention_is_left_alone_by_defenses(cut):
    class Negate(Defense):
        def on_smashed(self, smashed, exchange):
            assert smashed.is_floating_point()
            return -smashed

    parties = cut("llama", defenses=[Negate()])
    parties.data_party.model(**tiny_batch(parties.whole, padding="left"))


def test_defenses_act_in_order_on_the_way_out_and_in_reverse_on_the_way_back(cut):
    order = []

    class Named(Defense):
        def __init__(self, name):
            self.name = name

        def on_smashed(self, smashed, exchange):
            order.append((self.name, "out"))
            return smashed

        def on_returned(self, returned, exchange):
            order.append((self.name, "back"))
            return returned

    parties = cut("llama", defenses=[Named("first"), Named("second")])
    parties.data_party.model(**tiny_batch(parties.whole))
    assert order == [("first", "out"), ("second", "out"), ("second", "back"), ("first", "back")]
