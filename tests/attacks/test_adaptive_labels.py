"""The adaptive contract of attacks on labels: through a mapping of gradients that they know, and not without."""

from __future__ import annotations

import math

import pytest
import torch

from vflair_attacks import vflair_attacks
from vflair_attacks.gradient_sign import GradientSign
from vflair_attacks.label_enumeration import LabelEnumeration
from vflair_attacks.label_reconstruction import BatchLabelReconstruction
from vflair_core import Defense, Partition
from vflair_core.attacks.attack import launch, wants
from vflair_core.defenses.mechanism import ComposedMechanism, Mechanism
from vflair_core.offers import load_target
from vflair_core.testing import crossed, tiny_model
from vflair_defenses.gaussian_noise import GaussianNoise
from vflair_defenses.laplace_noise import LaplaceNoise
from vflair_defenses.norm_matching import NormMatching
from vflair_defenses.quantisation import Quantisation
from vflair_defenses.sparsification import Sparsification

CLASSES, VOCABULARY, EXAMPLES = 20, 300, 60
HT, HBT = Partition(1, 0), Partition(1, 2)
ADAPTIVE = {
    "label-enumeration": (LabelEnumeration(), HBT),
    "bli": (BatchLabelReconstruction(), HBT),
    "gradient-sign": (GradientSign(), HT),
}


class MixingGradients(Defense):
    """Multiplies each row of the gradient by a random invertible matrix, the same for all."""

    def on_gradient(self, gradient, exchange):
        return gradient @ matrix(gradient.shape[-1])

    def gradient_mechanism(self):
        return MixedGradients()


class MixedGradients(Mechanism):
    def expected(self, hidden):
        return hidden @ matrix(hidden.shape[-1])


class Turning(Defense):
    """Norm matching as in a batch whose longest gradient is three times each."""

    def on_gradient(self, gradient, exchange):
        return gradient * (1 + 8**0.5 * torch.randn((), generator=exchange.generator))


def matrix(width):
    stream = torch.Generator().manual_seed(7)
    return torch.randn(width, width, generator=stream) / width**0.5


def classified(partition, defenses, *, labels=None, kind="bert", **options):
    """Examples with random classes, or those of `labels`, as their messages show them."""
    generator = torch.Generator().manual_seed(0)
    model = tiny_model(kind, "classification", num_labels=CLASSES, **options)
    rows = torch.randint(3, 64, (EXAMPLES, 7), generator=generator)
    if labels is None:
        labels = torch.randint(CLASSES, (EXAMPLES,), generator=generator)
    seen = crossed(model, partition, rows, labels=labels, defenses=defenses)
    return labels, {**seen, "task_kind": "classification"}


def accuracy(attack, knowledge, labels) -> float:
    return float((launch(attack, knowledge).labels == labels).float().mean())


@pytest.mark.parametrize(("attack", "partition"), ADAPTIVE.values(), ids=ADAPTIVE)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_known_mapping_of_gradients_hides_no_class_and_an_unknown_one_all(
    attack, partition, kind
):
    """Chance is .05; of 60 examples 9 right, .15, come by chance once in 600."""
    labels, knowledge = classified(partition, [MixingGradients()], kind=kind)
    assert accuracy(attack, {**knowledge, "gradient_mechanism": MixedGradients()}, labels) >= 0.99
    assert accuracy(attack, knowledge, labels) <= 0.15


def test_the_same_holds_for_the_tokens_of_a_language_model():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, VOCABULARY, (6, 10), generator=generator)
    model = tiny_model("llama", vocab_size=VOCABULARY)
    knowledge = crossed(model, HBT, rows, labels=rows, defenses=[MixingGradients()])
    knowledge["task_kind"] = "causal-lm"
    attack = LabelEnumeration(candidates=VOCABULARY)  # its shortlist cannot know the mapping
    blind = launch(attack, knowledge).tokens
    knowing = launch(attack, {**knowledge, "gradient_mechanism": MixedGradients()}).tokens
    assert (blind[:, 1:] == rows[:, 1:]).float().mean() <= 0.05
    assert (knowing[:, 1:] == rows[:, 1:]).float().mean() >= 0.99


def test_every_attack_that_asks_for_the_mechanism_of_gradients_is_under_the_contract():
    asking = {
        name
        for name, target in vflair_attacks().items()
        if "gradient_mechanism" in sum(wants(load_target(target)()), ())
    }
    assert asking == set(ADAPTIVE)


def calibrated(**options):
    """Classes drawn from the model's own probabilities, as of a model that has learned its task."""
    model = tiny_model("bert", "classification", num_labels=CLASSES, **options)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 64, (EXAMPLES, 7), generator=generator)
    with torch.no_grad():
        chances = model.eval()(input_ids=rows).logits.softmax(-1)
    return torch.multinomial(chances, 1, generator=generator).flatten()


