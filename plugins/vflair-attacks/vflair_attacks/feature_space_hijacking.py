"""Cheat in training: send gradients that pull the head into a space that the attacker can read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from attrs import define, field, frozen, validators
from torch import Tensor, nn

from vflair_attacks.descent import Budget, batches, put
from vflair_attacks.inverter import fresh, log_probabilities
from vflair_attacks.learning import Inverter, Schedule, learn, padded, tokens_of
from vflair_core import Adversary, AttackError, Guess, Message

Pilot = Callable[[Tensor, Tensor], Tensor]  # ids (B, T), mask (B, T) -> (B, T, D)


@frozen
class FeatureSpaceHijacking:
    """Replace the gradients the data party gets by those of a critic that tells its rows from a pilot's.

    Pasquini et al., "Unleashing the Tiger: Inference Attacks on Split Learning", CCS 2021, arXiv 2012.02670 (FSHA). The
    model party has a pilot, a map from public text into a feature space that it can invert, and a critic that tells
    the data party's smashed rows from the pilot's. What it sends back trains the head to fool the critic; the
    inverse of the pilot then reads the smashed data. Differs from the paper: the pilot is not learned but the published
    head where that is granted, else the public embeddings, since a language model's states begin as its token
    embeddings; the critic (WGAN-GP, as in the authors' code) reads one row at a time; the false gradient has the
    norm of the honest one, and leaves out rows whose honest gradient is zero, which are padding. It needs a head
    that is trained, and costs the data party its task, which its losses show.

    Attributes:
        strength: Norm of the false gradient, in norms of the honest one; 0 sends the honest one.
        hidden: Width of the critic.
        critic_steps: Steps of the critic (Adam) for each gradient that is sent.
        critic_rate: Their length.
        penalty: Weight of the critic's gradient penalty.
        noise: Spread of the noise on pilot rows from which the inverse is learned, in spreads of those rows.
        inverse_hidden: Width of the inverse.
        steps: Steps of the inverse, before anything crosses.
        batch: Public texts of a step.
        length: Tokens kept of a public text.
    """

    strength: float = field(default=1.0, validator=validators.ge(0))
    hidden: int = field(default=256, validator=validators.ge(1))
    critic_steps: int = field(default=5, validator=validators.ge(1))
    critic_rate: float = field(default=1e-3, validator=validators.gt(0))
    penalty: float = field(default=10.0, validator=validators.ge(0))
    noise: float = field(default=0.1, validator=validators.ge(0))
    inverse_hidden: int = field(default=256, validator=validators.ge(1))
    steps: int = field(default=600, validator=validators.ge(1))
    batch: int = field(default=16, validator=validators.ge(1))
    length: int = field(default=64, validator=validators.ge(2))

    def adversary(
        self,
        tokenizer: Any,
        embeddings: Tensor,  # (V, D)
        public_texts: Sequence[str],
        generator: torch.Generator,
        pretrained_head: Any = None,
    ) -> Hijacker:
        """Learn the inverse of the pilot, and return who will cheat."""
        rows = tokens_of(tokenizer, public_texts, self.length)
        pilot = _of_embeddings(embeddings) if pretrained_head is None else _of_head(pretrained_head)
        device = (embeddings if pretrained_head is None else pretrained_head).device

        def draw(numbers: Tensor) -> tuple[Tensor, Tensor]:
            ids, real = (part.to(device) for part in padded([rows[n] for n in numbers.tolist()]))
            with torch.no_grad():
                return pilot(ids.clamp_min(0), real), ids

        hidden, ids = draw(torch.arange(min(len(rows), 64)))
        spread = hidden[ids >= 0].std()

        def noisy(numbers: Tensor) -> tuple[Tensor, Tensor]:
            made, ids = draw(numbers)
            drawn = torch.randn(made.shape, generator=generator).to(device)
            return made + self.noise * spread * drawn, ids

        inverse = self._inverse(hidden.shape[-1], len(tokenizer), generator).to(device)
        inverse.fit_scale(hidden[ids >= 0])
        plan = Schedule(self.steps, self.batch, 2e-3, 0.1)
        loss = learn(inverse, noisy, len(rows), plan, generator, Budget())

        def pilot_rows() -> Tensor:
            hidden, ids = draw(torch.randint(len(rows), (self.batch,), generator=generator))
            return hidden[ids >= 0]

        critic = _critic(hidden.shape[-1], self.hidden, generator).to(device)
        return Hijacker(self, inverse, loss, critic, pilot_rows, spread, generator)

    def _inverse(self, width: int, vocabulary: int, generator: torch.Generator) -> Inverter:
        return fresh("mlp", width, self.inverse_hidden, vocabulary, None, generator)

    def __call__(
        self,
        adversary_state: Mapping[str, Tensor],
        releases: Tensor,  # (R, N, T, D)
        mask: Tensor,  # (N, T)
        tokenizer: Any,
        generator: torch.Generator,
    ) -> Guess:
        """Return the tokens (N, T) that the inverse of the pilot reads."""
        inverse = self._inverse(releases.shape[-1], len(tokenizer), generator)
        prefix = "inverse."
        inverse.load_state_dict(
            {k.removeprefix(prefix): v for k, v in adversary_state.items() if k.startswith(prefix)}
        )
        inverse.eval()
        tokens = torch.full(mask.shape, -1)
        for numbers in batches(mask, self.batch):
            real = mask[numbers]
            logits = log_probabilities(inverse, releases[:, numbers], real)
            put(tokens, numbers, logits.argmax(-1), real)
        sent = float(adversary_state["sent"])
        return Guess(tokens=tokens, budget={"false_gradients": sent})


@define(slots=False)
class Hijacker(Adversary):
    """Answers each backward with a false gradient for the smashed rows of its forward."""

    plan: FeatureSpaceHijacking
    inverse: Inverter
    held_out_loss: float
    critic: nn.Module
    pilot_rows: Callable[[], Tensor]
    spread: Tensor
    generator: torch.Generator
    sent: int = 0
    forwards: dict[int, tuple[int, Tensor]] = field(factory=dict)  # which gradient is whose rows'

    def __attrs_post_init__(self) -> None:
        rate = self.plan.critic_rate
        self.optimizer = torch.optim.Adam(self.critic.parameters(), rate, betas=(0.5, 0.9))

    def tamper(self, request: Message, reply: Message) -> Message:
        for exchange in request.meta.get("released_graphs", ()):
            self.forwards.pop(exchange, None)
        if request.kind == "forward" and request.meta["grad"]:
            for place, index in enumerate(request.meta["wants"]):
                if request.tensors[index].role == "smashed":  # the first one: the hidden states
                    rows = request.tensors[index].tensor.detach().clone()
                    self.forwards[request.exchange] = place, rows
                    break
        if request.kind != "backward" or not self.plan.strength:
            return reply
        if request.exchange not in self.forwards:
            raise AttackError(
                "The data party asks for no gradient of its smashed data: its head is not trained, so there is "
                "nothing to hijack. Train it (train.trainable, train.lora), or watch with a passive attack."
            )
        place, rows = self.forwards[request.exchange]
        if not request.meta["keep"]:
            del self.forwards[request.exchange]
        tensors = list(reply.tensors)
        tensors[place] = attrs.evolve(
            tensors[place], tensor=self._false(rows, tensors[place].tensor)
        )
        self.sent += 1
        return attrs.evolve(reply, tensors=tuple(tensors))

    def _false(self, smashed: Tensor, honest: Tensor) -> Tensor:
        """The gradient that makes rows look more like the pilot's, as long as the honest one."""
        told = (honest.abs().sum(-1) > 0).to(smashed.device)
        if not bool(told.any()):
            return honest
        rows = smashed[told].to(self.spread.device).float() / self.spread
        for _ in range(self.plan.critic_steps):
            self._teach(rows)
        rows = rows.requires_grad_()
        (gradient,) = torch.autograd.grad(-self.critic(rows).mean(), rows)
        length = self.plan.strength * honest.float().norm() / gradient.norm().clamp_min(1e-12)
        false = torch.zeros_like(honest)
        false[told] = (gradient * length).to(honest)
        return false

    def _teach(self, rows: Tensor) -> None:  # (rows, D)
        """One step of the critic: low for the data party's rows, high for the pilot's."""
        pilot = self.pilot_rows() / self.spread
        count = min(len(rows), len(pilot))
        ours, theirs = self._some(pilot, count), self._some(rows, count)
        share = torch.rand(count, 1, generator=self.generator).to(rows.device)
        between = (share * ours + (1 - share) * theirs).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        loss = self.critic(theirs).mean() - self.critic(ours).mean()
        loss = loss + self.plan.penalty * (slope.norm(dim=1) - 1).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def _some(self, rows: Tensor, count: int) -> Tensor:
        return rows[torch.randperm(len(rows), generator=self.generator)[:count]]

    def state(self) -> dict[str, Tensor]:
        weights = {f"inverse.{name}": value for name, value in self.inverse.state_dict().items()}
        facts = {"sent": torch.tensor(self.sent), "held_out_loss": torch.tensor(self.held_out_loss)}
        return weights | facts


def _of_embeddings(table: Tensor) -> Pilot:
    return lambda ids, _: table[ids]


def _of_head(head: Any) -> Pilot:
    return lambda ids, real: head(ids, attention_mask=real.long())


def _critic(width: int, hidden: int, generator: torch.Generator) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return nn.Sequential(
            nn.Linear(width, hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, 1),
        )
