"""A part of a checkpoint is read as it was written, or refused; after a fault the old one is there."""

from __future__ import annotations

import json
import random
import resource
import struct
import tracemalloc
import warnings

import pytest
import torch
from safetensors.torch import save_file

from vflair_core.errors import CheckpointError
from vflair_core.partition import checkpoint
from vflair_core.partition.checkpoint import read_facts, read_part, verify_part, write_part

FACTS = {"party": "data_party", "step": 3, "session": "s", "fingerprint": "f"}
TENSORS = {
    "weight": torch.arange(12.0).reshape(3, 4),
    "half": torch.ones(5, dtype=torch.bfloat16),
    "flags": torch.tensor([True, False, True]),
    "optimizer/0/step": torch.tensor(3.0),
    "random/cpu": torch.arange(40, dtype=torch.uint8),
    "none": torch.zeros(0, 7),
}


@pytest.fixture
def part(tmp_path):
    return write_part(tmp_path / "step-3" / "data_party.safetensors", TENSORS, FACTS)


def header_of(raw):
    return 8 + struct.unpack("<Q", raw[:8])[0]


def refused(path, raw):
    path.write_bytes(raw)
    for read in (read_part, verify_part):
        with pytest.raises(CheckpointError):
            read(path)


def test_a_part_comes_back_as_it_went(part):
    facts, tensors = read_part(part)
    assert facts == read_facts(part) == verify_part(part) == {**FACTS, "digest": "sha256"}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_no_flipped_bit_of_the_header_is_read(part):
    raw = part.read_bytes()
    for position in range(header_of(raw)):
        for bit in range(8):
            damaged = bytearray(raw)
            damaged[position] ^= 1 << bit
            part.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                read_part(part)


def test_no_changed_byte_of_the_content_is_read(part):
    raw = part.read_bytes()
    chosen = random.Random(0)
    for position in range(header_of(raw), len(raw)):
        damaged = bytearray(raw)
        damaged[position] ^= chosen.randrange(1, 256)
        refused(part, damaged)


def test_a_part_cut_short_or_with_more_behind_it_is_refused_wherever(part):
    raw = part.read_bytes()
    for length in range(len(raw)):
        refused(part, raw[:length])
    refused(part, raw + b"\0")


def test_facts_or_tensors_put_into_each_others_place_are_refused(part, tmp_path):
    other = write_part(
        tmp_path / "other.safetensors", TENSORS | {"weight": torch.ones(3, 4)}, FACTS
    )
    mine, theirs = part.read_bytes(), other.read_bytes()
    assert header_of(mine) == header_of(theirs)
    refused(part, mine[: header_of(mine)] + theirs[header_of(mine) :])


def rewritten(path, *, digest=None, facts=FACTS):
    """Write the tensors with a header of our own."""
    metadata = {checkpoint.KEY: json.dumps(facts)} | (
        {} if digest is None else {"vflair_digest": digest}
    )
    save_file(TENSORS, path, metadata=metadata)


def test_a_part_of_an_older_version_is_read_with_a_warning(part):
    rewritten(part)
    with pytest.warns(UserWarning, match="written by an older version and has no digest"):
        facts, _ = read_part(part)
    assert facts == FACTS


def test_a_part_that_lost_the_digest_it_should_have_is_refused(part):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewritten(part, facts={**FACTS, "digest": "sha256"})
        with pytest.raises(CheckpointError, match="is damaged"):
            read_part(part)
        rewritten(part, digest="")
        with pytest.raises(CheckpointError, match="is damaged"):
            read_part(part)


@pytest.mark.parametrize(
    "facts", [[], None, "x", 3, {}, {**FACTS, "session": 3}, {**FACTS, "party": "model_party"}]
)
def test_facts_that_are_none_are_refused(part, facts):
    rewritten(part, facts=facts)
    with pytest.raises(CheckpointError, match="its facts do not say whose part"):
        read_facts(part)


def test_the_digest_makes_no_bytes_of_a_tensor(tmp_path):
    large = torch.ones(64, 2**20, dtype=torch.uint8)
    path = write_part(tmp_path / "a.safetensors", {"a": large}, FACTS)
    tracemalloc.start()
    try:
        verify_part(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


# -- faults while one is written ------------------------------------------------------------------------


def faulty(what):
    def fail(*_, **__):
        raise OSError(28, "No space left on device", "/srv/secret/place")

    return {
        "write": ("vflair_core.partition.checkpoint.save_file", fail),
        "flush": ("vflair_core.partition.checkpoint.os.fsync", fail),
        "rename": ("pathlib.Path.replace", fail),
    }[what]


@pytest.mark.parametrize("fault", ["write", "flush", "rename"])
@pytest.mark.parametrize("before", [True, False], ids=["over an old one", "the first"])
def test_after_a_fault_the_old_part_is_there_and_no_litter(tmp_path, monkeypatch, fault, before):
    path = tmp_path / "step-3" / "model_party.safetensors"
    if before:
        write_part(path, TENSORS, FACTS)
    with monkeypatch.context() as patched:
        patched.setattr(*faulty(fault))
        with pytest.raises(
            CheckpointError, match=r"No space left on device\. .* Make room"
        ) as error:
            write_part(path, {"weight": torch.zeros(2)}, FACTS)
    assert "/" not in str(error.value).replace("step-3/model_party.safetensors", "")
    assert [p.name for p in tmp_path.rglob("*")] == (["step-3", path.name] if before else [])
    if before:
        assert read_part(path)[1].keys() == TENSORS.keys()
    write_part(path, {"weight": torch.zeros(2)}, FACTS)
    assert read_part(path)[1].keys() == {"weight"}


def test_when_the_system_refuses_to_write_more_the_old_part_is_there(part):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            write_part(part, {"weight": torch.zeros(2**20)}, FACTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(part.parent.iterdir()) == [part]
    assert read_part(part)[1].keys() == TENSORS.keys()


def test_an_interrupted_write_leaves_no_litter_either(part, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("vflair_core.partition.checkpoint.os.fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_part(part, {"weight": torch.zeros(2)}, FACTS)
    assert list(part.parent.iterdir()) == [part]
    assert read_part(part)[1].keys() == TENSORS.keys()
