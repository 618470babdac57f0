"""The victims of an experiment: their messages, one example at a time, and what really was in them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vflair_core.channel import Transcript
from vflair_core.data_party import DataParty
from vflair_core.encoding import private_positions
from vflair_core.grading import Truth
from vflair_core.task import Example


def record_victims(
    party: DataParty,
    examples: Sequence[Example],
    *,
    max_length: int,
    releases: int = 1,
    gradients: bool,
    bypass: bool = False,
) -> Transcript:
    """Send each example across alone, `releases` times over, and return what crossed.

    With `gradients` each is a training round whose step is skipped on both sides; without, an inference.
    """
    party.defenses.bypassed, was_training = bypass, party.model.training
    party.model.train(gradients)
    try:
        with party.channel.tap(Transcript()) as transcript:
            for _ in range(releases):
                for example in examples:
                    _send(party, example, max_length, gradients=gradients)
    finally:
        party.defenses.bypassed = False
        party.model.train(was_training)
        party.model.zero_grad(set_to_none=True)
    return transcript


def _send(party: DataParty, example: Example, max_length: int, *, gradients: bool) -> None:
    batch = party.encode([example], max_length=max_length)
    if not gradients:
        with torch.no_grad():
            party.model(**batch, use_cache=False)
        return
    party.model(**batch, use_cache=False).loss.backward()
    # A round whose step is skipped: both parties drop its gradients.
    party.line.commit(scale=None, rate=0.0, skip=True)


def truth_of(party: DataParty, examples: Sequence[Example], max_length: int) -> Truth:
    """Return what really was there, for grading only; it never leaves this process."""
    pairs = [private_positions(party.tokenizer, example, max_length) for example in examples]  # type: ignore[arg-type]
    labels = [example.label for example in examples]
    whole = all(isinstance(label, int) for label in labels)
    return Truth(
        [ids for ids, _ in pairs],
        [private for _, private in pairs],
        [example.text for example in examples],
        [
            _kept_secrets(party, example, len(ids))
            for example, (ids, _) in zip(examples, pairs, strict=True)
        ],
        torch.tensor(labels) if whole else None,
    )


def _kept_secrets(party: DataParty, example: Example, count: int) -> tuple[str, ...]:
    """The secrets that the first `count` tokens hold whole: nobody can recover what did not cross."""
    offsets = party.tokenizer(example.text, return_offsets_mapping=True)["offset_mapping"]  # type: ignore[misc]
    end = max(right for _, right in offsets[:count])
    return tuple(example.text[left:right] for left, right in example.private or () if right <= end)
