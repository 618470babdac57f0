"""Row-clipped Gaussian noise: on every message, calibrated as it says, and nothing at zero."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from vflair_core import DefenseError, Partition, Transcript, split
from vflair_core.defenses.defense import Exchange
from vflair_core.tasks.tokenizer_training import train_tokenizer
from vflair_core.testing import tiny_model
from vflair_defenses.gaussian_noise import GaussianMechanism, GaussianNoise
from vflair_defenses.rows import clip_rows

PUBLIC = ["Public text that anyone may read, long enough for a few rows."] * 4


def exchange(seed=0):
    return Exchange(1, 0, "eval", generator=torch.Generator().manual_seed(seed))


def payloads(party, ids, mode):
    """All smashed payloads of one mode of use, in order."""
    with party.channel.tap(Transcript()) as transcript:
        if mode == "train":
            party.model.train()
            party.model(ids, labels=ids, use_cache=False).loss.backward()
        else:
            party.model.eval()
            beams = 3 if mode == "beams" else 1
            party.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=4,
                min_new_tokens=4,
                num_beams=beams,
                do_sample=False,
                pad_token_id=0,
            )
    return [r.tensor for r in transcript.messages if r.role == "smashed"]


@pytest.mark.parametrize("mode", ["train", "generate", "beams"])
@pytest.mark.parametrize("partition", [Partition(1, 1), Partition(2, 0)], ids=lambda p: p.kind)
def test_no_row_crosses_as_its_undefended_twin(mode, partition):
    torch.manual_seed(0)
    model, ids = tiny_model("llama"), torch.randint(3, 60, (2, 5))
    bare, _ = split(copy.deepcopy(model), partition)
    defense = GaussianNoise(noise_multiplier=1e-3, clip=1e6)
    covered, _ = split(model, partition, defenses=[defense], seed=0)
    twins = payloads(bare, ids, mode)[: 1 if mode == "train" else None]
    defended = payloads(covered, ids, mode)
    assert len(defended) >= (1 if mode == "train" else 4)
    for plain, noisy in zip(twins, defended, strict=False):
        if plain.shape == noisy.shape:
            assert not bool((plain == noisy).all(-1).any())


@pytest.mark.parametrize("mode", ["train", "generate", "beams"])
def test_zero_noise_without_clip_is_bitwise_undefended(mode):
    torch.manual_seed(0)
    model, ids = tiny_model("gpt2"), torch.randint(3, 60, (2, 5))
    bare, _ = split(copy.deepcopy(model), Partition(1, 1))
    off = GaussianNoise(noise_multiplier=0, clip=math.inf)
    covered, _ = split(model, Partition(1, 1), defenses=[off], seed=0)
    for state in (1,):
        torch.manual_seed(state)
        twins = payloads(bare, ids, mode)
        torch.manual_seed(state)
        defended = payloads(covered, ids, mode)
    assert len(twins) == len(defended)
    assert all(torch.equal(a, b) for a, b in zip(twins, defended, strict=True))


def test_noise_has_the_standard_deviation_it_states_and_is_fresh_each_time():
    """Chi-square on 200,000 draws: a 2 % error of sigma would be 12 standard errors away."""
    defense = GaussianNoise(noise_multiplier=0.5, clip=3.0)
    rows = torch.zeros(1, 2000, 100)
    there = exchange()
    first, second = (defense.on_smashed(rows, there) for _ in range(2))
    assert float(first.std()) == pytest.approx(1.5, rel=0.007)
    assert float(first.mean()) == pytest.approx(0.0, abs=5 * 1.5 / math.sqrt(200_000))
    assert not torch.equal(first, second)
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 0.02


def test_no_row_is_longer_than_the_clip_before_noise_and_short_rows_stay():
    rows = torch.randn(2, 5, 8) * torch.tensor([0.1, 1, 10, 100, 1000])[None, :, None]
    clipped = clip_rows(rows, 4.0)
    expected = torch.stack([r * min(1.0, 4.0 / float(r.norm())) for r in rows.flatten(0, 1)])
    assert torch.allclose(clipped.flatten(0, 1), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_clip_holds_in_half_precision_before_the_noise(dtype):
    torch.manual_seed(0)
    rows = (10 * torch.randn(500, 64)).to(dtype)
    assert float(clip_rows(rows, 3.0).norm(dim=-1).max()) <= 3.0 * (1 + 1e-5)


def test_the_clip_comes_from_public_text_by_quantile():
    tokenizer = train_tokenizer(PUBLIC, 300)
    party, _ = split(tiny_model("gpt2", vocab_size=300), Partition(1, 1), tokenizer=tokenizer)
    defense = GaussianNoise(quantile=1.0)
    defense.prepare(PUBLIC, party)
    party.model.eval()
    norms = [
        party.smashed(input_ids=torch.tensor([tokenizer(t)["input_ids"]]), use_cache=False).norm(
            dim=-1
        )
        for t in PUBLIC
    ]
    assert float(defense.state()["bound"]) == pytest.approx(
        float(torch.cat(norms, 1).max().detach()), rel=1e-5
    )


def test_the_guarantee_composes_releases_and_no_noise_promises_nothing():
    defense = GaussianNoise(noise_multiplier=2.0, clip=1.0)
    one, four = defense.guarantee(1), defense.guarantee(4)
    # 4 releases with mu = 2/2 each are one release with mu = 2: sigma twice as small.
    assert four.epsilon == pytest.approx(
        GaussianNoise(noise_multiplier=1.0, clip=1.0).guarantee(1).epsilon
    )
    assert one.epsilon == one.epsilon_per_release < four.epsilon
    assert (
        str(GaussianNoise(noise_multiplier=0, clip=math.inf).guarantee(3))
        == "empirical, no guarantee"
    )


def test_a_target_epsilon_is_what_the_guarantee_states():
    assert GaussianNoise(epsilon=8.0, clip=5.0).guarantee(1).epsilon == pytest.approx(8.0, rel=1e-6)


def test_a_defense_without_clip_or_public_text_says_what_to_do():
    with pytest.raises(DefenseError, match="call prepare"):
        GaussianNoise().on_smashed(torch.zeros(1, 2, 3), exchange())
    party, _ = split(tiny_model("gpt2"), Partition(1, 1))
    with pytest.raises(DefenseError, match="set clip to a number"):
        GaussianNoise().prepare([], party)
    with pytest.raises(DefenseError, match="clip = inf needs noise 0"):
        GaussianNoise(noise_multiplier=1.0, clip=math.inf).on_smashed(
            torch.zeros(1, 2, 3), exchange()
        )


def test_what_an_attacker_draws_has_the_mean_and_the_spread_of_what_is_sent():
    mechanism = GaussianMechanism(bound=2.0, sigma=0.5)
    hidden = torch.full((20_000, 2), 3.0)  # longer than the bound
    drawn = mechanism.sample(hidden, torch.Generator().manual_seed(0))
    # Five standard errors: a false alarm in a million.
    assert float((drawn.mean(0) - 2.0 / 2**0.5).abs().max()) < 5 * 0.5 / 20_000**0.5
    assert float((drawn.std(0) - 0.5).abs().max()) < 5 * 0.5 / (2 * 20_000) ** 0.5
