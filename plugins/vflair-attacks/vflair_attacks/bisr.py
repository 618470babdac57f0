"""Bidirectional inversion: a learned guess, improved from the gradient behind and the hidden states before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import field, frozen, validators
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vflair_attacks.descent import (
    Budget,
    Progress,
    descend,
    deterministic_part,
    nearest_tokens,
    put,
    rms,
    targets,
)
from vflair_attacks.inverter import fresh, log_probabilities
from vflair_attacks.learning import Inverter, Kind, Schedule, tokens_of
from vflair_attacks.noise_experts import Experts, through_noise, train_experts
from vflair_core import Guess, Head, Tail


@frozen
class BiSR:
    """A learned inverter, then its guess refined by the gradient the data party sent, then by the hidden states.

    Chen et al., "Unveiling the Vulnerability of Private Fine-Tuning in Split-Based Frameworks for Large Language
    Models: A Bidirectionally Enhanced Attack", CCS 2024, arXiv 2409.00960. The inverter learns on public text through the
    pretrained head, with one expert for each strength of noise at the embeddings and a gate. The gradient stage needs
    HBT training of a causal-lm: soft labels whose gradient at the pretrained tail is the one that was sent. It finds
    labelled positions only; all others keep the inverter's token. The forward stage moves embeddings until the
    hidden states agree. Differs from the paper: nothing is cached, whether a row is labelled is found with its
    label, the forward stage's tokens are kept for an example only if they explain it better, and a granted mechanism
    is inside all of it.

    Attributes:
        scales: Noise at the embeddings in units of their rms, one expert each.
        network: What an expert is: gru or mlp.
        hidden: Width of an expert.
        steps: Steps of Adam in each phase of training.
        batch: Texts of a step, and examples inverted together.
        rate: First step length of training.
        length: Tokens kept of a public text.
        held_out: Share of the public texts that chooses the best weights.
        gradient_steps: Steps of the gradient stage; 0 leaves it out.
        gradient_rate: Its step length.
        squared: Weight of the squared against the absolute difference of gradients (the paper's β).
        forward_steps: Steps of the forward stage; 0 leaves it out.
        forward_rate: Its step length, in units of the rms of the embedding table.
        forwards: Most texts through the head in learning, and then for each victim; 0 for no limit.
        seconds: Most seconds of the same; 0 for no limit.
    """

    scales: tuple[float, ...] = field(default=(0.0, 0.5, 1.0), validator=validators.min_len(1))
    network: Kind = field(default="gru", validator=validators.in_(("mlp", "gru")))
    hidden: int = field(default=256, validator=validators.ge(1))
    steps: int = field(default=500, validator=validators.ge(1))
    batch: int = field(default=16, validator=validators.ge(1))
    rate: float = field(default=2e-3, validator=validators.gt(0))
    length: int = field(default=64, validator=validators.ge(1))
    held_out: float = field(default=0.1, validator=[validators.gt(0), validators.lt(1)])
    gradient_steps: int = field(default=100, validator=validators.ge(0))
    gradient_rate: float = field(default=0.09, validator=validators.gt(0))
    squared: float = field(default=0.85, validator=[validators.ge(0), validators.le(1)])
    forward_steps: int = field(default=200, validator=validators.ge(0))
    forward_rate: float = field(default=0.02, validator=validators.gt(0))
    forwards: int = field(default=0, validator=validators.ge(0))
    seconds: float = field(default=0.0, validator=validators.ge(0))

    def __call__(
        self,
        releases: Tensor,  # (R, N, T, D)
        mask: Tensor,  # (N, T)
        head: Head,
        tokenizer: Any,
        public_texts: Sequence[str],
        generator: torch.Generator,
        task_kind: str = "",
        returned: Tensor | None = None,
        hidden_grad: Tensor | None = None,
        share: Tensor | None = None,  # (N,)
        tail: Tail | None = None,
        mechanism: Any = None,
        parameters: Any = None,
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return the tokens (N, T) of every example."""
        budget = Budget(self.forwards, self.seconds)
        known = parameters if parameters is not None else mechanism
        rows = tokens_of(tokenizer, public_texts, self.length)
        network, loss = self._learn(head, rows, known, generator, budget, progress)
        backward = (
            task_kind == "causal-lm" and tail is not None and hidden_grad is not None
            and returned is not None and self.gradient_steps > 0
        )  # fmt: skip
        tokens, labelled = torch.full(mask.shape, -1), 0
        defend = deterministic_part(mechanism, parameters)
        for numbers, target in targets(releases, mask, head, defend, "cosine", self.batch):
            budget.turn_of(len(numbers))
            seen = releases[:, numbers, : target.mask.shape[1]].to(head.device)
            logits = log_probabilities(network, seen, target.mask)
            guess = logits.argmax(-1)
            if backward:
                assert returned is not None
                assert hidden_grad is not None
                for row, number in enumerate(numbers.tolist()):
                    real = int(target.mask[row].sum())
                    states, sent = (
                        x[number, :real].to(head.device) for x in (returned, hidden_grad)
                    )
                    if share is not None:  # the loss of a text alone is differentiated here
                        sent = sent / share[number].to(head.device)
                    labels, where = self._backward(tail, states, sent, logits[row, 1:real])
                    guess[row, 1:real][where] = labels[where]
                    labelled += int(where.sum())
            if self.forward_steps:
                guess = self._forward(target, guess, head.vectors(), budget)
            put(tokens, numbers, guess, target.mask)
        spent = {"forwards": budget.forwards, "held_out_loss": loss, "labelled_positions": labelled}
        return Guess(tokens=tokens, budget=spent)

    def _learn(
        self, head: Head, rows: list[Tensor], known: Any, generator: torch.Generator,
        budget: Budget, progress: Progress,
    ) -> tuple[Any, float]:  # fmt: skip
        at, table = through_noise(head, rows, known, generator), head.vectors()
        hidden, ids = at([0.0])(torch.arange(min(len(rows), 64)))
        width, experts = hidden.shape[-1], []
        for _ in self.scales:
            expert: Inverter = fresh(
                self.network, width, self.hidden, len(table), table, generator
            ).to(head.device)
            expert.fit_scale(hidden[ids >= 0])
            experts.append(expert)
        with torch.random.fork_rng([]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            network = Experts(experts, width).to(head.device)
        plan = Schedule(self.steps, self.batch, self.rate, self.held_out)
        loss = train_experts(network, at, self.scales, len(rows), plan, generator, budget, progress)
        return network, loss

    def _backward(
        self, tail: Any, returned: Tensor, sent: Tensor, prior: Tensor
    ) -> tuple[Tensor, Tensor]:  # (T, D), (T, D), (T − 1, V)
        """Find labels whose gradient at the tail is the one that was sent, and which rows have one: (T − 1,) each."""
        unit = sent.square().mean().sqrt().clamp_min(1e-30)
        soft = (prior / 1.2).softmax(-1).requires_grad_()
        share = torch.full((len(prior),), 2.0, device=prior.device, requires_grad=True)
        optimizer = torch.optim.AdamW([soft, share], lr=self.gradient_rate)
        for _ in range(self.gradient_steps):
            # Only this way of computing attention can be differentiated twice.
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                states = returned[None].detach().requires_grad_()
                said = tail(states)[0, :-1].log_softmax(-1)
                each = -(soft.softmax(-1) * said).sum(-1)
                weight = share.sigmoid()
                loss = (each * weight).sum() / weight.sum().clamp_min(1e-6)
                (made,) = torch.autograd.grad(loss, states, create_graph=True)
                off = (made[0] - sent) / unit
                objective = self.squared * off.square().sum() + (1 - self.squared) * off.abs().sum()
                soft.grad, share.grad = torch.autograd.grad(objective, (soft, share))
            optimizer.step()
        there = sent[:-1].abs().amax(-1) > 0
        return soft.detach().argmax(-1), (share.detach() > 0) & there

    def _forward(self, target: Any, guess: Tensor, table: Tensor, budget: Budget) -> Tensor:
        """Move embeddings from those of the guess until the hidden states agree; keep what explains them better."""
        found, _ = descend(
            table[guess], target.losses, steps=self.forward_steps, decay=0.01, budget=budget,
            rate=self.forward_rate * rms(table),
        )  # fmt: skip
        moved = nearest_tokens(found, table)
        with torch.no_grad():
            better = target.losses(table[moved]) < target.losses(table[guess])
        return torch.where(better[:, None], moved, guess)
