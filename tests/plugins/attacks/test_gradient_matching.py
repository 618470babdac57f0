"""Gradient matching finds tokens by descent, and its pieces are what they say."""

from __future__ import annotations

import pytest
import torch

from vflair_attacks.gradient_matching import DeepLeakage, Lamp, Tag, _Match, cosine, squared
from vflair_core import AttackError, Partition
from vflair_core.attacks.attack import launch
from vflair_core.testing import tiny_model


def knowledge(crossing, lengths=(6, 4)):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 64, (1, n), generator=generator) for n in lengths]
    batches = [{"input_ids": row, "labels": row} for row in rows]
    return crossing(tiny_model("llama"), Partition(1, 1), batches, "causal-lm"), rows


def share(guess, rows):
    hits = [(g[1 : r.shape[1]] == r[0, 1:]) for g, r in zip(guess.tokens, rows, strict=True)]
    return float(torch.cat(hits).float().mean())


@pytest.mark.parametrize("attack", [DeepLeakage(), Tag(), Lamp()], ids=["dlg", "tag", "lamp"])
def test_most_tokens_are_found_where_chance_is_one_in_sixty_four(crossing, attack):
    seen, rows = knowledge(crossing)
    guess = launch(attack, seen)
    assert share(guess, rows) > 0.7
    assert guess.tokens[1, 4:].tolist() == [-1, -1]


def test_the_objective_is_zero_at_the_true_labels(crossing):
    seen, rows = knowledge(crossing, lengths=(6,))
    match = _Match(seen["tail"], seen["returned"][:1], seen["hidden_grad"][0], squared)
    certain = 1e4 * torch.nn.functional.one_hot(rows[0][0, 1:], 64).float()
    assert float(match.objective(certain).detach()) < 1e-8
    assert float(match.objective(certain.roll(1, 0)).detach()) > 0.1


def test_the_distances_are_those_of_their_papers():
    made, sent = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    assert float(squared(made, sent)) == pytest.approx(8 / 5)
    assert float(cosine(made, sent)) == pytest.approx(1 - (1 + 0) / 2)


def test_a_better_order_is_taken_and_a_worse_one_is_not(crossing):
    """Started from the true labels with two swapped, proposals alone put them right."""
    seen, rows = knowledge(crossing, lengths=(4,))
    match = _Match(seen["tail"], seen["returned"][:1], seen["hidden_grad"][0], cosine)
    true = rows[0][0, 1:]
    match.soft = 50 * torch.nn.functional.one_hot(true[[1, 0, 2]], 64).float()
    match.step = 1
    Lamp(every=1, proposals=60)._reorder(match, seen["generator"], None)
    assert torch.equal(match.soft.argmax(-1), true)
    Lamp(every=1, proposals=60)._reorder(match, seen["generator"], None)
    assert torch.equal(match.soft.argmax(-1), true)


def test_a_prior_that_hates_the_order_outweighs_the_gradient(crossing):
    seen, rows = knowledge(crossing, lengths=(4,))
    match = _Match(seen["tail"], seen["returned"][:1], seen["hidden_grad"][0], cosine)
    soft = 50 * torch.nn.functional.one_hot(rows[0][0, 1:], 64).float()

    class Model:
        def __call__(self, input_ids, labels):
            return type("Out", (), {"loss": torch.tensor(7.0)})

    without = Lamp()._score(match, soft, None)
    assert Lamp(prior=2.0)._score(match, soft, Model()) == pytest.approx(without + 14.0, abs=1e-4)


def test_classes_are_refused_by_name(crossing):
    batch = {"input_ids": torch.randint(3, 60, (1, 5)), "labels": torch.tensor([1])}
    seen = crossing(tiny_model("llama", "classification"), Partition(1, 1), [batch])
    with pytest.raises(AttackError, match="dlg seeks the tokens of a causal language model"):
        launch(DeepLeakage(), seen)
