"""Let the victims of an arm cross: for the attacks, some once more undefended, public queries, batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor

from vflair_core.attacks.observables import Capture, VictimRow
from vflair_core.communication.transcript import Transcript
from vflair_core.errors import ExperimentError
from vflair_core.experiments.context import RunContext
from vflair_core.experiments.victims import companions_of, crosses_again
from vflair_core.parties.data_party.party import DataParty
from vflair_core.tasks.collation import Batch
from vflair_core.tasks.task import Example, public_examples
from vflair_core.tasks.token_rows import TokenRow

# Of the victims; of some of them with the defense bypassed; and of what else attacks are granted, by name.
Crossed: TypeAlias = tuple[Capture, Capture | None, dict[str, Capture]]


def capture_victims(party: DataParty, setting: RunContext, *, defended: bool) -> Crossed:
    """Let the victims cross, some of them once more with the defense bypassed, and public queries.

    Where several victims share an update, their batches come after what attacks read of them; public queries come last, so
    that nothing else depends on whether they are asked.
    """
    v, length = setting.experiment.victims, setting.victim_length
    shares = (
        v.share_updates
    )  # whether or not an attack reads them, which changes nothing of what crosses
    again = crosses_again(v)
    beside = [
        [setting.task.row(v.split, row) for row in rows]
        for rows in companions_of(setting.experiment, setting.task)
    ]
    options: dict[str, Any] = {
        "max_length": length,
        "gradients": v.phase == "train",
        "updates": shares and not again,
        "dropout": v.dropout,
    }
    main = record_victims(party, setting.victims, companions=beside, releases=v.releases, **options)
    bypassed = None
    if defended:
        some = crossing_again(setting)
        bypassed = record_victims(
            party, some, companions=beside[: len(some)], releases=v.releases, bypass=True, **options
        )
    if shares and again:
        options = {"max_length": length, "dropout": v.dropout}
        main = _with_updates(party, main, v.update_batch, bypass=False, **options)
        if bypassed is not None:
            bypassed = _with_updates(party, bypassed, v.update_batch, bypass=True, **options)
    queries: dict[str, Capture] = {}
    if _asked(setting, "queries") and v.queries and setting.task.public:
        publics = public_examples(setting.task, v.queries)
        for which in ("main", "bypassed") if defended else ("main",):
            queries[which] = record_victims(
                party, publics, max_length=length, gradients=False, bypass=which == "bypassed",
                in_prompt=False,
            )  # fmt: skip
    return main, bypassed, queries


def _with_updates(party: DataParty, crossed: Capture, size: int, **options: Any) -> Capture:
    updates = record_updates(party, crossed.rows, size, **options)
    return attrs.evolve(crossed, updates=updates)


def crossing_again(setting: RunContext) -> list[Example]:
    """The victims that cross once more with the defense bypassed: those whose labels are known do so in addition."""
    v = setting.experiment.victims
    last = min(v.known + v.bypass, v.count - v.development)
    return setting.victims[:last]


def _asked(setting: RunContext, name: str) -> bool:
    """Whether an attack of this run, or perhaps one of kept evidence, asks for it."""
    return setting.keep or any(
        name in (*launch.required, *launch.optional) for launch in setting.launches
    )


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
    dropout: bool = False,
) -> Capture:
    """Send each example across in a batch of its own, `releases` times over, and return what crossed.

    An example crosses as one row: of a passage in several windows the first crosses; its `companions`, if any, fill the
    batch. With `gradients` each batch is a training round whose step is skipped on both sides; without, an inference. Without `in_prompt` texts cross as
    they are, not in the task's prompt, and are public. Without `dropout` nothing is dropped, whatever the model's mode. With `updates` the gradients of the data party's weights are kept.
    """
    reader, rows, spots = party.preprocessor(max_length), list[TokenRow](), list[VictimRow]()
    others = companions or [()] * len(examples)
    gradients_of_weights: list[dict[str, Tensor]] = []
    if not in_prompt:  # public texts are not among the examples that were read
        reader = attrs.evolve(reader, reading=reader.reading.of_public_text())
    with (
        _for_the_record(party, bypass=bypass, training=gradients, dropout=dropout),
        nullcontext() if in_prompt else party.public_text(),
        party.channel.tap(Transcript()) as transcript,
    ):
        for _ in range(releases):
            for example, beside in zip(examples, others, strict=True):
                encoded = reader.batch([example, *beside], first_only=True)
                _send(
                    party,
                    encoded.batch,
                    gradients=gradients,
                    keep=gradients_of_weights if updates else None,
                )
                rows.append(encoded.rows[0])
                spots.append(_spot(party, encoded.rows, transcript))
    return Capture(transcript, rows[: len(examples)], spots, gradients_of_weights[: len(examples)])


def _spot(party: DataParty, rows: Sequence[TokenRow], transcript: Transcript) -> VictimRow:
    """Where the first row of the batch that was sent last is in its messages."""
    sent = party.calls.sent
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
    return VictimRow(int(sent.places[0]), padding, float(sent.shares[0]) or 1.0)


def record_updates(
    party: DataParty,
    rows: Sequence[TokenRow],
    size: int,
    *,
    max_length: int,
    bypass: bool = False,
    dropout: bool = False,
) -> list[dict[str, Tensor]]:
    """Send the victims' rows once more, `size` in a batch, and return the gradients of the data party's weights.

    Each batch is a training round as in fine-tuning, padded, its loss the one that the model gives for a batch, whose
    step is skipped. The texts are those that crossed before, as text defenses left them then; what other defenses draw
    is drawn anew. The messages of these rounds are nobody's to attack: the same rows crossed alone.
    """
    reader, updates = party.preprocessor(max_length), list[dict[str, Tensor]]()
    with _for_the_record(party, bypass=bypass, training=True, dropout=dropout):
        for first in range(0, len(rows), size):
            batch = reader.together(rows[first : first + size]).batch
            _send(party, batch, gradients=True, keep=updates)
    return updates


@contextmanager
def _for_the_record(
    party: DataParty, *, bypass: bool, training: bool, dropout: bool
) -> Iterator[None]:
    """While this lasts, what crosses trains nothing: afterwards the model is in its mode, without gradients."""
    was_training = party.model.training
    party.model.train(training)
    try:
        with (
            party.defenses.bypassing() if bypass else nullcontext(),
            nullcontext() if dropout else party.without_dropout(),
        ):
            yield
    finally:
        party.model.train(was_training)
        party.model.zero_grad(set_to_none=True)


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
    party.connection.commit(scale=None, rate=0.0, skip=True)
