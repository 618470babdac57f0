"""What every defense owes: `assert_defense_contract` tries it in training, in generation and with beams, in HT and HBT."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor

from vflair_core.communication.transcript import Transcript
from vflair_core.defenses.defense import COVERABLE, Defense
from vflair_core.errors import DefenseError
from vflair_core.experiments.honesty import company_check, mechanism_check
from vflair_core.offers import load_target, options_of, target_of
from vflair_core.tasks.task import Example
from vflair_core.testing.calls import CALLS, PUBLIC, Call, Parties, act, parties_of

if TYPE_CHECKING:
    from vflair_core.parties.data_party.party import DataParty

INSIDE = ("on_embeddings", "on_smashed")  # where what a text becomes can be changed
PLACES = (*INSIDE, "on_gradient")
PUBLIC_ROWS = tuple(f"{text} {number}" for number in range(8) for text in PUBLIC)
Make = Callable[[], Defense]


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
    tried = _Tried(make, wake, tuple(public))
    held = [call for call in calls if _see_that_it_holds(tried, call, refuses)]
    if not held:
        raise AssertionError(f"{tried.name} holds in none of {', '.join(map(str, calls))}.")
    for call in held:
        _see_that_gradients_are_hidden(tried, call)
        if off is not None:
            _see_that_it_can_be_switched_off(_Tried(off, lambda _: None, tried.public), call)
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


class _Watching(Defense):
    """Changes nothing and keeps what passes each place, with the mask of real tokens."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[Tensor, Tensor | None]]] = {place: [] for place in PLACES}

    def on_embeddings(self, embeddings: Tensor, exchange: Any) -> Tensor:
        return self._keep("on_embeddings", embeddings, exchange)

    def on_smashed(self, smashed: Tensor, exchange: Any) -> Tensor:
        return self._keep("on_smashed", smashed, exchange)

    def on_gradient(self, gradient: Tensor, exchange: Any) -> Tensor:
        return self._keep("on_gradient", gradient, exchange)

    def _keep(self, place: str, tensor: Tensor, exchange: Any) -> Tensor:
        self.seen[place].append((tensor.detach().clone(), exchange.mask))
        return tensor

    def at(self, place: str) -> list[Tensor]:
        """All that passed there, in order."""
        return [tensor for tensor, _ in self.seen[place]]


@frozen
class _Tried:
    """The defense under test: how it is made, made ready, and on what it is prepared."""

    make: Make
    wake: Callable[[Defense], None]
    public: tuple[str, ...]

    @property
    def name(self) -> str:
        return type(self.make()).__name__

    @property
    def reads(self) -> bool:
        """Whether it changes texts or tokens, so that a model is given texts and not token ids."""
        defense = self.make()
        return any(_overrides(defense, place) for place in ("on_text", "on_tokens"))

    def party(self, call: Call, *around: _Watching) -> DataParty:
        """A party with the defense, prepared, between others."""
        defense = self.make()
        inner, outer = around or (None, None)
        each = [one for one in (inner, defense, outer) if one is not None]
        party = self._cut(call, each).data_party
        self.wake(defense)
        for watching in around:
            watching.__init__()  # type: ignore[misc]  # it saw the preparation
        return party

    def bare(self, call: Call) -> _Bare:
        """Parties of the same model that nothing defends, after the same call."""
        return _bare(call, texts=self.reads)

    def covered(self, call: Call) -> Parties:
        """Parties with the defense, prepared."""
        return self._cut(call, [self.make()])

    def crossing(self, party: DataParty, call: Call) -> tuple[list[Any], list[Any]]:
        """What a call gives, and what was sent in it."""
        return _crossing(party, call, texts=self.reads)

    def _cut(self, call: Call, defenses: Sequence[Defense]) -> Parties:
        return parties_of(call.model, call.head, call.tail, defenses, public=self.public)


@frozen(eq=False)
class _Bare:
    """What a call gives and sends where nothing defends, and the parties afterwards."""

    parties: Parties
    given: list[Any]
    sent: list[Any]


@functools.cache
def _bare(call: Call, *, texts: bool) -> _Bare:
    parties = parties_of(call.model, call.head, call.tail)
    return _Bare(parties, *_crossing(parties.data_party, call, texts=texts))


def _crossing(party: DataParty, call: Call, *, texts: bool) -> tuple[list[Any], list[Any]]:
    with torch.random.fork_rng(), party.channel.tap(Transcript()) as transcript:
        given = act(party, call, texts=texts)
    return given, [record for record in transcript.messages if record.direction == "sent"]


def _supported(defense: Defense, call: Call) -> bool:
    return any(
        all(
            "*" in (asked, said) or asked == said
            for asked, said in zip(call.cell, one, strict=True)
        )
        for one in defense.supports
    )


def _overrides(defense: Defense, place: str) -> bool:
    return getattr(type(defense), place) is not getattr(Defense, place)


def _sent_as(role: str, records: Sequence[Any]) -> list[Tensor]:
    return [record.tensor for record in records if record.role == role]


