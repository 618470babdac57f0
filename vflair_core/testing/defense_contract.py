"""What every defense owes: `assert_defense_contract` tries it in training, in generation and with beams, in HT and HBT."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from vflair_core.communication.transcript import Transcript
from vflair_core.defenses.defense import COVERABLE, Defense
from vflair_core.errors import DefenseError
from vflair_core.experiments.honesty import company_check, mechanism_check
from vflair_core.offers import load_target, options_of, target_of
from vflair_core.testing.calls import CALLS, PUBLIC, Call, parties_of
from vflair_core.testing.defense_hiding import see_that_gradients_are_hidden, see_that_it_holds
from vflair_core.testing.defense_under_test import Make, Tried

PUBLIC_ROWS = tuple(f"{text} {number}" for number in range(8) for text in PUBLIC)


def assert_defense_contract(
    make: Make,
    *,
    off: Make | None = None,
    wake: Callable[[Defense], None] = lambda _: None,
    calls: Sequence[Call] = CALLS,
    refuses: Collection[str] = (),
    public: Sequence[str] = PUBLIC,
    composes: bool = True,
) -> None:
    """See that a defense keeps the rules of docs/plugins.md, on small random models.

    What it covers never crosses as it was, in any of the `calls`; what it does not support is refused by its name;
    switched off it is not there, bit for bit; it draws from its own stream; an equal defense with its `state` is that
    defense, and can be built by name; its `mechanism` says what it does, and it does so in company as alone; what
    it guarantees does not shrink with what crosses.

    Args:
        make: Makes it, e.g. its class, or ``lambda: Flip(width=4)``.
        off: Makes one whose options switch it off; None where there are none.
        wake: Called with a defense after it was prepared, where it defends only once it is trained.
        calls: What is tried: training passes and generations of four architectures.
        refuses: Model types where it may refuse though it says that it supports the cell.
        public: Texts that it is prepared on; left out, four sentences.
        composes: Whether what it guarantees grows with what crosses; not so where one answer is drawn for good.

    Raises:
        AssertionError: It breaks a rule; it says which, and in what call.
    """
    _see_that_it_can_be_told(make)
    tried = Tried(make, wake, tuple(public))
    held = [call for call in calls if see_that_it_holds(tried, call, refuses)]
    if not held:
        raise AssertionError(f"{tried.name} holds in none of {', '.join(map(str, calls))}.")
    for call in held:
        see_that_gradients_are_hidden(tried, call)
        if off is not None:
            _see_that_it_can_be_switched_off(Tried(off, lambda _: None, tried.public), call)
    call = held[0]
    _see_that_it_draws_its_own_numbers(tried, call)
    _see_that_state_is_all(tried, call)
    _see_that_it_does_what_it_says(tried, held)
    _see_that_its_promise_counts(tried, call, composes=composes)


def _see_that_it_can_be_told(make: Make) -> None:
    defense = make()
    name, options = type(defense).__name__, options_of(defense)
    if not defense.covers <= set(COVERABLE):
        raise AssertionError(
            f"{name} covers {sorted(defense.covers)}: what can be covered is {', '.join(COVERABLE)}."
        )
    if options is None:
        raise AssertionError(
            f"{name} is no attrs class: nobody can build it again from its options."
        )
    try:
        again = type(defense)(**json.loads(json.dumps(options)))
    except TypeError as error:
        raise AssertionError(
            f"The options of {name} are nothing that JSON can hold: {error}."
        ) from error
    if options_of(again) != options:
        raise AssertionError(
            f"{name} built again from its options as JSON has other ones: a tuple comes back as a list, unless its field has "
            "`converter=tuple`."
        )
    target = target_of(defense)
    try:
        found = load_target(target)
    except Exception as error:
        raise AssertionError(
            f"{name} cannot be imported as {target!r} ({error}): put it at the top level of a module."
        ) from error
    if found is not type(defense):
        raise AssertionError(f"{target!r} is not {name} but something else of that name.")


def _see_that_it_can_be_switched_off(tried: Tried, call: Call) -> None:
    name, bare, covered = tried.name, tried.bare(call), tried.covered(call)
    expected, plain = bare.given, bare.sent
    ours, theirs = tried.crossing(covered.data_party, call)
    if not all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(expected, ours, strict=True)
    ):
        raise AssertionError(f"{name} switched off changes what {call} gives.")
    if len(plain) != len(theirs) or not all(
        (a.role, a.name) == (b.role, b.name) and torch.equal(a.tensor, b.tensor)
        for a, b in zip(plain, theirs, strict=True)
    ):
        raise AssertionError(f"{name} switched off changes what crosses in {call}.")
    if call.kind != "train":
        return
    for side in ("data_party", "model_party"):
        weights = dict(getattr(bare.parties, side).named_parameters())
        for weight_name, weight in getattr(covered, side).named_parameters():
            if not torch.equal(weight.grad, weights[weight_name].grad):
                raise AssertionError(
                    f"{name} switched off changes the gradient of {weight_name} in {call}."
                )


def _see_that_it_draws_its_own_numbers(tried: Tried, call: Call) -> None:
    """Two equal parties send the same, whatever the global generator gives meanwhile."""
    if tried.reads:
        return  # what is drawn for words is the business of encode
    sent = []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(0)  # what it trains while it is prepared may begin with these
            party = tried.party(call)
            party.model.eval()
            torch.manual_seed(seed)
            ids = torch.arange(8, 20)[None]
            # A model that is not trained draws nothing by itself.
            with (
                party.public_text(),
                party.answering(),
                party.channel.tap(Transcript()) as transcript,
            ):
                more = {"decoder_input_ids": ids} if call.model == "t5" else {}
                try:
                    party.model(input_ids=ids, **more)
                except DefenseError:
                    return  # it does not support a forward pass alone
        sent.append([r.tensor for r in transcript.messages if r.direction == "sent"])
    if not all(torch.equal(a, b) for a, b in zip(*sent, strict=True)):
        raise AssertionError(
            f"{tried.name} draws from the global random state: draw from `exchange.generator`."
        )


def _see_that_state_is_all(tried: Tried, call: Call) -> None:
    trained, fresh, name = tried.make(), tried.make(), tried.name
    parties_of(call.model, call.head, call.tail, [trained], public=tried.public)
    fresh.load_state(copy.deepcopy(trained.state()))
    first, second = trained.state(), fresh.state()
    if first.keys() != second.keys() or not all(
        torch.equal(first[key], second[key]) for key in first
    ):
        raise AssertionError(f"{name}: `load_state` of what `state` returned gives another state.")
    if str(trained.guarantee(3)) != str(fresh.guarantee(3)):
        raise AssertionError(f"{name}: one with its `state` promises something else than it does.")
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    ours, theirs = trained.mechanism(), fresh.mechanism()
    if type(ours) is not type(theirs):
        raise AssertionError(f"{name}: one with its `state` has another mechanism.")
    if ours is None or theirs is None:
        return
    for asked in (lambda m: m.expected(hidden), lambda m: m.log_likelihood(hidden, hidden[0])):
        if not torch.equal(asked(ours), asked(theirs)):
            raise AssertionError(
                f"{name}: the mechanism of one with its `state` answers otherwise."
            )
    climbed = hidden.clone().requires_grad_()
    for told in (ours.expected(climbed), ours.log_likelihood(hidden, climbed)):
        if not told.requires_grad:
            raise AssertionError(
                f"{name}: its mechanism cannot be differentiated, and attackers who climb along it could not begin: "
                "take no_grad away, or let the gradient pass through a step."
            )
    if ours.log_likelihood(hidden, hidden).shape != (5,):
        raise AssertionError(f"{name}: its mechanism's likelihood of (5, D) is not of shape (5,).")


def _see_that_it_does_what_it_says(tried: Tried, held: Sequence[Call]) -> None:
    name = tried.name
    for call in held:
        if str(call) not in ("train gpt2 1+1", "generate llama 2+0"):
            continue
        each = [_says_and_does(tried, call, PUBLIC_ROWS[first::2]) for first in range(2)]
        says, agrees = (
            max(chance, key=lambda c: c["p"]) if all(chance) else None
            for chance in zip(*each, strict=True)
        )
        if says is not None and not says["matches"]:
            raise AssertionError(
                f"{name} sends something else in {call} than its mechanism says (p = {says['p']:.3g})."
            )
        if agrees is not None and not agrees["agrees"]:
            raise AssertionError(
                f"{name} does something else to a text alone than in a batch (p = {agrees['p']:.3g})."
            )


def _says_and_does(
    tried: Tried, call: Call, texts: Sequence[str]
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Whether what crosses of some texts is what the mechanism says, and whether it does so in company."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        party, training = tried.party(call), call.kind == "train"
        says = mechanism_check(party, texts, training=training)
        return says, company_check(party, texts, training=training)


def _see_that_its_promise_counts(tried: Tried, call: Call, *, composes: bool) -> None:
    defense, name = tried.make(), tried.name
    parties_of(call.model, call.head, call.tail, [defense], public=tried.public)
    one = defense.guarantee(1, 1, 1)
    if one.epsilon is None:
        if one.mechanism is not None:
            raise AssertionError(f"{name} names a mechanism and promises no epsilon.")
        return
    if one.epsilon < 0 or not one.mechanism:
        raise AssertionError(f"{name} promises epsilon {one.epsilon} of {one.mechanism!r}.")
    longer, more = defense.guarantee(8, 1, 1), defense.guarantee(64, 64, 64)
    if not one.epsilon <= (longer.epsilon or 0) <= (more.epsilon or 0):
        raise AssertionError(
            f"{name} promises {one.epsilon} for one row, {longer.epsilon} for eight in one message, {more.epsilon} for 64 in "
            "64: what crosses more often is not protected better."
        )
    unsaid, most = defense.guarantee(8), defense.guarantee(8, 8, 8)
    if (unsaid.epsilon or 0) < (most.epsilon or 0):
        raise AssertionError(
            f"{name} promises {unsaid.epsilon} for eight rows when nothing is said of messages and gradients, and {most.epsilon} "
            "for eight of each: what is not known counts as the most that it can be."
        )
    grows = (more.epsilon or 0) > one.epsilon
    if composes and "labels" not in defense.covers and 0 < one.epsilon < math.inf and not grows:
        raise AssertionError(
            f"{name} promises the same epsilon for 64 messages as for one; if it draws one answer for good, say composes=False."
        )
