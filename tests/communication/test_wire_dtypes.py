"""What a wire dtype does to the numbers that cross, held against calculation by hand."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vflair_core import LocalChannel, Partition, ProtocolError, Transcript, split
from vflair_core.communication import codec
from vflair_core.communication.message import Crossing, Message, to_be_rounded
from vflair_core.communication.wire_dtype import WIRE_DTYPES, restored, rounded, rounded_size
from vflair_core.testing import tiny_batch, tiny_model

WIDE = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def there_and_back(tensor, wire_dtype):
    payload = rounded(tensor, wire_dtype)
    assert payload.dtype is torch.uint8
    assert payload.numel() == rounded_size(tensor.shape, wire_dtype)
    return restored(payload, tensor.shape, tensor.dtype, wire_dtype)


def crossing(tensor, role="smashed"):
    return Message("forward", "s", 0, 1, 1, "eval", (Crossing("x", role, tensor),))


def through_codec(message, wire_dtype):
    frame = codec.chunks(to_be_rounded(message, wire_dtype))
    return codec.read(frame, wire_dtype=wire_dtype)


# -- int8 --------------------------------------------------------------------------------------------------


def test_a_row_by_hand():
    row = torch.tensor([[12.7, -1.26, 0.04, 0.06, 6.35]])  # the scale is 0.1
    payload = rounded(row, "int8")
    assert payload[:4].view(torch.float32).item() == pytest.approx(0.1)
    assert payload[4:].view(torch.int8).tolist() == [127, -13, 0, 1, 64]  # 63.5 is rounded to even
    assert there_and_back(row, "int8")[0].tolist() == pytest.approx([12.7, -1.3, 0.0, 0.1, 6.4])


@settings(deadline=None)
@given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=6),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    )
)
def test_no_number_moves_by_more_than_half_a_scale_of_its_row(values):
    tensor = torch.tensor(values)
    found = there_and_back(tensor, "int8").double()
    scale = tensor.double().abs().amax(dim=-1, keepdim=True) / 127
    # Half a step, and what float32 leaves out of a scale and a product.
    allowed = scale / 2 * (1 + 1e-4) + 1e-37
    assert ((found - tensor.double()).abs() <= allowed).all()


def test_rows_have_scales_of_their_own():
    tensor = torch.tensor([[1000.0, 1.0], [0.001, 0.0005]])
    found = there_and_back(tensor, "int8")
    assert found[0].tolist() == pytest.approx([1000.0, 0.0])
    assert found[1].tolist() == pytest.approx([0.001, 64 / 127 * 0.001])


def test_rows_of_zeros_stay_zeros():
    tensor = torch.zeros(2, 3)
    tensor[1] = torch.tensor([0.0, -0.0, 5.0])
    assert torch.equal(there_and_back(tensor, "int8"), tensor)


@pytest.mark.parametrize("dtype", WIDE)
def test_what_is_not_finite_stays_what_it_is_and_leaves_the_rest_of_its_row_alone(dtype):
    nan, inf = math.nan, math.inf
    tensor = torch.tensor([[nan, inf, -inf, 126.0, -63.0], [nan, 0, 0, 0, 0], [1, 2, 3, 4, 127]])
    found = there_and_back(tensor.to(dtype), "int8")
    assert found.dtype is dtype
    assert found[0].isnan().tolist() == [True, False, False, False, False]
    assert found[0, 1:].tolist() == [inf, -inf, 126.0, -63.0]  # the scale is 1
    assert found[1].isnan().tolist() == [True, False, False, False, False]
    assert found[1, 1:].tolist() == [0, 0, 0, 0]
    assert found[2].tolist() == [1, 2, 3, 4, 127]


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 4)])
@pytest.mark.parametrize("wire_dtype", ["int8", "bfloat16"])
def test_empty_tensors_take_no_bytes(shape, wire_dtype):
    tensor = torch.empty(shape)
    assert rounded_size(shape, wire_dtype) == 0
    assert there_and_back(tensor, wire_dtype).shape == shape


def test_a_single_number_is_a_row():
    assert there_and_back(torch.tensor(-3.0), "int8").item() == pytest.approx(-3.0)
    assert rounded_size((), "int8") == 5


@pytest.mark.parametrize("dtype", WIDE)
def test_the_largest_numbers_of_a_dtype_stay_finite(dtype):
    top = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    tensor = torch.tensor([[top, -top, 0.0]], dtype=torch.float64).to(dtype)
    found = there_and_back(tensor, "int8").double()
    assert found.isfinite().all()
    assert found[0].tolist() == pytest.approx([top, -top, 0.0], rel=1e-2)


def test_what_float32_cannot_hold_is_infinite():
    tensor = torch.tensor([[1e300, -1e300, 1.0]], dtype=torch.float64)
    assert there_and_back(tensor, "int8").tolist() == [[math.inf, -math.inf, 1.0]]


def test_the_smallest_numbers_are_as_good_as_zero():
    tensor = torch.tensor([[1e-45, -1e-44, 0.0]])
    assert there_and_back(tensor, "int8").abs().max() <= 1e-43


# -- bfloat16 ----------------------------------------------------------------------------------------------


def test_bfloat16_keeps_eight_bits():
    # 1 + 2^-8 lies half way between 1 and 1 + 2^-7: rounded to even.
    tensor = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, math.inf, math.nan, -0.0, 3e38])
    found = there_and_back(tensor, "bfloat16")
    assert found[:2].tolist() == [1.0, 1 + 2**-6]
    assert found[2] == math.inf
    assert found[3].isnan()
    assert torch.signbit(found[4])
    assert found[5].item() == pytest.approx(3e38, rel=2**-8)


@settings(deadline=None)
@given(
    arrays.arrays(
        np.float32,
        (3, 4),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    )
)
def test_bfloat16_moves_no_number_by_more_than_one_part_in_256_but_those_next_to_zero(values):
    tensor = torch.tensor(values)
    moved = (there_and_back(tensor, "bfloat16") - tensor).abs()
    assert (moved <= tensor.abs() * 2**-8 + 1e-38).all()


# -- in the codec ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["structure", "weight", "disclosed", "norms", "counterpart"])
@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_only_what_is_made_of_hidden_states_is_rounded(role, wire_dtype):
    tensor = torch.randn(3, 5)
    found = through_codec(crossing(tensor, role), wire_dtype).tensors[0]
    assert torch.equal(found.tensor, tensor)
    assert found.nbytes == 60


@pytest.mark.parametrize("role", ["smashed", "returned", "hidden_grad", "smashed_grad"])
@pytest.mark.parametrize(("wire_dtype", "size"), [("float32", 60), ("bfloat16", 30), ("int8", 27)])
def test_hidden_states_and_their_gradients_are_rounded_and_counted_as_they_cross(
    role, wire_dtype, size
):
    tensor = torch.randn(3, 5)
    message = crossing(tensor, role)
    found = through_codec(message, wire_dtype).tensors[0]
    expected = tensor if wire_dtype == "float32" else there_and_back(tensor, wire_dtype)
    assert torch.equal(found.tensor, expected)
    assert found.nbytes == size == to_be_rounded(message, wire_dtype).nbytes
    assert found.tensor.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int8, torch.uint8])
def test_whole_numbers_and_flags_are_never_rounded(dtype):
    tensor = torch.tensor([[1, 0, 1]]).to(dtype)
    found = through_codec(crossing(tensor), "int8").tensors[0].tensor
    assert found.dtype is dtype
    assert torch.equal(found, tensor)


@pytest.mark.parametrize(
    ("dtype", "wire_dtype"),
    [(torch.float16, "bfloat16"), (torch.bfloat16, "bfloat16"), (torch.float64, "float32")],
)
def test_what_is_no_wider_than_the_wire_dtype_crosses_as_it_is(dtype, wire_dtype):
    tensor = torch.randn(3, 5).to(dtype)
    assert torch.equal(through_codec(crossing(tensor), wire_dtype).tensors[0].tensor, tensor)


def test_with_float32_a_frame_has_the_bytes_it_always_had():
    import msgpack

    message = crossing(torch.ones(2))
    header = msgpack.unpackb(codec.encode(message)[8:-8])
    assert header["tensors"] == [["x", "smashed", "float32", [2]]]
    assert codec.encode(to_be_rounded(message, "float32")) == codec.encode(message)


def refused(frame, wire_dtype, words):
    with pytest.raises(ProtocolError) as caught:
        codec.read([frame], wire_dtype=wire_dtype)
    assert words in str(caught.value)


def test_rounding_that_was_not_agreed_is_refused():
    message = crossing(torch.randn(3, 5))
    frames = {name: codec.encode(to_be_rounded(message, name)) for name in WIRE_DTYPES}
    refused(frames["int8"], "float32", "came rounded to int8, and the parties agreed on 'float32'")
    refused(frames["float32"], "int8", "came unrounded, and the parties agreed on 'int8'")
    refused(frames["bfloat16"], "int8", "with which it crosses rounded to int8")


def changed(message, wire_dtype, old, new):
    frame = codec.encode(to_be_rounded(message, wire_dtype))
    assert old in frame
    return frame.replace(old, new)


def test_a_wire_dtype_that_does_not_exist_is_refused_and_so_are_bytes_that_are_missing():
    message = crossing(torch.randn(3, 5))
    refused(changed(message, "int8", b"\xa4int8", b"\xa4int9"), "int8", "is not one wire dtype")
    frame = codec.encode(to_be_rounded(message, "int8"))
    refused(frame[:-1], "int8", "A frame ended after")
    refused(frame + b"x", "int8", "the frame has 1 more")


def test_scales_and_numbers_that_rounding_would_not_give_are_refused():
    frame = codec.encode(to_be_rounded(crossing(torch.ones(1, 4)), "int8"))
    start = len(frame) - 8
    for scale in (math.nan, math.inf):
        packed = np.float32(scale).tobytes()
        refused(
            frame[:start] + packed + frame[start + 4 :], "int8", "scale of a row must be finite"
        )
    refused(frame[:-1] + b"\x80", "int8", "cannot hold -128")


def test_a_shape_whose_size_overflows_is_refused():
    message = crossing(torch.empty(2, 0, 3))
    header = codec.encode(to_be_rounded(message, "int8"))[8:]
    large = header.replace(b"\x93\x02\x00\x03", b"\x93\xce\x7f\xff\xff\xff\x00\xce\x7f\xff\xff\xff")
    frame = codec.MAGIC + len(large).to_bytes(4, "little") + large
    refused(frame, "int8", "is not a shape")


# -- in a channel ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wire_dtype", "row"), [("bfloat16", 2 * 16), ("int8", 16 + 4)])
def test_both_sides_have_the_same_rounded_numbers_and_count_them_so(wire_dtype, row):
    model = tiny_model("gpt2")
    _, model_party = split(copy.deepcopy(model), Partition(1, 1))
    arrived, answered = [], []

    def handle(message):
        arrived.append(message)
        answered.append(model_party.handle(message))
        return answered[-1]

    channel = LocalChannel(handle, wire=True, wire_dtype=wire_dtype)
    party, _ = split(copy.deepcopy(model), Partition(1, 1), channel=channel)
    batch = tiny_batch(model, labels="tokens")
    with channel.tap(Transcript()) as transcript:
        party.model(**batch).loss.backward()
    sent = [r.tensor for r in transcript.messages if r.role in ("smashed", "hidden_grad")]
    came = [c.tensor for m in arrived for c in m.tensors if c.role in ("smashed", "hidden_grad")]
    assert len(sent) == len(came) == 2
    assert all(torch.equal(a, b) for a, b in zip(sent, came, strict=True))
    exact = [c.tensor for m in answered for c in m.tensors if c.role == "returned"]
    (returned,) = [r.tensor for r in transcript.messages if r.role == "returned"]
    assert torch.equal(returned, there_and_back(exact[0], wire_dtype))
    for key in (("smashed", "sent"), ("returned", "received"), ("hidden_grad", "sent")):
        assert channel.traffic[key].bytes == 3 * 7 * row


@pytest.mark.parametrize(("wire_dtype", "near"), [("bfloat16", 0.1), ("int8", 0.2)])
def test_a_rounded_round_is_near_the_exact_one_and_not_it(wire_dtype, near):
    model = tiny_model("llama")
    _, model_party = split(copy.deepcopy(model), Partition(1, 1))
    channel = LocalChannel(model_party.handle, wire=True, wire_dtype=wire_dtype)
    party, _ = split(copy.deepcopy(model), Partition(1, 1), channel=channel)
    batch = tiny_batch(model)
    expected, found = model(**batch).logits, party.model(**batch).logits
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < near * expected.norm()


def test_what_an_adversary_answers_is_rounded_too():
    from vflair_core.attacks.adversary import Tampered
    from vflair_core.communication.message import reply

    exact = torch.randn(2, 5)
    honest = LocalChannel(
        lambda m: reply(m, (Crossing("x", "returned", torch.zeros(2, 5)),)),
        wire=True,
        wire_dtype="int8",
    )
    channel = Tampered(honest, lambda _, r: reply(r, (Crossing("x", "returned", exact),)))
    (answer,) = channel.request(crossing(torch.ones(2, 5))).tensors
    assert torch.equal(answer.tensor, there_and_back(exact, "int8"))
    assert channel.traffic["returned", "received"].bytes == 2 * (5 + 4)


def test_rounding_without_the_codec_is_refused():
    with pytest.raises(ProtocolError, match=r"set wire=True"):
        LocalChannel(lambda m: m, wire_dtype="int8")
    with pytest.raises(ProtocolError, match=r"no wire dtype 'int4'"):
        LocalChannel(lambda m: m, wire=True, wire_dtype="int4")
