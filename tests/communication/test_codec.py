"""Bytes that come back as they went; tampered ones are refused before they cost anything."""

from __future__ import annotations

import tracemalloc

import attrs
import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vflair_core.communication import codec
from vflair_core.communication.header_limits import check_packed
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
        ({"seq": 2**63}, "seq must be a whole number"),
        ({"session": "s" * 129}, "name of a session may have 128"),
        ({"tensors": [["a" * 257, "smashed", "bool", []]]}, "name of a tensor may have 256"),
        ({"tensors": [["a", "smashed", "bool", [2**30, 2]]] * 2}, "may have 2147483648 flags"),
        ({"meta": {1: 2}}, "int is not allowed for map key"),
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


def nested(value, depth):
    for _ in range(depth):
        value = [value]
    return value


BOMBS = {
    "empty lists": b"\xdd" + (2**20 - 5).to_bytes(4, "big") + b"\x90" * (2**20 - 5),
    "as many as may be": b"\xdd" + (2**18 - 1).to_bytes(4, "big") + b"\x90" * (2**18 - 1),
    "maps": b"\xdd" + (87_000).to_bytes(4, "big") + b"\x81\xa2ab\x80" * 87_000,
    "nested lists": b"\x91" * (2**20 - 1) + b"\x90",
    "nested maps": b"\x81\xa1a" * 300_000 + b"\x80",
    "claims within claims": b"\xdd\x00\x03\xff\xff" * 200_000,
    "claims in a row": (b"\xdd\x00\x03\xff\x00" * 31 + b"\x90") * 6000,
    "a list of 4 billion": b"\xdd\xff\xff\xff\xff",
    "a map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "a text of 4 GB": b"\xdb\xff\xff\xff\xff",
    "an extension of 4 GB": b"\xc9\xff\xff\xff\xff\x01",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_no_header_takes_more_than_a_small_multiple_of_the_largest(bomb):
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError) as refused:
            codec.decode(b"vfl1" + len(bomb).to_bytes(4, "little") + bomb)
        assert tracemalloc.get_traced_memory()[1] < 28 * 2**20
    finally:
        tracemalloc.stop()
    assert len(str(refused.value)) < 300


@settings(max_examples=300, deadline=None)
@given(junk=st.binary(min_size=1, max_size=60))
def test_the_limits_refuse_what_is_not_one_value_and_nothing_that_is(junk):
    try:
        value = msgpack.unpackb(junk, raw=True, strict_map_key=False)
    except (ValueError, TypeError):  # TypeError: a map's key that is itself a list or a map
        return
    if (
        not isinstance(value, (msgpack.ExtType, msgpack.Timestamp))
        and b"Ext" not in repr(value).encode()
    ):
        check_packed(junk)
    with pytest.raises(ProtocolError):
        check_packed(junk + b"\xc0")
    with pytest.raises(ProtocolError):
        check_packed(junk[:-1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"meta": {"names": ["x" * 30] * 40_000}}, "A header may have 1048576 bytes"),
        ({"meta": {"numbers": [0] * 2**18}}, "may hold 262144 values"),
        ({"meta": {"tree": nested(0, 40)}}, "may nest 32 deep"),
        ({"meta": {"tree": nested(0, 5000)}}, "cannot cross"),
        ({"meta": {"a": object()}}, "'forward' has a fact that cannot cross: can not serialize"),
        ({"meta": {"a": 2**64}}, "cannot cross"),
        ({"meta": {"a": "\ud800"}}, "cannot cross"),
        ({"meta": {1: 1}}, "int is not allowed for map key"),
        ({"session": "s" * 129}, "name of a session"),
        ({"step": -1}, "step must be"),
        ({"kind": "exec"}, "Unknown kind 'exec'"),
        ({"tensors": (Crossing("a" * 257, "smashed", torch.ones(1)),)}, "name of a tensor"),
        ({"tensors": (Crossing("a", "secret", torch.ones(1)),)}, "Unknown role 'secret'"),
        ({"tensors": (Crossing("a", "smashed", torch.ones([1] * 9)),)}, "'a': .* at most 8 dim"),
        ({"tensors": (Crossing("a", "smashed", torch.ones(1)),) * 4097}, "at most 4096"),
    ],
)
def test_what_the_other_side_would_refuse_is_refused_before_the_first_byte(changes, words):
    refused = attrs.evolve(message(), **changes)
    with pytest.raises(ProtocolError, match=words):
        next(codec.chunks(refused))


def test_tensors_for_which_there_is_no_memory_are_refused_by_name():
    lie = frame([("a", "smashed", "float64", [2**31 - 1, 2**31 - 1])])
    with pytest.raises(ProtocolError, match="no memory for the"):
        codec.read([lie], most=2**70)
