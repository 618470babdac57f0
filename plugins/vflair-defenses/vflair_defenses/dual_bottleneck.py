"""Charge for what the head sends, and drive the private tail away from the published one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field, validators
from torch import Tensor, nn

from vflair_core import Defense, DefenseError, Exchange, Mechanism
from vflair_defenses.mid import Mid
from vflair_defenses.rows import public_returned

if TYPE_CHECKING:
    from vflair_core import Party

OF_CACHES = ("past_key_values", "use_cache")


@define(slots=False)
class DualBottleneck(Defense):
    """Bound what the head sends as `mid` does, and move the tail M_t away from the published M_t⁰.

    After ADMI, "dual-side" defense against inversion of prompt and response, ICML 2026, arXiv 2606.14210. Of the paper,
    whose body we could not read: a variational bottleneck at the head (z = μ + σξ, α times its KL); a warm-up of
    the tail's adapter with the body frozen and no gradients sent; L_D = 1/CE(M_t(O), M_t⁰(O)), O what the body
    returned, weighed by β, its gradient never longer than a tenth of the task's. Ours: the bottleneck is `Mid`; the
    warm-up trains the tail's trainable weights (adapters or all, but no table that the head uses too) on public
    text, each of which crosses once, defended; the cross-entropy is of whole distributions, M_t⁰'s the target,
    averaged over tokens that are no padding; lengths of gradients are over these weights together, in warm-up and
    in each step of fine-tuning; all numbers. The KL is a mean bound of information, measured, no
    differential privacy. The tail is protected by secrecy alone: against who completes with the published one (K2).

    Attributes:
        weight: α, loss per nat and token.
        dissimilarity: β, of L_D; 0 warms up nothing and is `mid`.
        cap: Most that the gradient of β·L_D may be of the task's.
        steps: Steps of the warm-up, a public text each.
        rate: Its learning rate (Adam).
        start: σ before training.
        noise: Factor of σ; 0 is the control without noise, which nothing is paid for.
        seed: Seed of the bottleneck's first weights.
    """

    weight: float = field(default=1e-3, validator=validators.ge(0))
    dissimilarity: float = field(default=1.0, validator=validators.ge(0))
    cap: float = field(default=0.1, validator=validators.gt(0))
    steps: int = field(default=200, validator=validators.ge(1))
    rate: float = field(default=1e-3, validator=validators.gt(0))
    start: float = field(default=0.1, validator=validators.gt(0))
    noise: float = field(default=1.0, validator=validators.ge(0))
    seed: int = 0
    _bottleneck: Mid = field(init=False, eq=False)
    _tail: _Tail | None = field(init=False, default=None, eq=False)
    _published: dict[str, Tensor] = field(init=False, factory=dict, eq=False)

    covers = frozenset({"prompt", "response"})
    supports = frozenset({("HBT", "causal-lm", "*")})
    axes = Mid.axes

    def __attrs_post_init__(self) -> None:
        self._bottleneck = Mid(self.weight, start=self.start, noise=self.noise, seed=self.seed)

    def prepare(self, public_texts: Sequence[str], data_party: Party) -> None:
        """Build the bottleneck, then warm up the tail on what the model party returns for public text.

        What was restored by `load_state` is gone on with as it is, and not warmed up again.
        """
        if not self._bottleneck.parameters():
            self._bottleneck.prepare(public_texts, data_party)
        if not self.dissimilarity:
            return
        data_party.defenses.check("train")
        restored, self._tail = bool(self._published), _Tail.of(data_party)
        if restored:
            return
        tail, self._published = self._tail, self._tail.copy()

        def make() -> dict[str, Tensor]:
            seen = list(public_returned("DualBottleneck", public_texts, data_party))
            training = data_party.model.training
            data_party.model.eval()  # no dropout: tails are compared on the same rows
            try:
                self._warm_up(data_party, seen)
            finally:
                data_party.model.train(training)
            return tail.copy()

        made = data_party.remember(self, public_texts, make, noise=data_party.defenses.randomness)
        for name, weight in tail.weights.items():
            weight.data.copy_(made[name])
        # They drew noise for it, or not: it may have been kept.
        for defense in data_party.defenses.each:
            data_party.defenses.begin_anew(defense)

    def _warm_up(self, party: Party, seen: Sequence[tuple[Tensor, Tensor]]) -> None:
        assert self._tail is not None
        weights = list(self._tail.weights.values())
        optimizer = torch.optim.Adam(weights, self.rate)
        for number in range(self.steps):
            party.tell(self, number, self.steps)
            ids, returned = seen[number % len(seen)]
            batch = {"input_ids": ids, "labels": ids}
            with torch.enable_grad():
                task, alike = self._tail.compared(self._published, returned, batch)
                share = self._share(task, alike, weights)
                # Not `backward`, and O is a constant: nothing goes back to the model party.
                gradients = torch.autograd.grad(task + share * alike, weights)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _share(self, task: Tensor, alike: Tensor, weights: Sequence[Tensor]) -> float:
        """β, or less: such that the gradient of share · L_D is at most `cap` times as long as the task's."""
        allowed, length = (
            float(torch.cat([g.flatten() for g in found]).norm())
            for found in (
                torch.autograd.grad(term, weights, retain_graph=True) for term in (task, alike)
            )
        )
        most = self.cap * allowed
        return self.dissimilarity if self.dissimilarity * length <= most else most / length

    def on_smashed(self, smashed: Tensor, exchange: Exchange) -> Tensor:  # (..., D)
        return self._bottleneck.on_smashed(smashed, exchange)

    def on_returned(self, returned: Tensor, exchange: Exchange) -> Tensor:  # (B, T, D)
        exchange.memo[f"returned {id(self)}"] = returned.detach()
        return returned

    def penalty(self, exchange: Exchange) -> Tensor | None:
        """α times the KL per token, and β · L_D on what was returned."""
        paid = self._bottleneck.penalty(exchange)
        if not self.dissimilarity:
            return paid
        if self._tail is None:
            raise DefenseError(
                "DualBottleneck does not hold the model's tail yet: call prepare(public_texts, data_party) "
                "first, after a restart too."
            )
        weights = list(self._tail.weights.values())
        if exchange.batch.get("labels") is None or not all(w.requires_grad for w in weights):
            return paid
        returned = exchange.memo[f"returned {id(self)}"]
        task, alike = self._tail.compared(self._published, returned, exchange.batch)
        apart = self._share(task, alike, weights) * alike
        return apart if paid is None else paid + apart

    def parameters(self) -> Sequence[nn.Parameter]:
        """The bottleneck; the tail's weights are the model's."""
        return self._bottleneck.parameters()

    def mechanism(self) -> Mechanism | None:
        """The bottleneck; of the tail its weights are all there is to know."""
        return self._bottleneck.mechanism()

    def findings(self, public_texts: Sequence[str], data_party: Party) -> Mapping[str, float]:
        """Nats per token of public text, as `Mid`."""
        return self._bottleneck.findings(public_texts, data_party)

    def state(self) -> dict[str, Tensor]:
        """The bottleneck, and the published tail as far as it is trained."""
        bottleneck = {f"bottleneck.{name}": w for name, w in self._bottleneck.state().items()}
        return bottleneck | {f"published.{name}": w for name, w in self._published.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"bottleneck": {}, "published": {}}
        for key, value in state.items():
            part, name = key.split(".", 1)
            parts[part][name] = value
        self._published = parts["published"]
        self._bottleneck.load_state(parts["bottleneck"])


