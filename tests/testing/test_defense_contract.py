"""`assert_defense_contract` passes what keeps the rules, and names the rule that is broken."""

from __future__ import annotations

import attrs
import pytest
import torch
from attrs import define, field, frozen

from vflair_core import Defense, DefenseError, Guarantee, Mechanism
from vflair_core.testing import assert_defense_contract
from vflair_core.testing.calls import CALLS

QUICK = [call for call in CALLS if str(call) in ("train gpt2 1+1", "generate llama 2+0")]
TEXT = frozenset({"prompt", "response"})


def turned(hidden, width):
    return torch.cat([-hidden[..., :width], hidden[..., width:]], dim=-1)


@frozen
class Turned(Mechanism):
    width: int

    def expected(self, hidden):
        return turned(hidden, self.width)


@define
class Flip(Defense):
    """Turns the sign of the first coordinates."""

    width: int = 4
    covers = TEXT

    def on_smashed(self, smashed, exchange):
        return turned(smashed, self.width)

    def mechanism(self):
        return Turned(self.width)


def test_a_defense_that_keeps_the_rules_passes():
    assert_defense_contract(Flip, off=lambda: Flip(0))


@define
class Reversed(Defense):
    """Puts the words of a text in the other order."""

    on: bool = True
    covers = TEXT

    def on_text(self, fields):
        return {k: " ".join(v.split()[::-1]) if self.on else v for k, v in fields.items()}


@define
class OtherTokens(Defense):
    covers = TEXT

    def on_tokens(self, batch):
        ids = batch["input_ids"]
        return {**batch, "input_ids": torch.where(ids > 5, (ids - 5) % 280 + 6, ids)}


def test_defenses_of_texts_and_of_tokens_are_given_texts():
    assert_defense_contract(Reversed, off=lambda: Reversed(False), calls=QUICK)
    assert_defense_contract(OtherTokens, calls=QUICK)


@define
class OnTheStates(Flip):
    """Could act on embeddings and does not here."""

    embeddings: bool = False

    def on_embeddings(self, embeddings, exchange):
        return -embeddings if self.embeddings else embeddings


@define
class ManyTexts(Flip):
    def prepare(self, public_texts, data_party):
        if len(public_texts) < 16:
            raise DefenseError("ManyTexts needs at least 16 public texts")


@define
class OneAnswer(Flip):
    """Draws once for all."""

    epsilon: float = 2.0

    def guarantee(self, releases, messages=0, gradients=0):
        return Guarantee("x", epsilon=self.epsilon, delta=0.1, epsilon_per_release=2.0)


def test_honest_defenses_of_other_kinds_pass():
    assert_defense_contract(OnTheStates, calls=QUICK)
    assert_defense_contract(ManyTexts, calls=QUICK, public=[f"Text {n}." for n in range(16)])
    assert_defense_contract(OneAnswer, calls=QUICK, composes=False)
    assert_defense_contract(lambda: OneAnswer(epsilon=float("inf")), calls=QUICK)


@define
class OnlyInTraining(Flip):
    def on_smashed(self, smashed, exchange):
        return turned(smashed, self.width) if exchange.phase == "train" else smashed


@define
class OnlyTheFirstMessage(Flip):
    def on_smashed(self, smashed, exchange):
        return turned(smashed, self.width) if smashed.shape[1] > 1 else smashed


@define
class OneNumber(Flip):
    def on_smashed(self, smashed, exchange):
        out = smashed.clone()
        out[0, 0, 0] += 1
        return out

    def mechanism(self):
        return None


@define
class EvenPositions(OneNumber):
    def on_smashed(self, smashed, exchange):
        out = smashed.clone()
        out[:, ::2] += 1
        return out


@define
class Sizes(Flip):
    sizes: tuple = (1, 2)


@define
class SaysAnother(Flip):
    def mechanism(self):
        return Turned(self.width + 1)


@frozen
class Stuck(Turned):
    @torch.no_grad()
    def expected(self, hidden):
        return turned(hidden, self.width)


@define
class CannotBeClimbed(Flip):
    def mechanism(self):
        return Stuck(self.width)


@define
class ActsOnCompany(Flip):
    def on_smashed(self, smashed, exchange):
        return turned(smashed, self.width if len(smashed) == 1 else self.width + 8)

    def mechanism(self):
        return None


@define
class DrawsGlobally(Defense):
    covers = TEXT

    def on_smashed(self, smashed, exchange):
        return smashed + torch.randn_like(smashed)


