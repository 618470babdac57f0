"""Whether a defense does what it says, and does it in company as alone: what crosses of public text shows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vflair_core.attacks.adaptive import ON_EMBEDDINGS, answers
from vflair_core.communication.transcript import Transcript
from vflair_core.defenses.mechanism import ComposedMechanism

if TYPE_CHECKING:
    from vflair_core.parties.data_party.party import DataParty

TEXTS, LENGTH, ROWS, BATCH = 16, 64, 256, 4
PERMUTATIONS, FALSE_ALARMS = 999, 0.002


def mechanism_check(
    party: DataParty, public_texts: Sequence[str], *, training: bool = True
) -> dict[str, Any] | None:
    """Compare what crosses of public text, in training or in inference, with what the mechanisms say would cross.

    A paired two-sample test on the rows: beside each row that was sent lies one that `Mechanism.sample` drew for the
    same undefended row. If the mechanism is right, either may be the one that was sent: exchanging them at random in
    999 ways gives the p-value of their energy distance (Székely and Rizzo, 2004). A match is reported unless p is
    at most .002, which happens to a right mechanism once in 500 runs.

    Returns None where there is nothing to compare: no mechanism, no public text, or defenses that change text or rows.

    Raises:
        DefenseError: What a defense tells of is no `Mechanism`.
    """
    parts = [part for d in party.defenses.each if (part := d.mechanism()) is not None]
    changing = any(party.defenses.at(place) for place in ("on_text", "on_tokens", "expand"))
    if not parts or changing or not public_texts or party.tokenizer is None:
        return None
    if party.model.config.is_encoder_decoder:
        return None
    mechanism, generator = ComposedMechanism(parts), torch.Generator().manual_seed(0)
    mechanism = mechanism if training else mechanism.inference()
    sent, said = [], []
    with _crossing(party, training=training):
        for text in public_texts[:TEXTS]:
            ids = _read(party, [text])["input_ids"]
            sent.append(_sent(party, {"input_ids": ids})[0])
            with torch.no_grad():
                said.append(_drawn(party, mechanism, ids, generator)[0].float().cpu())
    return _verdict("matches", torch.cat(sent), torch.cat(said), generator)


def company_check(
    party: DataParty, public_texts: Sequence[str], *, training: bool = True
) -> dict[str, Any] | None:
    """Compare what defenses do to a text alone, as victims may cross, with what they do to it in a batch, as training does.

    The same test, on how far each row was moved. None where a batch has no rows of a text's own (`expand`), or no
    public text is there.
    """
    changing = any(party.defenses.at(place) for place in ("on_text", "on_tokens", "expand"))
    stands = any(party.defenses.at(place) for place in ("on_smashed", "on_embeddings"))
    texts = list(public_texts[:TEXTS])
    if changing or not stands or len(texts) < BATCH or party.tokenizer is None:
        return None
    if party.model.config.is_encoder_decoder:
        return None
    alone, together = [], []
    with _crossing(party, training=training):
        for first in range(0, len(texts) - BATCH + 1, BATCH):
            some = texts[first : first + BATCH]
            batch = _moved(party, _read(party, some))
            for text, row in zip(some, batch, strict=True):
                own = _moved(party, _read(party, [text]))[0]
                alone.append(own)
                together.append(row[: len(own)])
    generator = torch.Generator().manual_seed(0)
    return _verdict("agrees", torch.cat(alone), torch.cat(together), generator)


def _verdict(name: str, ours: Tensor, theirs: Tensor, generator: torch.Generator) -> dict[str, Any]:
    chance = chance_of_a_match(ours[:ROWS], theirs[:ROWS], generator)
    return {name: chance > FALSE_ALARMS, "p": chance, "false_alarms": FALSE_ALARMS}


@contextmanager
def _crossing(party: DataParty, *, training: bool) -> Iterator[None]:
    """While this lasts, public text crosses as victims do."""
    was_training = party.model.training
    party.model.train(training)
    try:
        with (
            torch.set_grad_enabled(training),
            party.without_dropout(),
            party.public_text(),
            party.answering(),
        ):
            yield
    finally:
        party.model.train(was_training)


def _read(party: DataParty, texts: Sequence[str]) -> dict[str, Tensor]:
    encoded: Any = party.tokenizer
    batch = encoded(
        list(texts), truncation=True, max_length=LENGTH, return_tensors="pt",
        padding=len(texts) > 1, padding_side="right",
    )  # fmt: skip
    return {k: batch[k].to(party.model.device) for k in ("input_ids", "attention_mask")}


def _sent(party: DataParty, batch: dict[str, Tensor]) -> Tensor:
    """The hidden states that cross: (B, T, D)."""
    with party.channel.tap(Transcript()) as transcript:
        party.model(**batch, use_cache=False)
    return next(r.tensor for r in transcript.messages if r.role == "smashed").float().cpu()


def _moved(party: DataParty, batch: dict[str, Tensor]) -> Tensor:
    """How far defenses move them."""
    with party.defenses.bypassing():
        clean = _sent(party, batch)
    return _sent(party, batch) - clean


def _drawn(
    party: DataParty, mechanism: ComposedMechanism, ids: Tensor, generator: torch.Generator
) -> Tensor:
    """What the mechanism says would cross of a text."""
    inputs: dict[str, Tensor] = {"input_ids": ids}
    if answers(mechanism.parts, ON_EMBEDDINGS):
        table: Any = party.model.get_input_embeddings()
        inputs = {"inputs_embeds": mechanism.sample_embeddings(table(ids), generator)}
    return mechanism.sample(party.smashed(**inputs, use_cache=False), generator)


def chance_of_a_match(sent: Tensor, said: Tensor, generator: torch.Generator) -> float:
    """The p-value of the energy distance of paired rows (N, D), by exchanging the two of a pair at random."""
    if torch.equal(sent, said):
        return 1.0
    rows = torch.cat([sent, said]).double()
    scale = rows.std().clamp_min(1e-30)
    apart = torch.cdist(rows / scale, rows / scale)  # (2N, 2N)
    if float((sent - said).abs().max()) <= 1e-5 * float(scale):
        return 1.0  # equal but for rounding
    signs = torch.ones(PERMUTATIONS + 1, len(sent), dtype=torch.float64)
    flips = torch.randint(0, 2, (PERMUTATIONS, len(sent)), generator=generator)
    signs[1:] -= 2 * flips.double()
    both = torch.cat([signs, -signs], dim=1)  # (P, 2N): +1 for what counts as sent
    energies = -torch.einsum("pi,ij,pj->p", both, apart, both)
    return float((energies >= energies[0] * (1 - 1e-12)).double().mean())
