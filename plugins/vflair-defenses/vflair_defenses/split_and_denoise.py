"""d_χ noise on what is sent, and a denoiser on what comes back, which knows the noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import attrs
import torch
from attrs import define, field, validators
from torch import Tensor, nn

from vflair_core import Defense, DefenseError, Exchange, Guarantee, Mechanism, Transcript
from vflair_defenses.d_chi import distance_noise, metric_guarantee, spread_of
from vflair_defenses.denoiser import TransformerDenoiser, fit
from vflair_defenses.learning import frozen_call, perceptron, read_state, seeded, state_of
from vflair_defenses.rows import clip_rows, drawing, is_off, public_ids, public_rows

if TYPE_CHECKING:
    from vflair_core import Party

KINDS = ("causal-lm", "classification", "regression", "question-answering")
Lesson = tuple[Tensor, Tensor, Tensor]  # what came back, what was sent before noise, the noise


@define(slots=False)
class SplitAndDenoise(Defense):
    """Clip rows, add n = r·u of η, and correct what comes back by a denoiser that is given both row and noise.

    Mai et al., "Split-and-Denoise: Protect large language model inference with local differential privacy", ICML
    2024, arXiv 2310.09130. The denoiser is trained on public text sent twice, clean and noisy; it works on the data
    party's side, so it costs no privacy. Differs from the paper: the sampler is the d_χ one (the published code
    draws a Gamma for each coordinate, about √(D/3) times too long, and its promise does not hold), it runs in
    training and in every decode step, and by default the denoiser is a perceptron for each position instead of a
    transformer of 6 layers: the noise of earlier positions reaches it only through what comes back. With `layers`
    it is a transformer, in a language model over earlier positions only; generation, where a step has one position,
    is then not supported. In HBT it corrects hidden states; in HT the class scores, from the mean row and noise;
    logits of a language model in HT are not supported.

    Attributes:
        eta: η per unit of distance; inf adds no noise.
        clip: Largest L2 norm of a row; 0 takes the largest of public text; inf does not clip.
        hidden: Width of the denoiser's hidden layer, or of its transformer.
        layers: Of the transformer (HBT); 0 is the perceptron.
        steps: Steps of its training, on all public rows at once.
        rate: Its learning rate (Adam).
        seed: Seed of its first weights.
    """

    eta: float = field(default=100.0, validator=validators.gt(0))
    clip: float = field(default=0.0, validator=validators.ge(0))
    hidden: int = field(default=128, validator=validators.ge(1))
    layers: int = field(default=0, validator=validators.ge(0))
    steps: int = field(default=200, validator=validators.ge(0))
    rate: float = field(default=3e-3, validator=validators.gt(0))
    seed: int = 0
    _facts: Tensor = field(
        init=False, factory=lambda: torch.zeros(3, dtype=torch.float64), eq=False
    )
    _denoiser: nn.Module | None = field(init=False, default=None, eq=False)
    _lessons: list[Lesson] | None = field(init=False, default=None, eq=False)
    _causal: bool = field(init=False, default=True, eq=False)

    covers = frozenset({"prompt", "response"})
    supports = frozenset(
        {("HT", "classification", "train"), ("HT", "classification", "eval")}
        | {("HBT", kind, "*") for kind in KINDS}
    )

    def __attrs_post_init__(self) -> None:
        if self.layers:
            phases = ("train", "eval")
            self.supports = frozenset({("HBT", kind, p) for kind in KINDS for p in phases})

    def prepare(self, public_texts: Sequence[str], data_party: Party) -> None:
        """Take the clip from public rows, and train the denoiser on public text, sent clean and noisy."""
        defenses = data_party.defenses
        defenses.check("eval")

        def make() -> dict[str, Tensor]:
            self._calibrate(public_texts, data_party)
            return self.state()

        made = data_party.remember(self, public_texts, make, noise=defenses.randomness)
        self.load_state(made)
        defenses.begin_anew(
            self
        )  # the model party can tell the noise of texts that were sent clean too

    def _calibrate(self, public_texts: Sequence[str], data_party: Party) -> None:
        rows = torch.cat([r[0] for r in public_rows("SplitAndDenoise", public_texts, data_party)])
        bound = self.clip or float(rows.norm(dim=-1).max())
        median, largest = spread_of(rows if math.isinf(bound) else clip_rows(rows, bound))
        self._facts = torch.tensor([bound, median, min(2 * bound, 1e300)], dtype=torch.float64)
        if math.isinf(bound):
            self._facts[2] = largest
        if math.isinf(self.eta):
            return
        texts = public_ids("SplitAndDenoise", public_texts, data_party)
        self._lessons, training = [], data_party.model.training
        data_party.model.eval()
        try:
            clean = [self._asked(data_party, ids) for ids in texts]
        finally:
            lessons, self._lessons = self._lessons, None
            data_party.model.train(training)
        self._causal = data_party.task_kind in ("*", "causal-lm")
        self._learn(lessons, clean, partial(data_party.tell, self))

    def _asked(self, party: Party, ids: Tensor) -> Tensor:
        """Send one public text clean, return what came back, and send it again with noise."""
        options = {} if party.task_kind == "classification" else {"use_cache": False}
        with torch.no_grad():
            with party.defenses.bypassing(), party.channel.tap(Transcript()) as transcript:
                party.model(input_ids=ids, **options)
            party.model(input_ids=ids, **options)
        (returned,) = [r.tensor for r in transcript.messages if r.role == "returned"]
        return returned

    def _learn(
        self, lessons: list[Lesson], clean: list[Tensor], tell: Callable[[int, int], None]
    ) -> None:
        features = [_features(*lesson) for lesson in lessons]  # (1, T, F) or (1, F)
        errors = [clean - lesson[0] for clean, lesson in zip(clean, lessons, strict=True)]
        with seeded(self.seed), torch.enable_grad():
            made = self._made(features[0].shape[-1], errors[0].shape[-1])
            optimizer = torch.optim.Adam(made.parameters(), self.rate)
            for number in range(self.steps):
                tell(number, self.steps)
                optimizer.zero_grad()
                self._error(made, features, errors).backward()
                optimizer.step()
        self._denoiser = made.requires_grad_(requires_grad=False)

    def _made(self, width: int, out: int) -> nn.Module:
        """A denoiser that corrects nothing yet."""
        if self.layers:
            return TransformerDenoiser(width, self.hidden, out, self.layers)
        made = perceptron(width, self.hidden, out)
        last = made[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return made

    def _error(self, made: nn.Module, features: list[Tensor], errors: list[Tensor]) -> Tensor:
        if isinstance(made, TransformerDenoiser):
            rows, wanted = ([each[0] for each in some] for some in (features, errors))
            return fit(made, rows, wanted, causal=self._causal)
        seen, error = (torch.cat([e.flatten(0, -2) for e in some]) for some in (features, errors))
        found: Tensor = (made(seen) - error).square().mean()
        return found

    def on_smashed(self, smashed: Tensor, exchange: Exchange) -> Tensor:  # (B, T, D)
        bound = float(self._ready()[0])
        if is_off(bound, 0.0 if math.isinf(self.eta) else 1.0):
            return smashed
        clipped = clip_rows(smashed, bound)
        if math.isinf(self.eta):
            return clipped.to(smashed.dtype)
        noise = distance_noise(clipped, self.eta, exchange)
        if "denoise" in exchange.memo:
            raise DefenseError(
                "SplitAndDenoise cannot tell which of several tensors an answer belongs to: this model sends "
                "more than one. Use dx-noise."
            )
        exchange.memo["denoise"] = (clipped.detach(), noise)
        return (clipped + noise).to(smashed.dtype)

    def on_returned(self, returned: Tensor, exchange: Exchange) -> Tensor:  # (B, T, D) or (B, C)
        if math.isinf(self.eta):
            return returned
        rows, noise = exchange.memo["denoise"]
        if returned.dim() == 2:
            rows, noise = (_pooled(tensor, exchange.mask) for tensor in (rows, noise))
        elif returned.shape[:2] != rows.shape[:2] or returned.shape[-1] != rows.shape[-1]:
            raise DefenseError(
                f"SplitAndDenoise denoises hidden states or class scores, not {tuple(returned.shape)} for rows "
                f"{tuple(rows.shape)}. Cut with a tail (HBT)."
            )
        if self._lessons is not None:
            self._lessons.append((returned.float(), rows, noise))
            return returned
        if self._denoiser is None:
            raise DefenseError(
                "SplitAndDenoise has no denoiser yet: call prepare(public_texts, data_party) first."
            )
        features, denoiser = (
            _features(returned.float(), rows, noise),
            self._denoiser.to(returned.device),
        )
        if isinstance(denoiser, TransformerDenoiser):
            change = frozen_call(denoiser, features, exchange.mask, causal=self._causal)
        else:
            change = frozen_call(denoiser, features)
        return returned + change.to(returned.dtype)

    def mechanism(self) -> Mechanism:
        """Clip and η once they are known; the denoiser acts on what comes back, and tells nothing."""
        bound = float(self._facts[0])
        return DxMechanism(bound, self.eta) if 0 < bound < math.inf else Mechanism()

    def state(self) -> dict[str, Tensor]:
        learned = {} if self._denoiser is None else state_of(self._denoiser)
        causal = torch.tensor(self._causal)
        return {"facts": self._facts, **({"causal": causal} if self.layers else {}), **learned}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        learned = {name: value for name, value in state.items() if name not in ("facts", "causal")}
        self._facts, self._causal = state["facts"], bool(state.get("causal", True))
        if learned:
            first, last = ("enter", "leave") if self.layers else ("0", "2")
            made = self._made(learned[f"{first}.weight"].shape[1], len(learned[f"{last}.bias"]))
            self._denoiser = made.requires_grad_(requires_grad=False)
            read_state(self._denoiser, learned)

    def guarantee(
        self, releases: int, messages: int = 0, gradients: int | None = None
    ) -> Guarantee:
        """One row is one release and costs η times its distance to the other, at most 2C."""
        bound, median, largest = self._ready().tolist()
        if math.isinf(bound):
            return Guarantee()
        return metric_guarantee("smashed rows", self.eta, median, largest, releases)

    def _ready(self) -> Tensor:
        if not self._facts[0]:
            raise DefenseError(
                "SplitAndDenoise has no clip yet: call prepare(public_texts, data_party) first."
            )
        return self._facts


@attrs.frozen
class DxMechanism(Mechanism):
    """Near is likely: the log-density falls by η per unit of distance."""

    bound: float
    eta: float
    in_nats = True

    def expected(self, hidden: Tensor) -> Tensor:
        return clip_rows(hidden, self.bound)

    def sample(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        if math.isinf(self.eta):
            return self.expected(hidden)
        return self.expected(hidden) + distance_noise(hidden, self.eta, drawing(generator))

    def log_likelihood(self, observed: Tensor, hidden: Tensor) -> Tensor:
        gap = (observed - self.expected(hidden)).norm(dim=-1)
        return -min(self.eta, 1e6) * gap  # without noise, rounding is left


def _features(returned: Tensor, rows: Tensor, noise: Tensor) -> Tensor:
    return torch.cat([returned, rows, noise], dim=-1)


def _pooled(rows: Tensor, mask: Tensor | None) -> Tensor:  # (B, T, D) -> (B, D)
    if mask is None:
        return rows.mean(1)
    weights = mask.to(rows.device, rows.dtype)[..., None]
    return (rows * weights).sum(1) / weights.sum(1).clamp_min(1)