@define
class Forgets(Defense):
    """Calibrates and does not say so in its state."""

    clip: float = field(default=1.0, init=False)
    covers = TEXT

    def prepare(self, public_texts, data_party):
        self.clip = 2.0

    def on_smashed(self, smashed, exchange):
        return smashed * self.clip

    def guarantee(self, releases, messages=0, gradients=0):
        return Guarantee(
            f"clip {self.clip}", epsilon=float(releases), delta=0.1, epsilon_per_release=1.0
        )


@define
class PromisesLess(Flip):
    def guarantee(self, releases, messages=0, gradients=0):
        return Guarantee("x", epsilon=1 / releases, delta=0.1, epsilon_per_release=1.0)


@define
class PromisesTheSame(Flip):
    def guarantee(self, releases, messages=0, gradients=0):
        return Guarantee("x", epsilon=1.0, delta=0.1, epsilon_per_release=1.0)


@define
class CoversNothingThatExists(Flip):
    covers = frozenset({"text"})


class Plain(Defense):
    covers = TEXT

    def on_smashed(self, smashed, exchange):
        return -smashed


@define
class Nameless(Flip):
    def on_smashed(self, smashed, exchange):
        raise DefenseError("this cannot be")


@define
class Quiet(Flip):
    """Says that it supports nothing that is tried."""

    supports = frozenset({("HT", "regression", "train")})


@define
class NeverOff(Flip):
    def on_smashed(self, smashed, exchange):
        return turned(smashed, max(self.width, 1))


@define
class Callable(Flip):
    """An option that JSON cannot hold."""

    how: object = attrs.field(factory=lambda: print)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (OnlyInTraining, r"in generate llama 2\+0 a message crossed as it was"),
        (OnlyTheFirstMessage, r"in generate llama 2\+0 a message crossed as it was"),
        (OneNumber, r"crossed as it was at \(0, 1\) of message 0"),
        (EvenPositions, r"crossed as it was at \(0, 1\) of message 0"),
        (Sizes, "a tuple comes back as a list"),
        (SaysAnother, "than its mechanism says"),
        (CannotBeClimbed, "its mechanism cannot be differentiated"),
        (ActsOnCompany, "something else to a text alone than in a batch"),
        (DrawsGlobally, "draws from the global random state"),
        (Forgets, "one with its `state` promises something else"),
        (PromisesLess, "what crosses more often is not protected better"),
        (PromisesTheSame, "the same epsilon for 64 messages as for one"),
        (CoversNothingThatExists, "what can be covered is prompt"),
        (Plain, "is no attrs class"),
        (Nameless, "says that it supports"),
        (Callable, "nothing that JSON can hold"),
        (lambda: attrs.make_class("Made", ["width"], bases=(Flip,))(4), "cannot be imported"),
        (Quiet, "holds in none of"),
    ],
)
def test_each_broken_rule_is_named(make, rule):
    with pytest.raises(AssertionError, match=rule):
        assert_defense_contract(make, calls=QUICK)


def test_a_defense_that_cannot_be_switched_off_is_named():
    with pytest.raises(AssertionError, match=r"NeverOff switched off changes what"):
        assert_defense_contract(NeverOff, off=lambda: NeverOff(0), calls=QUICK)


@define
class HidesNoLabel(Defense):
    covers = frozenset({"labels"})

    def on_gradient(self, gradient, exchange):
        return gradient


def test_labels_that_are_not_hidden_are_found():
    bert = [call for call in CALLS if call.model == "bert"]
    with pytest.raises(AssertionError, match="a gradient crossed as it was"):
        assert_defense_contract(HidesNoLabel, calls=bert)


@define
class CoversLabelsInWords(Defense):
    covers = frozenset({"labels"})
    supports = frozenset({("*", "causal-lm", "*")})


@define
class CoversGradientsInWords(Defense):
    covers = frozenset({"gradients"})


@pytest.mark.parametrize("make", [CoversLabelsInWords, CoversGradientsInWords])
def test_a_defense_that_covers_what_it_never_touches_is_found(make):
    with pytest.raises(AssertionError, match=r"in train gpt2 1.1 a gradient crossed as it was"):
        assert_defense_contract(make, calls=QUICK)


@define
class LeavesGradients(Flip):
    covers = frozenset({"gradients"})

    def on_gradient(self, gradient, exchange):
        return gradient


def test_gradients_that_are_not_changed_are_found():
    with pytest.raises(AssertionError, match="covers gradients, and in train gpt2"):
        assert_defense_contract(LeavesGradients, calls=QUICK)
