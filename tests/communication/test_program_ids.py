"""The id of a program is the digest of its content, as any process would make it."""

from __future__ import annotations

import hashlib

import msgpack
import pytest

from vflair_core.communication import program
from vflair_core.communication.program import Program

VALUES = [True, 1, 1.0, False, 0, 0.0, -0.0, None, "1", float("nan")]  # many of them are equal


class Word(str):
    """A text of a class of its own."""

    __slots__ = ()


def calling_with(value):
    return Program((("module", "block", (), (("argument", ("value", value)),)),), ())


def digest(made):
    return hashlib.sha256(msgpack.packb(made.to_wire())).hexdigest()[:16]


@pytest.mark.parametrize("value", [*VALUES, Word("1")], ids=repr)
def test_the_id_is_the_digest_whatever_was_met_before(value):
    for other in VALUES:
        assert calling_with(other).id == digest(calling_with(other))
    assert calling_with(value).id == digest(calling_with(value))


def test_forgetting_ids_changes_none(monkeypatch):
    monkeypatch.setattr(program, "MAX_IDS", 2)
    monkeypatch.setattr(program, "_IDS", {})
    ids = [calling_with(number).id for number in range(5)]
    assert ids == [digest(calling_with(number)) for number in range(5)]
    assert len(program._IDS) <= 2
