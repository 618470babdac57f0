"""Defenses of labels and gradients: against brute force, stated frequencies, and what they hide."""

from __future__ import annotations

import math

import pytest
import torch

from vflair_core import DefenseError, Partition, Transcript, split
from vflair_core.defenses.defense import Exchange
from vflair_core.testing import tiny_batch, tiny_model
from vflair_defenses.decoy_rows import DecoyRows
from vflair_defenses.label_randomised_response import LabelRandomisedResponse
from vflair_defenses.marvell import Marvell, best_variances, sum_kl
from vflair_defenses.norm_matching import NormMatching
from vflair_defenses.zero_row_padding import ZeroRowPadding


def test_norms_match_in_the_mean_of_their_squares(exchange):
    """4,000 draws: E‖g̃‖² = max‖g‖² within 10 % (6 standard errors of a shifted chi-square)."""
    gradient = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 1.0]])
    there = exchange(axes="BD")
    squares = torch.stack(
        [NormMatching().on_gradient(gradient, there).square().sum(1) for _ in range(4000)]
    )
    assert torch.allclose(squares.mean(0), torch.full((3,), 25.0), rtol=0.14)
    assert float(squares[:, 0].std()) < 1e-3  # the longest stays as it is


def test_marvell_finds_variances_as_good_as_a_grid_search():
    distance, spread, width, share, power = 2.0, [0.3, 0.1], 5, 0.3, 6.0
    found = sum_kl(*best_variances(distance, spread, width, share, power), distance, spread, width)
    weights = torch.tensor([1 - share, share])
    grid, best = torch.linspace(0, 1, 21), math.inf
    for a in grid:
        for b in grid[grid <= 1 - a + 1e-6]:
            for c in grid[grid <= 1 - a - b + 1e-6]:
                parts = power * torch.stack([a, b, c, (1 - a - b - c).clamp_min(0)])
                along, across = parts[:2] / weights, parts[2:] / weights / (width - 1)
                best = min(best, float(sum_kl(along, across, distance, spread, width)))
    assert float(found) <= best + 0.01
    assert float(found) < float(sum_kl(torch.zeros(2), torch.zeros(2), distance, spread, width))


def test_the_divergence_of_two_gaussians_equals_torchs():
    along, across = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25])
    variances = [torch.cat([along[k : k + 1], across[k].expand(3)]) + 0.1 for k in range(2)]
    means = [torch.zeros(4), torch.tensor([1.5, 0, 0, 0])]
    p, q = (
        torch.distributions.Independent(torch.distributions.Normal(m, v.sqrt()), 1)
        for m, v in zip(means, variances, strict=True)
    )
    kl = torch.distributions.kl_divergence
    expected = float(kl(p, q) + kl(q, p))
    assert float(sum_kl(along, across, 1.5**2, [0.1, 0.1], 4)) == pytest.approx(expected, rel=1e-5)


def test_marvell_refuses_labels_it_cannot_tell_apart(exchange):
    there = exchange(axes="BD", batch={"labels": torch.tensor([0, 2])})
    with pytest.raises(DefenseError, match="labels of shape"):
        Marvell().on_gradient(torch.ones(2, 3), there)
    there = exchange(axes="BD", batch={"labels": torch.tensor([1, 1])})
    with pytest.raises(DefenseError, match="there was none yet"):
        Marvell().on_gradient(torch.ones(2, 3), there)


@pytest.mark.parametrize("length", [3, 5])
def test_marvell_gives_a_batch_of_one_class_the_noise_of_the_last_of_two(exchange, length):
    """4,000 draws of one class: the variance along the old difference and across it, within 12 % (five deviations)."""
    defense, resumed = Marvell(power=4.0), Marvell(power=4.0)
    gradient = torch.zeros(8, 4, 2)
    gradient[1::2, 0, 0], gradient[1::2, 3, 1] = 1.0, 0.1
    two = exchange(axes="BTD", batch={"labels": torch.tensor([0, 1] * 4)})
    defense.on_gradient(gradient, two)
    resumed.load_private_state(defense.private_state())
    one = exchange(axes="BTD", batch={"labels": torch.ones(4000, dtype=torch.int64)})
    noise = resumed.on_gradient(torch.zeros(4000, length, 2), one).flatten(1)
    direction = torch.zeros(length, 2)
    direction[0, 0] = 1.0
    if length > 3:
        direction[3, 1] = 0.1
    direction = (direction / direction.norm()).flatten()
    along, across = (defense.private_state()[name][1] for name in ("along", "across"))
    seen = noise @ direction
    assert float(seen.square().mean()) == pytest.approx(float(along), rel=0.12)
    left = (noise - seen[:, None] * direction).square().sum(1).mean() / (2 * length - 1)
    assert float(left) == pytest.approx(float(across), rel=0.12)