def _see_that_it_holds(tried: _Tried, call: Call, refuses: Collection[str]) -> bool:
    """Whether it supports the call; then what it covers must have changed in all that crossed."""
    defense, inner, outer = tried.make(), _Watching(), _Watching()
    try:
        party = tried.party(call, inner, outer)
        _, sent = tried.crossing(party, call)
    except DefenseError as error:
        if _supported(defense, call) and call.model not in refuses:
            raise AssertionError(
                f"{tried.name} says that it supports {call.cell}, and in {call}: {error}"
            ) from error
        if tried.name not in str(error) and call.model not in refuses:
            raise AssertionError(
                f"What {tried.name} does not support is refused without its name: {error}"
            ) from error
        return False
    if not _supported(defense, call):
        raise AssertionError(
            f"{tried.name} does not support {call.cell}, and {call} went on without a word."
        )
    if {"prompt", "response"} & defense.covers:
        _see_that_text_is_hidden(tried, party, call, inner, outer, sent)
    if "gradients" in defense.covers and _overrides(defense, "on_gradient"):
        pairs = zip(inner.at("on_gradient"), outer.at("on_gradient"), strict=True)
        if call.model not in ("bert", "t5") and any(torch.equal(a, b) for a, b in pairs):
            raise AssertionError(
                f"{tried.name} covers gradients, and in {call} one crossed as it was."
            )
    return True


def _see_that_text_is_hidden(
    tried: _Tried, party: DataParty, call: Call, inner: _Watching, outer: _Watching, sent: list[Any]
) -> None:
    defense, name = tried.make(), tried.name
    places = [place for place in INSIDE if _overrides(defense, place)]
    least = 1 if call.kind == "train" else 4  # a message for each word that is written
    left = _sent_as("smashed", sent)
    if places:
        if any(
            len(inner.at(place)) < least or len(inner.at(place)) != len(outer.at(place))
            for place in places
        ):
            raise AssertionError(f"{name} in {call}: not every message reached it and came out.")
        if not all(torch.equal(a, b) for a, b in zip(outer.at("on_smashed"), left, strict=True)):
            raise AssertionError(
                f"{name} in {call}: what crossed is not what the defenses returned."
            )
        plain = [_first_plain_row(inner, outer, place) for place in places]
        if (
            all(plain)
            and not tried.reads
            and _has_weights_of(party, tried.bare(call).parties.data_party)
        ):
            raise AssertionError(
                f"{name} covers text, and in {call} a message crossed as it was {plain[-1]}."
            )
    elif tried.reads:
        rows = [Example(text, label=0) for text in PUBLIC]
        bare = tried.bare(call).parties.data_party
        ours, theirs = (each.encode(rows, max_length=32) for each in (party, bare))
        if _same_batch(ours, theirs):
            raise AssertionError(f"{name} covers text, and of {len(rows)} texts it changed none.")
    else:  # in the weights, or among rows of its own
        without = _sent_as("smashed", tried.bare(call).sent)
        if any(
            a.shape == b.shape and torch.equal(a, b) for a, b in zip(without, left, strict=False)
        ):
            raise AssertionError(f"{name} covers text, and in {call} a message crossed as it was.")


def _first_plain_row(inner: _Watching, outer: _Watching, place: str) -> str:
    """Where a row of a real token went through a place unchanged; nothing if none did."""
    pairs = zip(inner.seen[place], outer.seen[place], strict=True)
    for number, ((before, mask), (after, _)) in enumerate(pairs):
        if before.shape != after.shape:
            continue
        same = (before == after).all(-1)  # (B, T)
        if mask is not None and mask.shape == same.shape:
            same = same & mask.bool().to(same.device)
        if bool(same.any()):
            where = tuple(int(n) for n in same.nonzero()[0])
            return f"at {where} of message {number}"
    return ""


def _same_batch(one: Any, other: Any) -> bool:
    return all(
        one[key].shape == other[key].shape and torch.equal(one[key], other[key])
        for key in ("input_ids", "attention_mask")
    )


def _has_weights_of(party: DataParty, bare: DataParty) -> bool:
    """Whether the party's weights are as they were before it was prepared: else they may hide it."""
    before = dict(bare.named_parameters())
    return all(
        torch.equal(weight, before[name])
        for name, weight in party.named_parameters()
        if name in before
    )


def _see_that_gradients_are_hidden(tried: _Tried, call: Call) -> None:
    """Gradients, and labels, which are in nothing that crosses but gradients, differ from those of a bare party."""
    covers = tried.make().covers & {"labels", "gradients"}
    if not covers or call.kind != "train" or call.model == "t5":
        return
    if covers == {"gradients"} and call.model == "bert":
        return  # a pooled gradient has no row that stands for a token
    _, sent = tried.crossing(tried.party(call), call)
    ours, theirs = _sent_as("hidden_grad", sent), _sent_as("hidden_grad", tried.bare(call).sent)
    if any(a.shape == b.shape and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
        raise AssertionError(
            f"{tried.name} covers {' and '.join(sorted(covers))}, and in {call} a gradient crossed as it was."
        )


def _see_that_it_can_be_switched_off(tried: _Tried, call: Call) -> None:
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


def _see_that_it_draws_its_own_numbers(tried: _Tried, call: Call) -> None:
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


def _see_that_state_is_all(tried: _Tried, call: Call) -> None:
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


def _see_that_it_does_what_it_says(tried: _Tried, held: Sequence[Call]) -> None:
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
    tried: _Tried, call: Call, texts: Sequence[str]
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Whether what crosses of some texts is what the mechanism says, and whether it does so in company."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        party, training = tried.party(call), call.kind == "train"
        says = mechanism_check(party, texts, training=training)
        return says, company_check(party, texts, training=training)


def _see_that_its_promise_counts(tried: _Tried, call: Call, *, composes: bool) -> None:
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
    grows = (more.epsilon or 0) > one.epsilon
    if composes and "labels" not in defense.covers and 0 < one.epsilon < math.inf and not grows:
        raise AssertionError(
            f"{name} promises the same epsilon for 64 messages as for one; if it draws one answer for good, say composes=False."
        )
