"""What a defense covers never crosses as it was: texts by their rows, gradients, and labels in them."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch

from vflair_core.errors import DefenseError
from vflair_core.tasks.task import Example
from vflair_core.testing.calls import PUBLIC, Call
from vflair_core.testing.defense_under_test import (
    INSIDE,
    Tried,
    Watching,
    overrides,
    sent_as,
    supported,
)

if TYPE_CHECKING:
    from vflair_core.parties.data_party.party import DataParty


def see_that_it_holds(tried: Tried, call: Call, refuses: Collection[str]) -> bool:
    """Whether it supports the call; then what it covers must have changed in all that crossed."""
    defense, inner, outer = tried.make(), Watching(), Watching()
    try:
        party = tried.party(call, inner, outer)
        _, sent = tried.crossing(party, call)
    except DefenseError as error:
        if supported(defense, call) and call.model not in refuses:
            raise AssertionError(
                f"{tried.name} says that it supports {call.cell}, and in {call}: {error}"
            ) from error
        if tried.name not in str(error) and call.model not in refuses:
            raise AssertionError(
                f"What {tried.name} does not support is refused without its name: {error}"
            ) from error
        return False
    if not supported(defense, call):
        raise AssertionError(
            f"{tried.name} does not support {call.cell}, and {call} went on without a word."
        )
    if {"prompt", "response"} & defense.covers:
        _see_that_text_is_hidden(tried, party, call, inner, outer, sent)
    if "gradients" in defense.covers and overrides(defense, "on_gradient"):
        pairs = zip(inner.at("on_gradient"), outer.at("on_gradient"), strict=True)
        if call.model not in ("bert", "t5") and any(torch.equal(a, b) for a, b in pairs):
            raise AssertionError(
                f"{tried.name} covers gradients, and in {call} one crossed as it was."
            )
    return True


def _see_that_text_is_hidden(
    tried: Tried, party: DataParty, call: Call, inner: Watching, outer: Watching, sent: list[Any]
) -> None:
    defense, name = tried.make(), tried.name
    places = [place for place in INSIDE if overrides(defense, place)]
    least = 1 if call.kind == "train" else 4  # a message for each word that is written
    left = sent_as("smashed", sent)
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
        without = sent_as("smashed", tried.bare(call).sent)
        if any(
            a.shape == b.shape and torch.equal(a, b) for a, b in zip(without, left, strict=False)
        ):
            raise AssertionError(f"{name} covers text, and in {call} a message crossed as it was.")


def _first_plain_row(inner: Watching, outer: Watching, place: str) -> str:
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


def see_that_gradients_are_hidden(tried: Tried, call: Call) -> None:
    """Gradients, and labels, which are in nothing that crosses but gradients, differ from those of a bare party."""
    covers = tried.make().covers & {"labels", "gradients"}
    if not covers or call.kind != "train" or call.model == "t5":
        return
    if covers == {"gradients"} and call.model == "bert":
        return  # a pooled gradient has no row that stands for a token
    _, sent = tried.crossing(tried.party(call), call)
    ours, theirs = sent_as("hidden_grad", sent), sent_as("hidden_grad", tried.bare(call).sent)
    if any(a.shape == b.shape and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
        raise AssertionError(
            f"{tried.name} covers {' and '.join(sorted(covers))}, and in {call} a gradient crossed as it was."
        )
