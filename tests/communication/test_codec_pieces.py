"""A message in pieces: none is large, and wherever they are cut, the same comes out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vflair_core.communication import codec
from vflair_core.communication.message import Crossing, Message
from vflair_core.errors import ProtocolError


def a_message(*tensors):
    crossings = tuple(Crossing(f"t{n}", "smashed", tensor) for n, tensor in enumerate(tensors))
    return Message("forward", "s", 3, 5, 7, "train", crossings, {"a": [1, None]})


SENT = a_message(
    torch.arange(60, dtype=torch.float64).reshape(3, 20), torch.tensor([True, False, True]),
    torch.empty(0, 4), torch.tensor(2.5, dtype=torch.bfloat16),
)  # fmt: skip


def assert_same(found, sent):
    assert codec.encode(found) == codec.encode(sent)
    for one, other in zip(found.tensors, sent.tensors, strict=True):
        assert torch.equal(one.tensor, other.tensor)


@settings(max_examples=100, deadline=None)
@given(cuts=st.lists(st.integers(0, len(codec.encode(SENT))), max_size=12).map(sorted))
def test_wherever_a_frame_is_cut_the_same_message_is_read(cuts):
    frame = codec.encode(SENT)
    pieces = [frame[a:b] for a, b in zip([0, *cuts], [*cuts, len(frame)], strict=True)]
    assert_same(codec.read(pieces), SENT)


def test_large_tensors_travel_in_small_pieces_of_their_own_memory():
    large = torch.randn(700_000)  # 2.8 MB
    header, *pieces = codec.chunks(a_message(large))
    assert [len(piece) for piece in pieces] == [codec.CHUNK, codec.CHUNK, 702_848]
    assert_same(codec.read([header, *pieces]), a_message(large))
    large[0] = 7.0
    assert torch.frombuffer(bytearray(pieces[0][:4]), dtype=torch.float32)[0] == 7.0


@pytest.mark.parametrize("missing", [1, 8, 100])
def test_a_stream_that_ends_early_is_refused(missing):
    frame = codec.encode(SENT)
    with pytest.raises(ProtocolError, match=r"ended after \d+ of \d+ bytes"):
        codec.read([frame[:-missing]])


def test_a_stream_that_goes_on_is_refused():
    with pytest.raises(ProtocolError, match="the frame has 3 more"):
        codec.read([codec.encode(SENT), b"ab", b"c"])


def test_a_message_larger_than_allowed_is_refused_before_its_tensors_are_read():
    pieces = codec.chunks(a_message(torch.zeros(1000)))
    with pytest.raises(ProtocolError, match=r"describes 4\d\d\d bytes; the frame has 2000"):
        codec.read(pieces, most=2000)
    assert next(pieces) == bytes(codec.CHUNK)[:4000]
