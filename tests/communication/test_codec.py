"""Bytes that come back as they went; tampered ones are refused before they cost anything."""

from __future__ import annotations

import tracemalloc

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vflair_core.communication import codec
from vflair_core.communication.message import Crossing, Message
from vflair_core.errors import ProtocolError

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
META = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats(allow_nan=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


@st.composite
def tensors(draw):
    """Any bits of any dtype that can cross, NaN payloads and negative zeros among them."""
    name, shape = draw(st.sampled_from(sorted(codec.DTYPES))), draw(SHAPES)
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = codec.DTYPES[name]
    if dtype is torch.bool:
        return torch.randint(2, shape, generator=seed).bool()
    raw = torch.randint(256, (*shape, dtype.itemsize), generator=seed, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []


def message(*some, **fields):
    crossings = tuple(Crossing(f"t{n}", "smashed", tensor) for n, tensor in enumerate(some))
    defaults = {
        "kind": "forward",
        "session": "s",
        "step": 3,
        "exchange": 5,
        "seq": 7,
        "phase": "train",
    }
    return Message(**{**defaults, **fields}, tensors=crossings)


def frame(entries, payload=b"", **changes):
    """Write a frame by hand whose header says what it likes."""
    header = {
        "kind": "forward",
        "session": "s",
        "step": 0,
        "exchange": 0,
        "seq": 0,
        "phase": "eval",
    }
    header |= {"meta": {}, "tensors": entries, **changes}
    packed = msgpack.packb(header)
    return b"vfl1" + len(packed).to_bytes(4, "little") + packed + payload


@settings(max_examples=150, deadline=None)
@given(some=st.lists(tensors(), max_size=3), meta=META)
def test_what_was_encoded_is_decoded_bit_for_bit(some, meta):
    sent = message(*some, meta=meta)
    read = codec.decode(codec.encode(sent))
    for field in ("kind", "session", "step", "exchange", "seq", "phase", "meta"):
        assert getattr(read, field) == getattr(sent, field)
    for ours, theirs in zip(read.tensors, sent.tensors, strict=True):
        assert (ours.name, ours.role) == (theirs.name, theirs.role)
        assert (ours.tensor.dtype, ours.tensor.shape) == (theirs.tensor.dtype, theirs.tensor.shape)
        assert bits(ours.tensor) == bits(theirs.tensor)


def test_views_with_gaps_and_tensors_with_a_graph_cross_by_value():
    base = torch.arange(12.0, requires_grad=True)
    gaps = (base * 2).view(3, 4).t()[::2]
    (read,) = codec.decode(codec.encode(message(gaps))).tensors
    assert torch.equal(read.tensor, gaps.detach())
    assert read.tensor.grad_fn is None


def test_a_decoded_tensor_owns_its_memory():
    raw = bytearray(codec.encode(message(torch.ones(4))))
    (read,) = codec.decode(raw).tensors
    read.tensor.zero_()
    assert torch.equal(codec.decode(raw).tensors[0].tensor, torch.ones(4))


def test_a_dtype_without_a_name_on_the_wire_is_named_in_the_refusal():
    with pytest.raises(ProtocolError, match=r"'t0' has dtype torch.float8_e5m2.*Possible: float64"):
        codec.encode(message(torch.ones(2, dtype=torch.float8_e5m2)))


@settings(max_examples=100, deadline=None)
@given(kept=st.integers(0, 10_000))
def test_a_frame_cut_short_is_refused(kept):
    whole = codec.encode(message(torch.ones(2, 3), torch.zeros(0), meta={"id": "x"}))
    with pytest.raises(ProtocolError):
        codec.decode(whole[: kept % len(whole)])


@given(extra=st.binary(min_size=1, max_size=64))
def test_a_frame_with_bytes_left_over_is_refused(extra):
    with pytest.raises(ProtocolError, match="bytes"):
        codec.decode(codec.encode(message(torch.ones(2))) + extra)


@settings(max_examples=400, deadline=None)
@given(position=st.integers(0, 10_000), value=st.integers(1, 255))
def test_a_corrupted_byte_is_refused_or_changes_nothing_but_content(position, value):
    raw = bytearray(codec.encode(message(torch.ones(2, 3), torch.ones(2) > 0, meta={"id": "x"})))
    raw[position % len(raw)] ^= value
    try:
        read = codec.decode(raw)
    except ProtocolError:
        return
    assert sum(crossing.nbytes for crossing in read.tensors) == 25
    codec.encode(read)


@settings(max_examples=200, deadline=None)
@given(junk=st.binary(max_size=200))
def test_noise_in_place_of_a_header_is_refused(junk):
    with pytest.raises(ProtocolError):
        codec.decode(b"vfl1" + len(junk).to_bytes(4, "little") + junk)


@pytest.mark.parametrize(
    "shape",
    [
        [2**40],
        [2**31, 2**31],
        [2**62, 4],  # 2**64 elements: zero in 64 bits
        [0, 2**63],
        [2**64 - 1, 0],
        [2**40, 2**40, 0],
        [-1],
        [True],
        [1.0],
        ["1"],
        [None],
        [[1]],
        [1] * 9,
        "1",
        None,
    ],
    ids=str,
)
def test_a_shape_that_lies_is_refused_before_memory_is_taken(shape):
    lie = frame([("a", "smashed", "float32", shape)])
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            codec.decode(lie)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_header_longer_than_the_limit_is_refused_unread():
    with pytest.raises(ProtocolError, match="header claims"):
        codec.decode(b"vfl1" + (codec.MAX_HEADER + 1).to_bytes(4, "little") + bytes(16))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "exec"}, "Unknown kind 'exec'. Possible: open, forward"),
        ({"kind": ["open"]}, "Unknown kind"),
        ({"phase": "night"}, "Unknown phase 'night'"),
        ({"step": -1}, "step must be a whole number"),
        ({"exchange": True}, "exchange must be a whole number"),
        ({"seq": "1"}, "seq must be a whole number"),
        ({"session": 3}, "session must be text"),
        ({"meta": []}, "meta a map"),
        ({"more": 1}, "A header must be a map with the keys"),
        ({"tensors": {}}, "tensors must be a list"),
        ({"tensors": [None]}, "A tensor entry must be"),
        ({"tensors": [["a", "smashed", "float32"]]}, "A tensor entry must be"),
        ({"tensors": [[1, "smashed", "float32", []]]}, "A tensor entry must be"),
        ({"tensors": [["a", "secret", "float32", []]]}, "Unknown role 'secret'"),
        ({"tensors": [["a", "smashed", "object", []]]}, "Unknown dtype 'object'"),
        ({"tensors": [["a", "smashed", "bool", [0]]] * 4097}, "at most 4096"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_header_that_says_what_it_must_not_is_refused_by_name(changes, words):
    with pytest.raises(ProtocolError, match=words):
        codec.decode(frame([], **changes))


def test_flags_cross_as_bits_and_the_bits_after_the_last_are_zero():
    flags = frame([("mask", "structure", "bool", [3])], b"\x05")
    assert codec.decode(flags).tensors[0].tensor.tolist() == [True, False, True]
    with pytest.raises(ProtocolError, match="bits after the last flag"):
        codec.decode(frame([("mask", "structure", "bool", [3])], b"\x0d"))
    with pytest.raises(ProtocolError, match="describes"):
        codec.decode(frame([("mask", "structure", "bool", [3])], b"\x01\x00\x01"))


def test_nothing_but_plain_values_comes_out_of_a_header():
    extension = msgpack.ExtType(5, b"payload")
    with pytest.raises(ProtocolError):
        codec.decode(frame([], meta={"id": extension}))