@pytest.mark.parametrize("name", ["label-enumeration", "gradient-sign"])
@pytest.mark.parametrize("noise", [GaussianNoise, LaplaceNoise])
def test_through_noise_whose_scale_it_knows_an_attack_finds_more(name, noise):
    attack, partition = ADAPTIVE[name]
    spread = {"initializer_range": 0.8}
    labels = calibrated(**spread)
    clip = 0.5
    options = {"gradient_clip": clip, "clip": float("inf")}
    if noise is GaussianNoise:
        defense = GaussianNoise(noise_multiplier=0, gradient_multiplier=0.6, **options)
    else:
        defense = LaplaceNoise(epsilon=float("inf"), gradient_epsilon=4.0, **options)
    _, knowledge = classified(partition, [defense], labels=labels, **spread)
    blind = accuracy(attack, knowledge, labels)
    known = {**knowledge, "gradient_mechanism": defense.gradient_mechanism()}
    assert accuracy(attack, known, labels) > blind + 0.2


@pytest.mark.parametrize("name", ["label-enumeration", "gradient-sign"])
def test_a_factor_that_turns_gradients_round_hides_no_class_from_who_knows_it(name):
    """Batches of many: the factor is negative for half of the examples, and the blind attack is wrong about those."""
    attack, partition = ADAPTIVE[name]
    labels, knowledge = classified(partition, [Turning()])
    known = {**knowledge, "gradient_mechanism": NormMatching(strength=1.0).gradient_mechanism()}
    assert 0.35 <= accuracy(attack, knowledge, labels) <= 0.65
    assert accuracy(attack, known, labels) >= 0.95


@pytest.mark.parametrize(
    ("attack", "partition"), [ADAPTIVE["label-enumeration"], ADAPTIVE["gradient-sign"]]
)
def test_it_hides_no_token_of_a_large_vocabulary_either(attack, partition):
    """Of 300 tokens 64 are tried, from both ends: where the factor is negative the label is at the other one."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, VOCABULARY, (8, 8), generator=generator)
    model = tiny_model("llama", vocab_size=VOCABULARY)
    knowledge = crossed(model, partition, rows, labels=rows, defenses=[Turning()])
    knowledge |= {"task_kind": "causal-lm"}
    known = {**knowledge, "gradient_mechanism": NormMatching(strength=1.0).gradient_mechanism()}
    blind, knowing = (launch(attack, k).tokens[:, 1:] == rows[:, 1:] for k in (knowledge, known))
    assert 0.2 <= blind.float().mean() <= 0.8
    assert knowing.float().mean() >= 0.95


def test_the_likelihood_of_a_factor_is_its_density_averaged_over_norms():
    """By hand for one guess of norm 2 and what is sent −3 times it, on the line, against the guess turned to the line's side."""
    guess = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]])
    found = NormMatching().gradient_mechanism().log_likelihood(torch.tensor([[-6.0, 0.0]]), guess)
    largest = 2 * torch.logspace(0, math.log10(30), 32)
    spread = (largest / 2).square().sub(1).clamp_min(1e-6).sqrt()
    said = torch.distributions.Normal(1.0, spread)
    expected = [said.log_prob(torch.tensor(r)).logsumexp(0) for r in (-3.0, 0.0)]
    difference = expected[0] - expected[1] + 50.0  # the other guess is at a right angle
    assert float(found[0, 0] - found[1, 0]) == pytest.approx(float(difference), rel=1e-4)


@pytest.mark.parametrize(("attack", "partition"), ADAPTIVE.values(), ids=ADAPTIVE)
@pytest.mark.parametrize(
    "defense", [Sparsification(rate=0.5, gradients=True), Quantisation(bits=2, gradients=True)]
)
def test_what_drops_or_rounds_coordinates_of_gradients_hides_no_class(attack, partition, defense):
    labels, knowledge = classified(partition, [defense])
    known = {**knowledge, "gradient_mechanism": defense.gradient_mechanism()}
    assert accuracy(attack, known, labels) >= 0.95


def test_a_likelihood_of_gradients_is_the_logarithm_of_the_density():
    """Up to a constant: differences are those of torch's normal and Laplace densities of the clipped gradient."""
    guesses, seen = torch.randn(3, 4, 5), torch.randn(4, 5)
    gauss = GaussianNoise(clip=1.0, gradient_multiplier=0.7, gradient_clip=2.0)
    norms = guesses.flatten(1).norm(dim=1).clamp_min(2.0)[:, None, None]
    normal = torch.distributions.Normal(2.0 * guesses / norms, 1.4)
    density = normal.log_prob(seen).sum((1, 2))
    ours = ComposedMechanism([gauss.gradient_mechanism()]).log_likelihood(seen, guesses).sum(-1)
    assert torch.allclose(ours - ours[0], density - density[0], atol=1e-4)
    laplace = LaplaceNoise(clip=1.0, gradient_epsilon=3.0, gradient_clip=2.0)
    norms = guesses.flatten(1).norm(p=1, dim=1).clamp_min(2.0)[:, None, None]
    double = torch.distributions.Laplace(2.0 * guesses / norms, 4 / 3)
    density = double.log_prob(seen).sum((1, 2))
    ours = laplace.gradient_mechanism().log_likelihood(seen, guesses).sum(-1)
    assert torch.allclose(ours - ours[0], density - density[0], atol=1e-4)


@pytest.mark.parametrize(
    "defense",
    [
        GaussianNoise(noise_multiplier=0.1, clip=1.0),
        LaplaceNoise(clip=1.0),
        Sparsification(),
        Quantisation(),
    ],
)
def test_who_leaves_gradients_alone_has_no_mechanism_of_them(defense):
    assert defense.gradient_mechanism() is None
