"""A model party that lies in its replies, one thing at a time: each lie is refused by name, and nothing of it is kept."""

from __future__ import annotations

import re
from types import SimpleNamespace

import attrs
import pytest
import torch
from transformers import DynamicCache

from vflair_core import FineTuning, Train
from vflair_core.communication.cache_kinds import cache_argument
from vflair_core.communication.channel import Channel
from vflair_core.communication.message import Crossing
from vflair_core.communication.replies import check_reply
from vflair_core.errors import ProtocolError
from vflair_core.testing import tiny_batch


class Liar(Channel):
    """Brings honest replies, but those of one kind as `lie` changes them."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.kind, self.lie = inner, None, None

    def deliver(self, message):
        honest = self.inner.deliver(message)
        return self.lie(honest) if message.kind == self.kind else honest


@pytest.fixture
def told(cut, tmp_path):
    """A run across the cut, after one step, whose model party will lie."""
    parties = cut("gpt2", 1, 1, wire=True)
    parties.model_party.checkpoints = tmp_path / "model"
    run = FineTuning(parties.data_party, Train(steps=9, learning_rate=0.01))
    batch = tiny_batch(parties.whole, labels="tokens")
    run.step(batch)
    liar = parties.data_party.connection.channel = Liar(parties.data_party.channel)
    party = parties.data_party
    do = {
        "open": lambda: party.open({"name": "adamw", "lr": 0.01, "weight_decay": 0.0}),
        "facts": party.connection.facts,
        "save": lambda: run.save(tmp_path / "data"),
        "close": party.close,
        "release": lambda: party.connection.request("release"),
        "commit": lambda: run.step(batch),
        "norms": lambda: run.step(batch),
        "forward": lambda: run.step(batch),
        "backward": lambda: run.step(batch),
    }
    return SimpleNamespace(
        party=party, run=run, liar=liar, do=do, folder=tmp_path, batch=batch, parties=parties
    )


def state_of(told):
    weights = {name: weight.clone() for name, weight in told.party.named_parameters()}
    moments = told.run.optimizer.state_dict()["state"]
    kept = {
        f"{n}/{key}": value.clone() for n, each in moments.items() for key, value in each.items()
    }
    session = told.party.connection.session
    return told.party.step, session, list(told.folder.glob("data/*")), weights | kept


def refused(told, kind, lie, words):
    """Let the model party lie in its reply to `kind`: the lie is named, and the data party is as before."""
    before = state_of(told)
    told.liar.kind, told.liar.lie = kind, lie
    with pytest.raises(ProtocolError, match=words) as error:
        told.do[kind]()
    assert "due" in str(error.value)
    assert len(str(error.value)) < 500
    *facts, tensors = state_of(told)
    assert facts == list(before[:-1])
    assert tensors.keys() == before[-1].keys()
    assert all(torch.equal(tensors[name], before[-1][name]) for name in tensors)


KINDS = ["open", "facts", "norms", "forward", "backward", "commit", "save", "release", "close"]
EXTRA = Crossing("more", "weight", torch.ones(1))
GENERAL = {
    "kind": ({"kind": "prepare"}, r"with kind 'prepare' where kind '\w+' was due"),
    "step": ({"step": 7}, r"with step 7 where step \d was due"),
    "exchange": ({"exchange": 99}, r"with exchange 99 where exchange \d was due"),
    "seq": ({"seq": 1}, r"with seq 1 where seq \d+ was due"),
    "seq of another type": ({"seq": True}, r"with seq True where seq"),
    "phase": ({"phase": "night"}, "with phase 'night' where phase"),
    "session": ({"session": "mallory"}, "with session 'mallory' where session"),
    "no session": ({"session": ""}, "with session '' where"),
    "a long session": ({"session": "s" * 10**6}, "with session 'sss.* where"),
    "facts": ({"meta": ["x" * 10**6]}, r"facts that are \['xxx.* where a map"),
    "tensors": ({"tensors": (EXTRA,)}, "as 'weight' 'more' where"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_reply_to_something_else_is_refused(told, kind):
    refused(
        told, kind, lambda honest: attrs.evolve(honest, seq=1), r"with seq 1 where seq \d+ was due"
    )


def test_nothing_that_every_reply_has_can_be_another(told):
    pairs = {}
    with told.liar.tap(lambda message, way, _: pairs.setdefault(message.kind, []).append(message)):
        for kind in ("facts", "forward", "save", "release", "open", "close"):
            told.do[kind]()
    assert pairs.keys() == set(KINDS)
    for kind, (message, honest, *_) in pairs.items():
        check_reply(message, honest)
        for lie, (changes, words) in GENERAL.items():
            if (kind, lie) != ("open", "session"):  # which the model party may give another name
                with pytest.raises(ProtocolError, match=words) as error:
                    check_reply(message, attrs.evolve(honest, **changes))
                assert len(str(error.value)) < 500


def facts(**changes):
    return lambda honest: attrs.evolve(honest, meta={**honest.meta, **changes})


def without(name):
    return lambda honest: attrs.evolve(
        honest, meta={key: value for key, value in honest.meta.items() if key != name}
    )


def tensors(change):
    return lambda honest: attrs.evolve(honest, tensors=tuple(change(list(honest.tensors))))


def value(change):
    """Change the first tensor of a reply."""
    return tensors(lambda all_: [attrs.evolve(all_[0], tensor=change(all_[0].tensor)), *all_[1:]])


def first(**changes):
    return tensors(lambda all_: [attrs.evolve(all_[0], **changes), *all_[1:]])


LIES = [
    ("forward", without("live"), "where the fact 'live' was due"),
    ("forward", facts(live=[]), r"live \[\] where true or false for each of 1 tensors"),
    ("forward", facts(live=[1]), r"live \[1\]"),
    ("forward", facts(live="y"), "live 'y'"),
    ("forward", facts(live=[True] * 10**5), r"live \[True, True, .* where"),
    ("forward", facts(live=[False]), "nothing a gradient goes back through where some, for 1"),
    ("forward", tensors(lambda all_: []), "live .* where true or false for each of 0"),
    (
        "forward",
        lambda honest: attrs.evolve(honest, tensors=honest.tensors * 2, meta={"live": [True] * 2}),
        "with 2 tensors where 1 were due",
    ),
    (
        "forward",
        value(lambda t: t[:, :-1]),
        r"with returned returned \(3, 6, 16\) torch.float32 where returned returned \(3, 7, 16\)",
    ),
    ("forward", value(lambda t: t[0]), r"\(7, 16\) torch.float32 where"),
    ("forward", value(lambda t: t.double()), "torch.float64 where .* torch.float32 was due"),
    ("forward", value(lambda t: t.long()), r"tensor 0 \(torch.int64\) with a gradient"),
    ("forward", first(role="smashed"), "tensor 0 as 'smashed' 'returned' where returned"),
    ("forward", first(name="x" * 10**6), "tensor 0 as 'returned' 'xxx"),
    ("backward", tensors(lambda all_: []), "with 0 tensors where 1 were due"),
    ("backward", tensors(lambda all_: all_ * 2), "with 2 tensors where 1 were due"),
    ("backward", value(lambda t: t.sum(0)), r"\(7, 16\) .* where smashed_grad .* \(3, 7, 16\)"),
    ("backward", value(lambda t: t.half()), "torch.float16 where .* torch.float32 was due"),
    ("backward", first(role="returned"), "as 'returned' 'smashed_grad' where smashed_grad"),
    ("norms", without("names"), "where the fact 'names' was due"),
    ("norms", facts(names="ab"), "names 'ab' where a list of names"),
    ("norms", facts(names=[1]), r"names \[1\] where a list of names"),
    ("norms", facts(names=["a"]), r"where a norm for each of 1 names"),
    ("norms", lambda m: facts(names=["a"] * len(m.meta["names"]))(m), "'a' twice in names"),
    ("norms", tensors(lambda all_: []), "with 0 tensors where one was due"),
    ("norms", tensors(lambda all_: all_ * 2), "with 2 tensors where one was due"),
    ("norms", value(lambda t: t[:-1]), "where a norm for each of"),
    ("norms", value(lambda t: t[None]), "where a norm for each of"),
    ("norms", value(lambda t: t.long()), "torch.int64 where a norm for each"),
    ("norms", value(lambda t: -t - 1), "with a norm of -.* where none below 0"),
    ("norms", value(lambda t: -t * torch.inf), "with a norm of -.* where none below 0"),
    ("facts", without("keeps"), "where the fact 'keeps' was due"),
    ("facts", facts(keeps=1), "keeps 1 where true or false"),
    ("facts", facts(trainable=None), "trainable None where a list of names"),
    ("facts", facts(trainable=["a", "a"]), "'a' twice in trainable"),
    ("open", without("step"), "where the fact 'step' was due"),
    ("open", facts(step=5), r"step 5 where one of the steps \[1\]"),
    ("open", facts(step=True), "step True where"),
    ("open", facts(step=1.0), "step 1.0 where"),
    ("open", without("moved"), "where the fact 'moved' was due"),
    ("open", facts(moved=-1), "moved -1 where a number of steps"),
    ("open", facts(moved="many"), "moved 'many' where"),
]


@pytest.mark.parametrize(("kind", "lie", "words"), LIES, ids=range(len(LIES)))
def test_a_reply_that_lies_about_tensors_or_facts_is_refused(told, kind, lie, words):
    refused(told, kind, lie, words)


def test_a_gradient_where_none_was_asked_for_is_refused(told):
    told.liar.kind, told.liar.lie = "forward", facts(live=[True])
    with torch.no_grad(), pytest.raises(ProtocolError, match="with a gradient where none"):
        told.party.model(**told.batch)


def test_norms_that_overflowed_are_no_lie(told):
    told.liar.kind, told.liar.lie = "norms", value(lambda t: t * torch.inf)
    told.run.step(told.batch)
    assert told.party.step == 2  # which both parties skipped
    told.liar.lie = value(lambda t: t * torch.nan)
    told.run.step(told.batch)
    assert told.party.step == 3


def test_a_step_of_another_run_is_refused_when_one_is_resumed(told):
    told.do["save"]()
    told.liar.kind, told.liar.lie = "open", facts(step=4)
    before = state_of(told)
    with pytest.raises(ProtocolError, match=re.escape("step 4 where one of the steps [1] was due")):
        told.run.load(told.folder / "data")
    assert state_of(told)[:2] == before[:2]


def test_the_name_that_the_model_party_gives_a_session_is_taken_over(told):
    honest, names = told.parties.model_party.handle, []

    class Renaming(Channel):
        """Issues a name for each session, as a server does."""

        def deliver(self, message):
            names.append(message.session)
            name = "issued" if message.kind == "open" else message.session
            return honest(attrs.evolve(message, session=name))

    told.party.connection.channel = Renaming()
    told.do["open"]()
    assert told.party.connection.session == "issued"
    told.do["facts"]()
    assert names[1:] == ["issued"]


@pytest.mark.parametrize("change", [lambda t: t[:, :, :-1], lambda t: t.double()])
def test_a_cache_that_a_lie_was_to_fill_is_not_used_further(told, change):
    model, words = told.party.model.eval(), told.batch["input_ids"]
    told.liar.kind, told.liar.lie = "forward", value(change)
    cache = DynamicCache()
    with torch.no_grad():
        with pytest.raises(ProtocolError, match="was due"):
            model(words, **{cache_argument(model): cache})
        with pytest.raises(ProtocolError, match="halves are not alike any more"):
            model(words, **{cache_argument(model): cache})
        told.liar.kind = None
        expected = told.parties.data_party.model(words, use_cache=False).logits
        again = model(words, **{cache_argument(model): DynamicCache()}).logits
    assert torch.equal(again, expected)


def test_after_a_lie_the_honest_model_party_goes_on(told):
    told.liar.kind, told.liar.lie = "forward", value(lambda t: t[:, :-1])
    with pytest.raises(ProtocolError):
        told.do["forward"]()
    told.liar.kind = None
    with torch.no_grad():
        told.party.model(**told.batch)
    session = told.parties.model_party.sessions[told.party.connection.session]
    assert not session.graphs  # the one of the refused answer was given back
    told.run.step(told.batch)
    assert told.party.step == 2


def test_replies_of_the_next_party_of_a_chain_are_checked_too(cut):
    from vflair_core import divide

    parties = cut("gpt2", 1, 1)
    divide(parties.model_party, 1)
    liar = Liar(parties.model_party.onward)
    parties.data_party.open()
    (session,) = parties.model_party.sessions.values()
    session.onward.connection.channel = liar
    liar.kind, liar.lie = "forward", facts(live="y")
    with pytest.raises(ProtocolError, match="live 'y' where"):
        parties.data_party.model(**tiny_batch(parties.whole))