def test_marvell_gives_each_example_its_own_noise_where_positions_come_first(exchange):
    """One class has no difference along any coordinate but its own: rows of the other are as they were sent."""
    gradient = torch.zeros(4, 4, 2)  # (T, B, D)
    gradient[0, 1::2, 0] = 1.0
    labels = torch.tensor([0, 1, 0, 1])
    first = exchange(axes="TBD", batch={"labels": labels})
    second = exchange(axes="BTD", batch={"labels": labels})
    defense = Marvell()
    there = defense.on_gradient(gradient, first).transpose(0, 1)
    here = Marvell().on_gradient(gradient.transpose(0, 1).contiguous(), second)
    assert torch.allclose(there, here)


def test_marvell_makes_the_mean_difference_hard_to_see(exchange):
    """The direction that tells the classes apart perfectly before is near chance after much noise."""
    labels = torch.tensor([0, 1] * 200)
    gradient = torch.randn(400, 6) * 0.01
    gradient[:, 0] += labels
    there = exchange(axes="BD", batch={"labels": labels})
    score = Marvell(power=50.0).on_gradient(gradient, there)[:, 0]
    right = ((score > score.median()) == labels.bool()).float().mean()
    assert float(right) < 0.7


def test_randomised_response_keeps_and_flips_as_often_as_it_says(exchange):
    """Chi-square with 2 degrees of freedom on 30,000 labels of 3 classes; false alarm once in 1,000 seeds."""
    count, epsilon = 30_000, 1.0
    defense = LabelRandomisedResponse(epsilon)
    defense.load_state({"classes": torch.tensor(3)})
    batch = {"input_ids": torch.arange(count)[:, None]}
    labels = torch.zeros(count, dtype=torch.int64)
    said = defense.on_labels(labels, exchange(batch=batch))
    keep = math.exp(epsilon) / (math.exp(epsilon) + 2)
    expected = torch.tensor([keep, (1 - keep) / 2, (1 - keep) / 2]) * count
    chi2 = ((said.bincount(minlength=3) - expected) ** 2 / expected).sum()
    assert float(chi2) < 13.8
    assert torch.equal(defense.on_labels(labels, exchange(1, batch=batch)), said)  # permanent
    assert defense.guarantee(64, 9, 9).epsilon == epsilon


def test_randomised_response_does_not_answer_for_embeddings_which_name_no_text():
    """200 answers to one text that is moved a little each time would tell the label, at an ε of 1."""
    model = tiny_model("llama", "classification")
    data_party, _ = split(model, Partition(1, 1), defenses=[LabelRandomisedResponse(epsilon=1.0)])
    data_party.prepare([])
    batch = tiny_batch(model, labels="classes")
    embeds = data_party.model.get_input_embeddings()(batch["input_ids"]).detach()
    data_party.model.train()
    with pytest.raises(DefenseError, match="Call the model with input_ids"):
        data_party.model(inputs_embeds=embeds, labels=batch["labels"], use_cache=False)


def test_randomised_response_refuses_the_labels_of_a_language_model(exchange):
    with pytest.raises(DefenseError, match="class labels of shape"):
        LabelRandomisedResponse().on_labels(torch.zeros(2, 3, dtype=torch.int64), exchange())


