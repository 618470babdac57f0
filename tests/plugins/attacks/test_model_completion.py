"""Completing the model: answers are read off returned states; with smashed data, so are prompts."""

from __future__ import annotations

import pytest
import torch

from vflair_attacks.model_completion import JointInversion, ModelCompletion
from vflair_attacks.vocabulary_search import VocabularySearch
from vflair_core import AttackError, Defense, Partition
from vflair_core.attacks.attack import launch
from vflair_core.testing import crossed, numbers_as_texts, tiny_model, tiny_tokenizer

VOCABULARY, PROMPT, ANSWER = 200, 5, 8


class Noise(Defense):
    """Gaussian noise on the smashed data, in units of its root mean square."""

    def __init__(self, sigma):
        self.sigma = sigma

    def on_smashed(self, smashed, exchange):
        noise = torch.randn(smashed.shape, generator=exchange.generator)
        return smashed + self.sigma * smashed.square().mean().sqrt() * noise


def victims(kind="llama", partition=None, defenses=()):
    """Prompts and what the model itself answers, which is what answers in private chats are."""
    torch.manual_seed(0)
    model = tiny_model(kind, vocab_size=VOCABULARY, hidden_size=32, initializer_range=0.1)
    prompts = torch.randint(3, VOCABULARY, (6, PROMPT))
    rows = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), min_new_tokens=ANSWER, max_new_tokens=ANSWER,
        do_sample=False,
    )  # fmt: skip
    knowledge = crossed(model, partition or Partition(1, 1), rows, defenses=defenses)
    return rows, model, {**knowledge, "task_kind": "causal-lm"}


def parts(guess, rows) -> tuple[float, float]:
    """Accuracy on prompts and on answers."""
    hits = (guess.tokens == rows).float()
    return float(hits[:, :PROMPT].mean()), float(hits[:, PROMPT:].mean())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("partition", [Partition(1, 1), Partition(0, 2), Partition(1, 0)])
def test_the_guess_is_what_the_unsplit_model_finds_most_likely(kind, partition):
    rows, model, knowledge = victims(kind, partition)
    guess = launch(ModelCompletion(), knowledge)
    expected = model(rows).logits.argmax(-1)
    assert torch.equal(guess.tokens[:, 1:], expected[:, :-1])
    assert bool((guess.tokens[:, 0] == -1).all())


@pytest.mark.parametrize("partition", [Partition(1, 1), Partition(1, 0)])
def test_answers_are_read_and_prompts_are_not(partition):
    rows, _, knowledge = victims(partition=partition)
    prompt, answer = parts(launch(ModelCompletion(), knowledge), rows)
    assert answer == 1.0
    assert prompt < 0.2


def test_joint_inversion_reads_both():
    rows, _, knowledge = victims()
    assert torch.equal(launch(JointInversion(), knowledge).tokens, rows)


@pytest.mark.parametrize("source", ["prior", "linear", "prior+linear"])
def test_proposals_make_joint_inversion_shorter_and_find_the_same(source):
    rows, _, knowledge = victims()
    public = torch.randint(3, VOCABULARY, (600, 8))
    knowledge |= {
        "tokenizer": tiny_tokenizer(VOCABULARY),
        "public_texts": numbers_as_texts(public),
    }
    guess = launch(JointInversion(proposals=source), knowledge)
    assert torch.equal(guess.tokens, rows)
    assert guess.budget["forwards"] < 0.7 * rows.numel() * VOCABULARY


def test_under_noise_each_half_helps_the_other():
    rows, _, knowledge = victims(defenses=[Noise(1.0)])
    joint = launch(JointInversion(), knowledge)
    search = launch(VocabularySearch(prior=0.0), knowledge)
    completion = launch(ModelCompletion(), knowledge)
    accuracies = [float((g.tokens == rows).float().mean()) for g in (joint, search, completion)]
    assert accuracies[0] > max(accuracies[1:]) + 0.05


@pytest.mark.parametrize("attack", [ModelCompletion(), JointInversion()])
def test_without_a_tail_or_next_tokens_it_says_what_is_missing(attack):
    _, _, knowledge = victims()
    with pytest.raises(AttackError, match="'classification' predicts no next token"):
        launch(attack, {**knowledge, "task_kind": "classification"})
    del knowledge["tail"]
    with pytest.raises(AttackError, match="no tail is granted"):
        launch(attack, knowledge)
