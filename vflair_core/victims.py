"""The victims of an experiment: their messages, one example at a time, and what really was in them."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from attrs import field, frozen
from torch import Tensor

from vflair_core.attacks.observables import Spot
from vflair_core.communication.channel import Transcript
from vflair_core.defenses.defense import Batch
from vflair_core.errors import ExperimentError
from vflair_core.experiments.grading.truth import Truth
from vflair_core.parties.data_party.party import DataParty
from vflair_core.parties.data_party.text import reader_of
from vflair_core.tasks.preprocessor import Reader
from vflair_core.tasks.task import Example
from vflair_core.tasks.tokenization import Row, Tally


@frozen(eq=False)
class Crossed:
    """What crossed of the victims, and the row of each as it was sent (the first time).

    `spots` has where each is in its messages, release after release. `updates` are the gradients of the data party's
    weights, by name, for each victim or each batch of victims.
    """

    transcript: Transcript
    rows: list[Row]
    spots: list[Spot]
    updates: list[dict[str, Tensor]] = field(factory=list)


def record_victims(
    party: DataParty,
    examples: Sequence[Example],
    *,
    max_length: int,
    companions: Sequence[Sequence[Example]] = (),
    releases: int = 1,
    gradients: bool,
    bypass: bool = False,
    in_prompt: bool = True,
    updates: bool = False,
) -> Crossed:
    """Send each example across in a batch of its own, `releases` times over, and return what crossed.

    An example crosses as one row: of a passage in several windows the first crosses; its `companions`, if any, fill the
    batch. With `gradients` each batch is a training round whose step is skipped on both sides; without, an inference. Without `in_prompt` texts cross as
    they are, not in the task's prompt. With `updates` the gradients of the data party's weights are kept.
    """
    party.defenses.bypassed, was_training = bypass, party.model.training
    party.model.train(gradients)
    reader, rows, spots = reader_of(party, max_length), list[Row](), list[Spot]()
    others = companions or [()] * len(examples)
    kept: list[dict[str, Tensor]] = []
    if not in_prompt:
        reader = attrs.evolve(reader, reading=attrs.evolve(reader.reading, render=None))
    try:
        with party.channel.tap(Transcript()) as transcript:
            for _ in range(releases):
                for example, beside in zip(examples, others, strict=True):
                    encoded = reader.batch([example, *beside], first_only=True)
                    _send(party, encoded.batch, gradients=gradients, keep=kept if updates else None)
                    rows.append(encoded.rows[0])
                    spots.append(_spot(party, encoded.rows, transcript))
    finally:
        party.defenses.bypassed = False
        party.model.train(was_training)
        party.model.zero_grad(set_to_none=True)
    return Crossed(transcript, rows[: len(examples)], spots, kept[: len(examples)])


def _spot(party: DataParty, rows: Sequence[Row], transcript: Transcript) -> Spot:
    """Where the first row of the batch that was sent last is in its messages."""
    sent = party.sent
    assert sent is not None  # the batch was sent
    if len(rows) > 1:
        smashed = next(r.tensor for r in reversed(transcript.messages) if r.role == "smashed")
        if len(smashed) != len(sent.learnt):
            raise ExperimentError(
                f"{type(party.model).__name__} sends {len(sent.learnt)} rows in a tensor of shape {tuple(smashed.shape)}, "
                "so a victim's own row is not known. Set victims.companions = 0."
            )
    padding = max(len(row.ids) for row in rows) - len(rows[0].ids)
    # Who has no label has no gradient either, and no share that could be told.
    return Spot(int(sent.places[0]), padding, float(sent.shares[0]) or 1.0)


def record_updates(
    party: DataParty, rows: Sequence[Row], size: int, *, max_length: int, bypass: bool = False
) -> list[dict[str, Tensor]]:
    """Send the victims' rows once more, `size` in a batch, and return the gradients of the data party's weights.

    Each batch is a training round as in fine-tuning, padded, its loss the one that the model gives for a batch, whose
    step is skipped. The texts are those that crossed before, as text defenses left them then; what other defenses draw
    is drawn anew. The messages of these rounds are nobody's to attack: the same rows crossed alone.
    """
    reader, kept = reader_of(party, max_length), list[dict[str, Tensor]]()
    party.defenses.bypassed, was_training = bypass, party.model.training
    party.model.train()
    try:
        for first in range(0, len(rows), size):
            batch = reader.together(rows[first : first + size]).batch
            _send(party, batch, gradients=True, keep=kept)
    finally:
        party.defenses.bypassed = False
        party.model.train(was_training)
        party.model.zero_grad(set_to_none=True)
    return kept


def _send(
    party: DataParty, batch: Batch, *, gradients: bool, keep: list[dict[str, Tensor]] | None
) -> None:
    if not gradients:
        with torch.no_grad():
            party.model(**batch, use_cache=False)
        return
    party.model.zero_grad(set_to_none=True)
    party.model(**batch, use_cache=False).loss.backward()
    if keep is not None:
        weights = party.model.named_parameters()
        keep.append({n: w.grad.clone() for n, w in weights if w.grad is not None})
    # A round whose step is skipped: both parties drop its gradients.
    party.line.commit(scale=None, rate=0.0, skip=True)


def truth_of(
    party: DataParty,
    examples: Sequence[Example],
    rows: Sequence[Row],
    max_length: int,
    *,
    known: int = 0,
    members: Tensor | None = None,
) -> Truth:
    """Return what really was there, for grading only; it never leaves this process.

    Positions are those of the rows that were sent. The secrets are the original ones, as they would have been sent
    if no defense had changed the text: who blanks a name must not have it count as never there.
    """
    reading = attrs.evolve(reader_of(party, max_length).reading, tally=Tally())
    plain = Reader(party.tokenizer, reading, max_length)  # type: ignore[arg-type]
    untouched = [plain.batch([example], first_only=True).rows[0] for example in examples]
    labels = [example.label for example in examples]
    whole = all(isinstance(label, int) for label in labels)
    return Truth(
        [torch.tensor(row.ids) for row in rows],
        [torch.tensor(row.private) for row in rows],
        [_text(example) for example in examples],
        [_kept_secrets(row) for row in untouched],
        torch.tensor(labels) if whole else None,
        answers=[_answer(row) for row in rows],
        known=frozenset(range(known)),
        members=members,
        originals=_originals(rows, untouched),
    )


def _originals(rows: Sequence[Row], untouched: Sequence[Row]) -> list[Tensor]:
    """The private tokens before any defense changed the text; none if no text was changed."""
    if all(sent.ids == plain.ids for sent, plain in zip(rows, untouched, strict=True)):
        return []
    return [torch.tensor(row.ids)[torch.tensor(row.private)] for row in untouched]


def _answer(row: Row) -> Tensor:
    """Which positions of a row hold the answer that it continues with: its last ones, or none."""
    continues = bool(row.target) and row.ids[-len(row.target) :] == row.target
    there = torch.zeros(len(row.ids), dtype=torch.bool)
    there[len(row.ids) - len(row.target) * continues :] = True
    return there


def _text(example: Example) -> str:
    return example.text if example.pair is None else f"{example.text}\n{example.pair}"


def _kept_secrets(row: Row) -> tuple[str, ...]:
    """The secrets that the row holds whole: nobody can recover what did not cross."""
    kept = []
    texts = (row.example.text, row.example.pair or "")
    for sequence, spans in enumerate((row.example.private, row.example.private_pair)):
        there = [
            offset
            for offset, own in zip(row.offsets, row.sequences, strict=True)
            if own == sequence
        ]
        for left, right in spans or ():
            if _covers(there, left, right, texts[sequence]):
                kept.append(texts[sequence][left:right])
    return tuple(kept)


def _covers(offsets: Sequence[tuple[int, int]], left: int, right: int, text: str) -> bool:
    reached = left
    for start, end in sorted(offsets):
        if start <= reached or not text[reached:start].strip():  # tokenizers may leave spaces out
            reached = max(reached, end)
        if reached >= right:
            return True
    return False
