"""A victim and a liar who replays its messages, changed, in a session of her own."""

from __future__ import annotations

import attrs
import pytest
import torch
from attrs import define

from vflair_core.communication import codec
from vflair_core.communication.message import Message
from vflair_core.errors import ProtocolError
from vflair_core.testing import tiny_batch


@define
class Victim:
    """Two honest halves, the messages of one training step, and what the model should go on giving."""

    data_party: object
    model_party: object
    batch: dict
    expected: torch.Tensor
    said: dict[str, Message]

    def forged(self, kind, *, session="mallory", tensors=None, drop=(), **changes):
        """Repeat the victim's message of this kind in another session, changed."""
        message = self.said[kind]
        meta = {
            key: value for key, value in (dict(message.meta) | changes).items() if key not in drop
        }
        tensors = message.tensors if tensors is None else tuple(tensors)
        seq = changes.pop("seq", None) if "seq" in changes else self.next_seq(session, message.seq)
        message = attrs.evolve(message, session=session, meta=meta, tensors=tensors, seq=seq)
        try:
            return codec.decode(codec.encode(message))  # as the model party would get it
        except ProtocolError:  # it would get none of this; without a wire it does
            return message

    def next_seq(self, session, otherwise):
        """The number that the next message of a session must have."""
        known = self.model_party.sessions.get(session)
        return otherwise if known is None or known.seq is None else known.seq + 1

    def refused(self, message, words=None):
        """Send a message that must be refused; the victim's next step goes on as if nothing had come."""
        with pytest.raises(ProtocolError, match=words):
            self.model_party.handle(message)
        out = self.data_party.model(**self.batch)
        assert torch.equal(out.logits, self.expected)
        out.loss.backward()


@pytest.fixture
def victim(cut):
    parties = cut("llama", wire=True)
    batch = tiny_batch(parties.whole, labels="tokens")
    said = {}

    def watch(message, direction, _seconds):
        if direction == "sent":
            said.setdefault(message.kind, message)

    with parties.data_party.channel.tap(watch):
        parties.data_party.connection.open()
        parties.data_party.model(**batch, use_cache=True).loss.backward()
    expected = parties.whole(**batch).logits
    return Victim(parties.data_party, parties.model_party, batch, expected, said)


@pytest.fixture
def mallory(victim):
    """The victim, with a second session open in which to lie."""
    victim.model_party.handle(victim.forged("open"))
    return victim