class _Tail(nn.Module):
    """The data party's model from what was returned on, with weights of the caller's choice."""

    def __init__(self, party: Party, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.complete = party.model, party.complete
        self.names = tuple(names)

    @classmethod
    def of(cls, party: Party) -> _Tail:
        """Find the trainable weights that act on what was returned and on nothing before.

        Raises:
            DefenseError: There are none.
        """
        trained = {name: w for name, w in party.model.named_parameters() if w.requires_grad}
        names: list[str] = []
        if trained:
            ids = torch.arange(2, device=party.model.device)[None]
            with torch.enable_grad():
                sent = party.smashed(input_ids=ids, use_cache=False)
                out = party.complete(sent.detach(), input_ids=ids, use_cache=False).logits
                before, after = (_reached(end, trained) for end in (sent, out))
            names = [name for name in trained if name in after and name not in before]
        if not names:
            raise DefenseError(
                "DualBottleneck moves the tail's weights, and none of them is trainable (a table that the head "
                'uses too does not count). Train the tail (train.trainable, LoRA), or use "mid".'
            )
        return cls(party, names)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The weights that are moved."""
        there = dict(self.model.named_parameters())
        return {name: there[name] for name in self.names}

    def copy(self) -> dict[str, Tensor]:
        """Their values now."""
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    def forward(self, returned: Tensor, inputs: Mapping[str, Any]) -> Any:
        return self.complete(returned, **inputs, use_cache=False)

    def run(self, weights: Mapping[str, Tensor], returned: Tensor, batch: Mapping[str, Any]) -> Any:
        """Run with these weights; all others are constants."""
        fixed = {f"model.{n}": weight.detach() for n, weight in self.model.named_parameters()}
        chosen = {f"model.{name}": weight.to(returned.device) for name, weight in weights.items()}
        inputs = {name: value for name, value in batch.items() if name not in OF_CACHES}
        return torch.func.functional_call(self, {**fixed, **chosen}, (returned, inputs))

    def compared(
        self, published: Mapping[str, Tensor], returned: Tensor, batch: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return the task's loss and L_D = 1 / CE(M_t(O), M_t⁰(O))."""
        ours = self.run(self.weights, returned, batch)
        with torch.no_grad():
            theirs = self.run(published, returned, batch).logits
        return ours.loss, 1 / cross_entropy_of(ours.logits, theirs, batch.get("attention_mask"))


def _reached(end: Tensor, weights: Mapping[str, nn.Parameter]) -> set[str]:
    """Names of the weights that a result depends on."""
    if not end.requires_grad:
        return set()
    found = torch.autograd.grad(end.sum(), list(weights.values()), allow_unused=True)
    return {name for name, gradient in zip(weights, found, strict=True) if gradient is not None}


def cross_entropy_of(ours: Tensor, theirs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy −Σ p⁰ ln p of two tails' logits (B, T, V), in nats, averaged over tokens that are no padding."""
    each = -(theirs.softmax(-1) * ours.log_softmax(-1)).sum(-1)  # (B, T)
    return each.mean() if mask is None else each[mask.bool().to(each.device)].mean()
