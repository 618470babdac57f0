"""A few thousand mutated messages, the same each time; ``nox -s fuzz`` sends a million."""

from __future__ import annotations

import random

import pytest

from support.fuzzing import Fuzz, Mutator, recorded
from vflair_core.communication import codec
from vflair_core.errors import ProtocolError


@pytest.mark.slow
@pytest.mark.parametrize("trains", [False, True], ids=["weights stand", "weights are trained"])
def test_whatever_is_sent_only_our_errors_leave_and_others_go_on(tmp_path, trains):
    fuzz = Fuzz(20, tmp_path, trains=trains)
    findings = fuzz.run(1200)
    assert not findings, "\n\n".join(finding.what for finding in findings[:5])
    assert fuzz.answered > 200  # it came past the first checks,
    assert fuzz.refused > 200  # and was refused


def test_whatever_the_bytes_are_decoding_them_refuses_or_gives_a_message_that_can_be_encoded(
    tmp_path,
):
    frames = [frame for said in recorded(tmp_path) for frame in said]
    rng = random.Random(5)
    mutator, read, texts = Mutator(rng, []), 0, []
    for _ in range(6000):
        try:
            message = codec.decode(mutator.frame(rng.choice(frames)))
        except ProtocolError as error:
            texts.append(str(error))
            continue
        codec.encode(message)
        read += 1
    assert read > 500
    assert max(map(len, texts)) < 500


def harm_others(party):
    for weight in party.parameters():
        weight.data.mul_(1.01)
        return


def fail(_):
    raise KeyError("x")


def tell_of_the_host(_):
    raise ProtocolError("It lies in /home/somebody.")


@pytest.mark.parametrize("harm", [harm_others, fail, tell_of_the_host])
def test_what_must_not_be_is_found(tmp_path, harm):
    fuzz = Fuzz(1, tmp_path)
    handle = fuzz.party.handle

    def harmful(message):
        if message.session.startswith("liar") and message.kind == "release":
            harm(fuzz.party)
        return handle(message)

    fuzz.party.handle = harmful
    assert fuzz.run(300)
    assert codec.decode(fuzz.findings[0].frames[0]).kind == "open"
