"""Train a mapping at the cut against an adversary that is trained against it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import attrs
import torch
from attrs import define, field, validators
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vflair_core import Defense, DefenseError, Exchange, Mechanism
from vflair_defenses.learning import (
    frozen_call,
    parameters_of,
    perceptron,
    read_state,
    seeded,
    state_of,
)
from vflair_defenses.rows import (
    classes_of,
    gradients_of,
    public_ids,
    public_returned,
    public_rows,
    real_rows,
    width_of,
)

if TYPE_CHECKING:
    from vflair_core import Party

KINDS = ("causal-lm", "classification", "regression", "question-answering")
PHASES = ("train", "eval", "prefill", "decode")
REFITTING = 300  # steps of a fresh adversary


@define(slots=False)
class AdversarialTraining(Defense):
    """Map h to h' = h + MLP(h), trained so that an adversary cannot tell the token (head) or the label (tail).

    After Liu et al., "Privacy Adversarial Network", arXiv 1812.07386, and VFLAIR-LLM's "AT". Head: the adversary A
    minimises the cross-entropy of A(h') with the tokens; mapping and head minimise
    L + distortion · mean‖h' − h‖² − weight · min(CE, ln V): beyond chance there is nothing to win. Tail (HBT,
    classification): A reads the label from the gradient that is sent, and the mapping is trained through it.
    Differs from VFLAIR-LLM: the mapping starts as the identity and is not squashed, A trains by turns and not in the
    main optimizer, and in the tail the gradient is differentiable, so that something is trained. Deterministic and
    in general injective: only empirical, against this adversary; one who knows the mapping inverts it.

    Attributes:
        weight: Of the adversary's loss.
        distortion: λ, of the mean squared change.
        place: head or tail.
        hidden: Width of the layers between, of mapping and adversary.
        rate: The adversary's learning rate (Adam).
        turns: Steps of the adversary for each step of the model.
        seed: Seed of the first weights.
    """

    weight: float = field(default=1.0, validator=validators.ge(0))
    distortion: float = field(default=0.1, validator=validators.ge(0))
    place: Literal["head", "tail"] = field(
        default="head", validator=validators.in_(("head", "tail"))
    )
    hidden: int = field(default=64, validator=validators.ge(1))
    rate: float = field(default=1e-3, validator=validators.gt(0))
    turns: int = field(default=1, validator=validators.ge(1))
    seed: int = 0
    _parts: nn.ModuleDict = field(init=False, factory=nn.ModuleDict, eq=False)
    _optimizer: torch.optim.Optimizer | None = field(init=False, default=None, eq=False)

    supports = frozenset({("*", kind, phase) for kind in KINDS for phase in PHASES})

    def __attrs_post_init__(self) -> None:
        self.covers = frozenset({"labels"} if self.place == "tail" else {"prompt", "response"})
        if self.place == "tail":
            self.supports = frozenset({("HBT", "classification", phase) for phase in PHASES})

    def prepare(self, public_texts: Sequence[str], data_party: Party) -> None:
        """Build mapping and adversary for the model's width, vocabulary and classes."""
        config = data_party.model.config.get_text_config()
        if self.place == "tail" and config._attn_implementation != "eager":
            raise DefenseError(
                "AdversarialTraining in the tail needs a gradient of the gradient, which fused attention "
                f'({config._attn_implementation}) may lack: load the model with attn_implementation="eager".'
            )
        targets = int(config.vocab_size) if self.place == "head" else classes_of(data_party)
        self._build(width_of(data_party), targets)
        self._parts.to(data_party.model.device)

    def _build(self, width: int, targets: int) -> None:
        with seeded(self.seed):
            mapping = perceptron(width, self.hidden, width)
            adversary = perceptron(width, self.hidden, targets)
        last = mapping[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self._parts = nn.ModuleDict({"mapping": mapping, "adversary": adversary})
        self._optimizer = torch.optim.Adam(adversary.parameters(), self.rate)

    def on_smashed(self, smashed: Tensor, exchange: Exchange) -> Tensor:  # (B, T, D)
        return self._mapped(smashed, exchange) if self.place == "head" else smashed

    def on_returned(self, returned: Tensor, exchange: Exchange) -> Tensor:  # (B, T, D)
        if self.place == "head":
            return returned
        exchange.memo[f"returned {id(self)}"] = returned
        return self._mapped(returned, exchange)

    def _mapped(self, hidden: Tensor, exchange: Exchange) -> Tensor:
        if not len(self._parts):
            raise DefenseError(
                "AdversarialTraining has no mapping yet: call prepare(public_texts, data_party) first."
            )
        change = self._parts["mapping"](hidden.float()).to(hidden.dtype)
        if exchange.phase == "train":
            exchange.memo[f"mapped {id(self)}"] = (hidden + change, change)
        return hidden + change

    def penalty(self, exchange: Exchange) -> Tensor | None:
        """Let the adversary take its turns, then return what mapping and model pay."""
        if not (self.weight or self.distortion):
            return None
        mapped, change = exchange.memo[f"mapped {id(self)}"]
        if self.place == "head":
            seen = real_rows(mapped, exchange)
            targets = real_rows(exchange.batch["input_ids"][..., None], exchange).flatten()
        else:
            seen, targets = self._label_view(exchange), exchange.batch["labels"]
        return self.distortion * change.square().sum(-1).mean() - self.weight * self._contest(
            seen, targets
        )

    def _contest(self, seen: Tensor, targets: Tensor) -> Tensor:
        """Train the adversary on `seen` (N, D), then return its loss, at most that of chance."""
        adversary = self._parts["adversary"]
        assert self._optimizer is not None
        with torch.enable_grad():
            for _ in range(self.turns):
                self._optimizer.zero_grad()
                cross_entropy(adversary(seen.detach().float()), targets).backward()
                self._optimizer.step()
        scores = frozen_call(adversary, seen.float())
        return cross_entropy(scores, targets).clamp(max=math.log(scores.shape[-1]))

    def _label_view(self, exchange: Exchange) -> Tensor:
        """The gradient that will be sent, summed over positions (B, D), at unit scale, differentiable."""
        loss, returned = exchange.memo["loss"], exchange.memo[f"returned {id(self)}"]
        (gradient,) = torch.autograd.grad(loss, returned, create_graph=True)
        view = _of_positions(gradient)
        return view / view.detach().square().mean().sqrt().clamp_min(1e-30)

    def parameters(self) -> Sequence[nn.Parameter]:
        """The mapping only: the adversary has an optimizer of its own."""
        return parameters_of(self._parts["mapping"]) if len(self._parts) else ()

    def mechanism(self) -> Mechanism | None:
        """The mapping, once it is known; what is done in the tail does not change smashed data."""
        if self.place == "tail" or not len(self._parts):
            return None if self.place == "tail" else Mechanism()
        return MappingMechanism(self._parts["mapping"])

    def findings(self, public_texts: Sequence[str], data_party: Party) -> Mapping[str, float]:
        """How often the adversary it was trained against names a token or label, and how often a fresh one does.

        The fresh one has the same shape, and an output for each token or label that it is shown; it is fitted to one half of the public texts behind the finished mapping, and
        both are judged on the other half. At the head they name tokens, beside the most frequent one there. At the
        tail they read labels from the gradient that would be sent: each text crosses once, forward only, and is given
        each label in turn, so that chance is exactly one of the classes. That the first fails says only that it was
        outrun (or that public text is not what it learned on); what the fresh one reads is the least that an
        adversary of this kind can, for it is small and sees no more than 64 texts.
        """
        if not public_texts or data_party.tokenizer is None:
            return {}
        head = self.place == "head"
        each = (self._tokens_seen if head else self._labels_seen)(public_texts, data_party)
        if len(each) < 2:  # no half to judge on
            return {}
        halves = [
            (torch.cat([rows for rows, _ in part]), torch.cat([targets for _, targets in part]))
            for part in (each[::2], each[1::2])
        ]
        (seen, targets), (others, truth) = halves
        fresh = self._fitted(seen, targets)
        with torch.no_grad():
            trained, anew = self._parts["adversary"](others).argmax(-1), fresh(others)
        return {
            "adversary": _accuracy(trained, truth),
            "fresh adversary": _accuracy(anew, truth),
            "most frequent token" if head else "chance": float(truth.bincount().max()) / len(truth),
        }

    def _tokens_seen(self, texts: Sequence[str], party: Party) -> list[tuple[Tensor, Tensor]]:
        """Of each text its rows (T, D) behind the mapping, and its tokens (T,)."""
        ids = public_ids("AdversarialTraining", texts, party)
        rows = public_rows("AdversarialTraining", texts, party)
        with torch.no_grad():
            mapped = [h[0].float() + self._parts["mapping"](h[0].float()) for h in rows]
        return [(m, own[0].to(m.device)) for m, own in zip(mapped, ids, strict=True)]

    def _labels_seen(self, texts: Sequence[str], party: Party) -> list[tuple[Tensor, Tensor]]:
        """Of each text its gradients (C, D), one for each label, as `_label_view` shows them, and the labels (C,)."""
        classes, found = classes_of(party), []
        for ids, returned in public_returned("AdversarialTraining", texts, party):
            views = []
            for label in range(classes):
                sent = returned.detach().requires_grad_()
                with torch.enable_grad():
                    mapped = sent + self._parts["mapping"](sent.float()).to(sent.dtype)
                    target = torch.tensor([label], device=sent.device)
                    loss = party.complete(mapped, input_ids=ids, labels=target).loss
                    views.append(_of_positions(torch.autograd.grad(loss, sent)[0])[0])
            found.append((torch.stack(views), torch.arange(classes, device=returned.device)))
        scale = torch.cat([views for views, _ in found]).square().mean().sqrt().clamp_min(1e-30)
        return [(views / scale, labels) for views, labels in found]

    def _fitted(self, seen: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
        """A fresh adversary, fitted to rows (N, D) and their targets (N,): it names the target of each row."""
        kinds, numbers = targets.unique(return_inverse=True)  # no other can be learned
        with seeded(self.seed + 1), torch.enable_grad():
            fresh = perceptron(seen.shape[1], self.hidden, len(kinds)).to(seen.device)
            optimizer = torch.optim.Adam(fresh.parameters(), 0.01)
            for _ in range(REFITTING):
                optimizer.zero_grad()
                cross_entropy(fresh(seen), numbers).backward()
                optimizer.step()
        return lambda rows: kinds[fresh(rows).argmax(-1)]

    def state(self) -> dict[str, Tensor]:
        """Mapping and adversary."""
        return state_of(self._parts)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if not len(self._parts):
            self._build(state["mapping.0.weight"].shape[1], len(state["adversary.2.bias"]))
        read_state(self._parts, state)

    def private_state(self) -> dict[str, Tensor]:
        """The moments of the adversary's optimizer."""
        if self._optimizer is None:
            return {}
        rows = self._optimizer.state_dict()["state"].items()
        return {f"{n}.{name}": value for n, row in rows for name, value in row.items()}

    def load_private_state(self, state: Mapping[str, Tensor]) -> None:
        if self._optimizer is None:  # not built yet, so there is nothing to go on with
            return
        whole = self._optimizer.state_dict()
        whole["state"] = {}
        for key, value in state.items():
            number, name = key.split(".", 1)
            whole["state"].setdefault(int(number), {})[name] = value
        self._optimizer.load_state_dict(whole)


def _of_positions(gradient: Tensor) -> Tensor:  # (B, T, D) or (B, D) -> (B, D)
    return gradient.sum(1) if gradient.dim() == 3 else gradient


def _accuracy(named: Tensor, targets: Tensor) -> float:
    return float((named == targets).float().mean())


@attrs.frozen(eq=False)
class MappingMechanism(Mechanism):
    """A known function: an attacker applies it to what she tries."""

    mapping: nn.Module

    def expected(self, hidden: Tensor) -> Tensor:
        mapping = self.mapping.to(hidden.device)  # where an attacker's head is
        with gradients_of(hidden):
            found: Tensor = hidden + mapping(hidden.float()).to(hidden.dtype)
        return found
