"""Learn to invert the pipeline as it is, defense included, on public text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import field, frozen, validators
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vflair_attacks.descent import Budget, Progress, batches, put
from vflair_attacks.learning import Draw, Inverter, Kind, Schedule, learn, padded, tokens_of
from vflair_core import AttackError, Guess, Head

Pairs = Sequence[tuple[str, Tensor]]


@frozen
class LearnedInverter:
    """A small network from hidden states to tokens, trained on public text through the defended pipeline.

    Song & Raghunathan, arXiv 2004.00053, trained as an adaptive attacker must: with the mechanism granted, each batch
    crosses it with fresh randomness; else from `queries`, which are public texts and what they gave; else through
    the head as if nothing defended. Releases of a victim are read one by one and their log-probabilities added.
    Differs from the paper: a token at each position instead of a bag of words; the network points at embeddings where
    their table is known.

    Attributes:
        network: gru reads a text in both directions, mlp each row by itself.
        hidden: Width of the network.
        steps: Steps of Adam.
        batch: Texts of a step.
        rate: First step length.
        length: Tokens kept of a public text.
        queries: Most queries that are learned from; 0 for all. Listed with several, it gives AP against queries.
        held_out: Share of the public texts that chooses the best weights.
        forwards: Most texts through the head, of public text: the number of victims changes nothing; 0 for no limit.
        seconds: Most seconds of learning; 0 for no limit.
    """

    network: Kind = field(default="gru", validator=validators.in_(("mlp", "gru")))
    hidden: int = field(default=256, validator=validators.ge(1))
    steps: int = field(default=1000, validator=validators.ge(1))
    batch: int = field(default=16, validator=validators.ge(1))
    rate: float = field(default=2e-3, validator=validators.gt(0))
    length: int = field(default=64, validator=validators.ge(1))
    queries: int = field(default=0, validator=validators.ge(0))
    held_out: float = field(default=0.1, validator=[validators.gt(0), validators.lt(1)])
    forwards: int = field(default=0, validator=validators.ge(0))
    seconds: float = field(default=0.0, validator=validators.ge(0))

    def __call__(
        self,
        releases: Tensor,  # (R, N, T, D)
        mask: Tensor,  # (N, T)
        tokenizer: Any,
        generator: torch.Generator,
        public_texts: Sequence[str] = (),
        in_domain: Sequence[str] = (),
        queries: Pairs = (),
        head: Head | None = None,
        embeddings: Tensor | None = None,
        mechanism: Any = None,
        parameters: Any = None,
        device: torch.device | str = "cpu",
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return the tokens (N, T) of every example.

        Raises:
            AttackError: There is neither a head nor an answered query, or no public text.
        """
        known = parameters if parameters is not None else mechanism
        texts = [*public_texts, *in_domain]
        if head is not None and (known is not None or not queries):
            rows = tokens_of(tokenizer, texts, self.length)
            draw, count = through_head(head, rows, known, generator), len(rows)
        elif queries:
            draw, count = of_queries(tokenizer, queries[: self.queries or None], device)
        else:
            raise AttackError(
                "A learned inverter needs examples of text with hidden states: grant a head, or queries."
            )
        table = head.vectors() if head is not None else embeddings
        network = fresh(
            self.network, releases.shape[-1], self.hidden, len(tokenizer), table, generator
        )
        hidden, ids = draw(torch.arange(min(count, 64)))
        network = network.to(hidden.device)
        network.fit_scale(hidden[ids >= 0])
        budget = Budget(self.forwards, self.seconds)
        plan = Schedule(self.steps, self.batch, self.rate, self.held_out)
        loss = learn(network, draw, count, plan, generator, budget, progress)
        tokens = torch.full(mask.shape, -1)
        for numbers in batches(mask, self.batch):
            real = mask[numbers]
            logits = log_probabilities(network, releases[:, numbers].to(hidden.device), real)
            put(tokens, numbers, logits.argmax(-1).cpu(), real)
        spent = {"forwards": budget.forwards, "texts": count, "held_out_loss": loss}
        if head is None or (known is None and queries):
            spent["queries"] = count
        return Guess(tokens=tokens, budget=spent)


def fresh(
    kind: Kind, width: int, hidden: int, vocabulary: int, table: Tensor | None,
    generator: torch.Generator,
) -> Inverter:  # fmt: skip
    """Build a network whose weights come from the attack's own random stream."""
    with torch.random.fork_rng([]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return Inverter(kind, width, hidden, vocabulary, table)


def through_head(
    head: Head, rows: Sequence[Tensor], mechanism: Any, generator: torch.Generator
) -> Draw:
    """Draw pairs by sending text through the head and, if it is known, the defense, with fresh randomness."""
    table = head.vectors()

    def draw(numbers: Tensor) -> tuple[Tensor, Tensor]:
        ids, real = (part.to(head.device) for part in padded([rows[n] for n in numbers.tolist()]))
        with torch.no_grad():
            if mechanism is None:
                return head(ids.clamp_min(0), attention_mask=real.long()), ids
            embeds = mechanism.sample_embeddings(table[ids.clamp_min(0)], generator)
            hidden = head(inputs_embeds=embeds, attention_mask=real.long())
            return mechanism.sample(hidden * real[..., None], generator), ids

    return draw


def log_probabilities(network: Inverter, releases: Tensor, mask: Tensor) -> Tensor:
    """Add up what the network says of every release of a row: (R, B, T, D) → (B, T, V)."""
    with torch.no_grad():
        said = [network(seen, mask.sum(1)).log_softmax(-1) for seen in releases]
    return torch.stack(said).sum(0)


def of_queries(tokenizer: Any, queries: Pairs, device: torch.device | str) -> tuple[Draw, int]:
    """Draw recorded pairs; a text that crossed at another length than its tokens (a text defense) is no pair."""
    pairs = []
    for text, hidden in queries:
        ids = tokenizer(text, truncation=True, max_length=len(hidden))["input_ids"]
        if len(ids) == len(hidden):
            pairs.append((hidden, torch.tensor(ids)))
    if len(pairs) < 2:
        raise AttackError(
            f"Of {len(queries)} queries {len(pairs)} crossed at the length of their text; two are needed. Raise "
            "victims.queries, or grant a head."
        )

    def draw(numbers: Tensor) -> tuple[Tensor, Tensor]:
        chosen = [pairs[n] for n in numbers.tolist()]
        hidden = pad_sequence([states for states, _ in chosen], batch_first=True)
        return hidden.to(device), padded([ids for _, ids in chosen])[0].to(device)

    return draw, len(pairs)