def test_padding_leaves_no_zero_row_but_those_the_mask_betrays(exchange):
    gradient = torch.randn(2, 5, 4)
    gradient[:, :2] = 0
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 0] = 0
    sent = ZeroRowPadding().on_gradient(gradient, exchange(mask=mask))
    assert (sent.norm(dim=-1) == 0).nonzero().tolist() == [[1, 0]]
    assert torch.equal(sent[:, 2:], gradient[:, 2:])
    lengths = gradient[:, 2:].norm(dim=-1).flatten()
    assert all((lengths - n).abs().min() < 1e-5 for n in sent[0, :2].norm(dim=-1))


@pytest.mark.parametrize(
    ("kind", "head", "tail"), [("gpt2", 1, 1), ("llama", 1, 0), ("bert", 1, 1)]
)
def test_decoys_leave_outputs_alone_and_no_gradient_of_theirs_is_zero(kind, head, tail, defended):
    parties = defended([DecoyRows(count=3)], kind, head, tail)
    party = parties.data_party
    labels = "classes" if kind == "bert" else "tokens"
    batch = tiny_batch(parties.whole, rows=3, padding="right", labels=labels)
    party.model.eval()
    out = party.model(**batch, **({} if kind == "bert" else {"use_cache": False}))
    assert torch.allclose(out.logits, parties.whole(**batch).logits, atol=1e-5)
    with party.channel.tap(Transcript()) as transcript:
        party.model.train()
        out = party.model(**batch, **({} if kind == "bert" else {"use_cache": False}))
        out.loss.backward()
    rows = {r.role: r.tensor for r in transcript.messages if r.direction == "sent"}
    assert len(rows["smashed"]) == len(rows["hidden_grad"]) == 6
    assert (rows["hidden_grad"].flatten(1).norm(dim=1) > 0).all()


def test_decoys_stand_anywhere_in_the_batch(defended):
    """The chance that three decoys are last ten times running is 20^-10."""
    defense = DecoyRows(count=3)
    parties = defended([defense])
    batch = tiny_batch(parties.whole, rows=3)
    seen = set()
    for _ in range(10):
        with parties.data_party.channel.tap(Transcript()) as transcript:
            parties.data_party.model(**batch, use_cache=False)
        (sent,) = [r.tensor for r in transcript.messages if r.role == "smashed"]
        own = parties.data_party.smashed(input_ids=batch["input_ids"], use_cache=False)
        places = [int((sent - row).flatten(1).norm(dim=1).argmin()) for row in own]
        seen.add(tuple(sorted(places)))
    assert len(seen) > 1


def test_decoys_are_special_where_their_twins_are(defended):
    """The first token of every row says nothing of which are real."""
    parties = defended([DecoyRows(count=5)], "bert")
    tokenizer = parties.data_party.tokenizer
    special = torch.tensor(tokenizer.all_special_ids)
    own = torch.randint(20, 200, (3, 8))
    own[:, 0], own[:, -1] = special[0], special[-1]
    there = Exchange(0, 0, "train", generator=torch.Generator().manual_seed(0))
    (defense,) = parties.data_party.defenses.each
    ids = defense.expand({"input_ids": own}, there)["input_ids"]
    assert ids.shape == (8, 8)
    assert (ids[:, 0] == special[0]).all()
    assert (ids[:, -1] == special[-1]).all()
    assert not torch.isin(ids[:, 1:-1], special).any()


def test_who_has_the_head_looks_decoys_up_in_the_public_text(defended):
    """Of every message all decoys are found and no real row: one forward for each place where a decoy could begin."""
    defense = DecoyRows(count=4)
    parties = defended([defense], "llama", 1, 0)
    party = parties.data_party
    own, stream = torch.randint(20, 200, (3, 7)), defense.state()["stream"]
    places = torch.arange(len(stream))[:, None] + torch.arange(7)
    public = party.smashed(input_ids=stream[places % len(stream)], use_cache=False)
    for _ in range(5):
        with party.channel.tap(Transcript()) as transcript, torch.no_grad():
            party.model(input_ids=own, use_cache=False)
        (sent,) = [r.tensor for r in transcript.messages if r.role == "smashed"]
        away = (sent[:, None] - public).flatten(2).norm(dim=2).amin(1)
        found = (away > 1e-3).nonzero().flatten()
        assert found.tolist() == sorted(party.calls.sent.places.tolist())
