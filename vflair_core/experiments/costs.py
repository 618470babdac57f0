"""What one arm costs: seconds by phase and party, what crossed, memory, tokens a second, parameters, convergence.

Nothing here is among the numbers of a result, and measuring changes none of them.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import torch
from attrs import define, field, frozen

from vflair_core.attacks.fence import fence_here
from vflair_core.attacks.isolation import attack_device
from vflair_core.errors import VflairError
from vflair_core.tasks.task import public_examples

if TYPE_CHECKING:
    from torch import Tensor

    from vflair_core.communication.channel import Channel
    from vflair_core.experiments.context import RunContext
    from vflair_core.experiments.experiment import Experiment
    from vflair_core.experiments.grading.grades import Grade
    from vflair_core.parties.data_party.party import DataParty
    from vflair_core.parties.model_party.party import ModelParty

WITHIN = 0.01  # of the best loss: converged
STEPS = "steps"  # of fine-tuning, without the evaluations between them


@frozen
class Spent:
    """What was spent until one moment, or between two.

    Attributes:
        seconds: Of the whole process.
        waited: Seconds between a request and its reply.
        handled: Of these, seconds in which a model party in this process answered; None of one elsewhere.
        tokens: What the model was given, padding left out.
    """

    seconds: float = 0.0
    waited: float = 0.0
    handled: float | None = 0.0
    tokens: int = 0

    def __add__(self, other: Spent) -> Spent:
        return self._with(other, 1)

    def __sub__(self, other: Spent) -> Spent:
        return self._with(other, -1)

    def _with(self, other: Spent, sign: int) -> Spent:
        known = self.handled is not None and other.handled is not None
        return Spent(
            self.seconds + sign * other.seconds,
            self.waited + sign * other.waited,
            self.handled + sign * other.handled if known else None,  # type: ignore[operator]
            self.tokens + sign * other.tokens,
        )

    @property
    def by_party(self) -> dict[str, float | None]:
        """Seconds of the data party, with all that this process does beside it, of the channel, and of the model party."""
        channel = self.waited - (self.handled or 0.0)
        own = self.seconds - self.waited
        return {"data_party": own, "channel": channel, "model_party": self.handled}


@define
class Meter:
    """Measures an arm while it runs; make it with `metered`."""

    party: DataParty
    held: dict[str, int]  # parameters of each party
    phases: dict[str, Spent] = field(factory=dict)
    each_step: list[float] = field(factory=list)  # seconds
    tokens: int = 0
    taken: Mapping[str, Any] = field(
        factory=dict
    )  # what was spent elsewhere on what this arm took over

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what is spent while this lasts to a phase; steps lie within one."""
        start = self.now()
        try:
            yield
        finally:
            spent = self.now() - start
            self.phases[phase] = self.phases.get(phase, Spent()) + spent
            if phase == STEPS:
                self.each_step.append(spent.seconds)

    def now(self) -> Spent:
        """What was spent until now."""
        channel = self.party.channel
        _synchronise()
        return Spent(time.perf_counter(), channel.seconds, channel.handled, self.tokens)

    def saw(self, _module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        """Count the tokens of a call of the model."""
        self.tokens += tokens_in(inputs)


@contextmanager
def metered(party: DataParty, model_party: ModelParty) -> Iterator[Meter]:
    """Measure what is spent while this lasts; the model is as it was afterwards."""
    owners: dict[str, DataParty | ModelParty] = {"data_party": party, "model_party": model_party}
    held = {name: sum(p.numel() for p in owner.parameters()) for name, owner in owners.items()}
    meter = Meter(party, held)
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
    hook = party.model.register_forward_pre_hook(meter.saw, with_kwargs=True)
    try:
        yield meter
    finally:
        hook.remove()


def tokens_in(inputs: Mapping[str, Any]) -> int:
    """Return how many tokens a call of a model is given, padding left out: those that it reads anew."""
    ids: Tensor | None = inputs.get("input_ids")
    ids = ids if ids is not None else inputs.get("decoder_input_ids")
    if ids is None:
        return 0
    mask: Tensor | None = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or "input_ids" not in inputs:
        return ids.numel()
    return int(
        mask[:, -ids.shape[1] :].sum()
    )  # of a generation the mask is of what came before too


def _synchronise() -> None:
    """Let what was begun on CUDA end, so that it counts where it was begun."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


# -- what it comes to -----------------------------------------------------------------------------------------


def cost_of(
    meter: Meter, grades: Sequence[Grade], e: Experiment, trained: Mapping[str, int]
) -> dict[str, Any]:
    """What the arm cost: seconds by phase and party, what crossed by role and direction, memory, and where attacks ran."""
    phases = meter.phases
    asked = [weight for d in meter.party.defenses.each for weight in d.parameters()]
    spent = {"fine-tuning": phases.get(STEPS, Spent()), "victims": phases["victims"]}
    own = {
        **_crossed(meter.party.channel),
        "seconds": {name: phase.seconds for name, phase in phases.items() if name != STEPS},
        "party_seconds": {
            name: phase.by_party for name, phase in phases.items() if name != "attacks"
        },
        "tokens": {name: each.tokens for name, each in spent.items()},
        "tokens_per_second": {name: _rate(each) for name, each in spent.items()},
        "peak_memory": peak_memory(),
        "parameters": {
            **{name: {"held": n, "trained": trained[name]} for name, n in meter.held.items()},
            "defenses": {"trained": sum(weight.numel() for weight in asked)},
        },
        **cost_of_attacks(e, grades),
    }
    return _together(own, meter.taken)


def _crossed(channel: Channel) -> dict[str, Any]:
    named = {f"{role} {way}": t for (role, way), t in channel.traffic.items()}
    return {
        "messages": channel.messages,
        "messages_by_kind": dict(channel.by_kind),
        "messages_by_role": {f"{role} {way}": n for (role, way), n in channel.carried.items()},
        "bytes": {name: t.bytes for name, t in named.items()},
        "rows": {name: t.rows for name, t in named.items()},
        "total_bytes": sum(t.bytes for t in named.values()),
        "channel_seconds": channel.seconds,
    }


def spent_so_far(meter: Meter) -> dict[str, Any]:
    """What an arm has cost before its fine-tuning, in the form of `cost_of`."""
    now, steps = meter.now(), meter.phases.get(STEPS, Spent())
    return {
        **_crossed(meter.party.channel),
        "seconds": {"fine-tuning": now.seconds},
        "party_seconds": {"fine-tuning": now.by_party},
        "tokens": {"fine-tuning": steps.tokens},
    }


def since(before: Mapping[str, Any], meter: Meter) -> dict[str, Any]:
    """What the fine-tuning of an arm cost that began with `spent_so_far`."""
    rate = _rate(meter.phases.get(STEPS, Spent()))
    spent = _together(spent_so_far(meter), before, sign=-1)
    return {**spent, "tokens_per_second": {"fine-tuning": rate}}


def _together(one: Mapping[str, Any], other: Mapping[str, Any], sign: int = 1) -> dict[str, Any]:
    """The sum of two costs, or what is left of the first; what one of them does not know is the other's."""
    both = dict(one)
    for name, value in other.items():
        if isinstance(value, Mapping):
            both[name] = _together(both.get(name, {}), value, sign)
        elif both.get(name) is None:
            both[name] = value
        elif value is not None:
            both[name] += sign * value
    return both


def cost_of_attacks(e: Experiment, grades: Sequence[Grade]) -> dict[str, Any]:
    """In which process attacks ran, behind which fence, on which device, and how long each took."""
    return {
        "attack_worker": fence_here() if e.isolation == "process" else "inline",
        "attack_device": str(attack_device(e.attack_device)),
        "attack_seconds": [grade.seconds for grade in grades],
        "course_seconds": [[point["seconds"] for point in grade.course] for grade in grades],
    }


def _rate(spent: Spent) -> float | None:
    return spent.tokens / spent.seconds if spent.tokens else None


def peak_memory() -> dict[str, int]:
    """Return the most bytes that this process held: resident since it began, and on each CUDA device since the arm did."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            peaks[f"cuda:{device}"] = torch.cuda.max_memory_allocated(device)
    return peaks


def convergence(
    losses: Sequence[float],
    evaluations: Sequence[Mapping[str, Any]],
    each_step: Sequence[float],
    per_epoch: int,
    *,
    evaluated: bool,
    within: float = WITHIN,
) -> dict[str, Any] | None:
    """Return when fine-tuning had converged: the first point whose loss is as good as the best, within a share of it.

    The loss is that of evaluations where there are some on the way, else the mean of the training losses over the epoch
    before a step. None where no point before the last one is as good (it was still going down, or never began), or one is not finite.

    Args:
        losses: Of each step, nats.
        evaluations: With `step` and `metrics`, the first before any step.
        each_step: Seconds of each step.
        per_epoch: Steps of an epoch.
        evaluated: Whether there are evaluations on the way.
        within: How much worse than the best counts as good, as a share of it.
    """
    if evaluated:
        points = [(row["step"], row["metrics"]["loss"]) for row in evaluations]
    else:
        windows = range(per_epoch, len(losses) + 1)
        points = [(end, sum(losses[end - per_epoch : end]) / per_epoch) for end in windows]
    if not all(math.isfinite(loss) for _, loss in points) or not points:
        return None
    best = min(loss for _, loss in points)
    step = next(step for step, loss in points if loss <= best + within * abs(best))
    if step == points[-1][0]:
        return None
    return {
        "step": step,
        "epoch": step / per_epoch,
        "seconds": sum(each_step[:step]),
        "of": "held-out loss" if evaluated else "mean training loss of an epoch",
        "within": within,
    }


def first_token(party: DataParty, setting: RunContext) -> dict[str, Any] | None:
    """Time the first token of a generation from a public prompt, or of a model that writes none one forward of it.

    It is done twice, and the second time counts: what is prepared once for each form of a call is not in it. Call it
    last: no random stream but the defenses' moves, and nothing is counted as an example's, but messages are.
    """
    if not setting.task.public:
        return None
    kind, longest = setting.task.kind, setting.experiment.train.max_length
    # Room for a new token; pictures may need all the rest.
    length = longest - 1 if kind == "image-text" else max(longest // 2, 2)
    (example,) = public_examples(setting.task, 1)
    reader = party.preprocessor(length)
    reader = attrs.evolve(reader, reading=attrs.evolve(reader.reading, render=None))
    training, writes = party.model.training, kind in ("causal-lm", "seq2seq", "image-text")
    party.model.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad(), party.public_text(), party.answering():
            if writes:
                batch = reader.prompts([example]).batch
            else:
                batch = reader.batch([example], first_only=True).batch
            return {"prompt_tokens": tokens_in(batch), **_timed(party, batch, writes=writes)}
    finally:
        party.model.train(training)


def _timed(party: DataParty, batch: Mapping[str, Any], *, writes: bool) -> dict[str, Any]:
    model: Any = party.model
    pad = getattr(party.tokenizer, "pad_token_id", None)
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": 1, "pad_token_id": pad}
    refused = "it is no model that writes"
    if writes and model.can_generate():
        try:
            seconds = [_seconds(lambda: model.generate(**batch, **options)) for _ in range(2)]
            return {"seconds": seconds[-1], "of": "generation"}
        except VflairError as error:  # a defense or a model party may know no generation
            refused = str(error)
    seconds = [_seconds(lambda: model(**batch, use_cache=False)) for _ in range(2)]
    return {"seconds": seconds[-1], "of": "forward", "why": refused}


def _seconds(call: Any) -> float:
    _synchronise()
    start = time.perf_counter()
    call()
    _synchronise()
    return time.perf_counter() - start
