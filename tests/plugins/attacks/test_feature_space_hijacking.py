"""Feature-space hijacking, message by message; that it reads text is shown in tests/examples."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vflair_attacks.feature_space_hijacking import FeatureSpaceHijacking
from vflair_core import AttackError, Message
from vflair_core.communication.message import Crossing

VOCABULARY, WIDTH = 20, 8


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def hijacker(tokenizer, **options):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCABULARY, WIDTH, generator=generator)
    draws = torch.randint(VOCABULARY, (30, 6), generator=generator).tolist()
    texts = [" ".join(f"w{n}" for n in row) for row in draws]
    attack = FeatureSpaceHijacking(steps=150, batch=8, **options)
    return attack, attack.adversary(tokenizer, table, texts, generator), table


def forward(rows, exchange=1, **meta):
    crossings = (Crossing("mask", "structure", torch.ones(1)), Crossing("hidden", "smashed", rows))
    meta = {"grad": True, "wants": [1], **meta}
    return Message("forward", "s", 0, exchange, 1, tensors=crossings, meta=meta)


def backward(exchange=1, *, keep=False):
    return Message("backward", "s", 0, exchange, 2, meta={"keep": keep})


def reply(gradient):
    return Message(
        "backward", "s", 0, 1, 2, tensors=(Crossing("smashed_grad", "smashed_grad", gradient),)
    )


@pytest.mark.parametrize("strength", [1.0, 2.5])
def test_the_false_gradient_is_as_long_as_asked_and_zero_where_the_honest_one_is(
    tokenizer, strength
):
    _, adversary, _ = hijacker(tokenizer, strength=strength)
    rows, gradient = torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH)
    gradient[:, 3:] = 0
    adversary.tamper(forward(rows), reply(gradient))
    false = adversary.tamper(backward(), reply(gradient)).tensors[0].tensor
    assert false.norm().item() == pytest.approx(strength * gradient.norm().item(), rel=1e-5)
    assert torch.equal(false[:, 3:], torch.zeros(2, 2, WIDTH))
    assert not torch.allclose(false, strength * gradient)


def test_without_strength_the_honest_gradient_is_sent(tokenizer):
    _, adversary, _ = hijacker(tokenizer, strength=0.0)
    gradient = torch.randn(1, 5, WIDTH)
    adversary.tamper(forward(torch.randn(1, 5, WIDTH)), reply(gradient))
    honest = reply(gradient)
    assert adversary.tamper(backward(), honest) is honest


def test_rows_that_follow_the_false_gradients_end_among_the_pilots_rows(tokenizer):
    """Free rows instead of a head; the witness is the distance to the nearest embedding, which the attack never sees."""
    _, adversary, table = hijacker(tokenizer)
    rows = 0.3 * torch.randn(8, 6, WIDTH) + 4
    far = torch.cdist(rows.flatten(0, 1), table).min(1).values.mean()
    for _ in range(300):
        adversary.tamper(forward(rows), reply(rows))
        false = adversary.tamper(backward(), reply(torch.ones_like(rows))).tensors[0].tensor
        rows = rows - 0.05 * false / false.std()
    near = torch.cdist(rows.flatten(0, 1), table).min(1).values.mean()
    assert near < 0.5 * far
    assert adversary.state()["sent"] == 300


def test_the_inverse_of_the_pilot_reads_embeddings(tokenizer):
    attack, adversary, table = hijacker(tokenizer)
    ids = torch.arange(VOCABULARY).reshape(4, 5)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[0, 3:] = False
    generator = torch.Generator().manual_seed(1)
    guess = attack(adversary.state(), table[ids][None], mask, tokenizer, generator)
    assert torch.equal(guess.tokens, torch.where(mask, ids, -1))


def test_a_head_that_asks_for_no_gradient_cannot_be_hijacked(tokenizer):
    _, adversary, _ = hijacker(tokenizer)
    adversary.tamper(forward(torch.randn(1, 5, WIDTH), wants=[]), reply(torch.randn(1)))
    with pytest.raises(AttackError, match="its head is not trained"):
        adversary.tamper(backward(), reply(torch.randn(1, 5, WIDTH)))


def test_forwards_whose_backward_is_over_or_will_not_come_are_forgotten(tokenizer):
    _, adversary, _ = hijacker(tokenizer)
    rows = torch.randn(1, 5, WIDTH)
    for exchange in (1, 2, 3):
        adversary.tamper(forward(rows, exchange), reply(rows))
    adversary.tamper(backward(1, keep=True), reply(rows))
    assert sorted(adversary.forwards) == [1, 2, 3]
    adversary.tamper(backward(1), reply(rows))
    adversary.tamper(forward(rows, 4, released_graphs=[2]), reply(rows))
    assert sorted(adversary.forwards) == [3, 4]
