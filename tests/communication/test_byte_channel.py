"""A channel that carries bytes is a channel: same numbers, errors of the same class, nothing longer than agreed."""

from __future__ import annotations

import pytest
import torch

from vflair_core import (
    BusyError,
    ByteChannel,
    LocalChannel,
    Partition,
    ProtocolError,
    answer,
    split,
)
from vflair_core.testing import tiny_batch, tiny_model


class Carried(ByteChannel):
    """Carries frames to a handle in this process, and keeps them."""

    def __init__(self, handle, **options):
        super().__init__(**{k: v for k, v in options.items() if k in ("wire_dtype", "most")})
        self.handle, self.frames = handle, []
        self.there = {k: v for k, v in options.items() if k == "wire_dtype"}

    def carry(self, frame):
        self.frames.append(frame)
        reply = answer(self.handle, frame, **self.there)
        self.frames.append(reply)
        return reply


def losses(make, wire_dtype="float32"):
    model = tiny_model("llama")
    _, model_party = split(model, Partition(1, 1))
    data_party, _ = split(tiny_model("llama"), Partition(1, 1), channel=make(model_party.handle))
    batch = tiny_batch(data_party.model, labels="tokens")
    loss = data_party.model(**batch).loss
    loss.backward()
    gradients = [p.grad for p in data_party.model.parameters() if p.grad is not None]
    data_party.close()
    return loss.detach(), gradients


@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16", "int8"])
def test_what_is_carried_as_bytes_equals_what_crosses_in_one_process(wire_dtype):
    carried = losses(lambda handle: Carried(handle, wire_dtype=wire_dtype))
    local = losses(lambda handle: LocalChannel(handle, wire=True, wire_dtype=wire_dtype))
    assert torch.equal(carried[0], local[0])
    assert len(carried[1]) == len(local[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(carried[1], local[1], strict=True))


def raising(error):
    def handle(message):
        raise error

    return handle


def test_an_error_of_the_model_party_is_raised_with_its_class_and_words():
    _, model_party = split(tiny_model("llama"), Partition(1, 1))
    channel = Carried(model_party.handle)
    data_party, _ = split(tiny_model("llama"), Partition(1, 1), channel=channel)
    channel.handle = raising(BusyError("Others first."))
    with pytest.raises(BusyError, match=r"^Others first\.$"):
        data_party.model(**tiny_batch(data_party.model))


def test_what_nobody_expected_is_told_in_one_sentence(caplog):
    _, model_party = split(tiny_model("llama"), Partition(1, 1))
    channel = Carried(model_party.handle)
    data_party, _ = split(tiny_model("llama"), Partition(1, 1), channel=channel)
    channel.handle = raising(OSError("/secret/path"))
    with pytest.raises(ProtocolError, match="its log says why") as caught:
        data_party.model(**tiny_batch(data_party.model))
    assert "secret" not in str(caught.value)


def test_longer_frames_than_agreed_are_refused_on_both_sides():
    _, model_party = split(tiny_model("llama"), Partition(1, 1))
    channel = Carried(model_party.handle)
    split(tiny_model("llama"), Partition(1, 1), channel=channel)
    request, reply = channel.frames[:2]
    refused = answer(model_party.handle, request, most=len(request) - 1)
    assert refused[:1] == b"x"
    assert b"at most" in refused
    with pytest.raises(ProtocolError, match="at most"):
        split(
            tiny_model("llama"),
            Partition(1, 1),
            channel=Carried(model_party.handle, most=len(reply) - 1),
        )


def test_a_frame_that_is_none_is_answered_by_an_error():
    assert answer(raising(AssertionError), b"GET / HTTP/1.1")[:1] == b"x"


def test_a_frame_that_comes_again_is_carried_out_once():
    _, model_party = split(tiny_model("llama"), Partition(1, 1))
    channel = Carried(model_party.handle)
    data_party, _ = split(tiny_model("llama"), Partition(1, 1), channel=channel)
    data_party.model(**tiny_batch(data_party.model, labels="tokens")).loss.backward()
    request, reply = channel.frames[-2:]
    grads = [p.grad.clone() for p in model_party.parameters() if p.grad is not None]
    assert answer(model_party.handle, request) == reply
    after = [p.grad for p in model_party.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(grads, after, strict=True))
