"""Which tensors depend on the text: found by running the local part again with other text of equal length.

A floating tensor is `smashed`, and every defense applies to it, until it is proven otherwise: that it stays the same
whatever words stand in the text, also where padding was, and is the tensor at hand. What is proven to stay the same is
`structure` (or `weight`, when a local weight made it). Anything that changes and was not computed from the embeddings,
be it whole numbers, flags or numbers copied from ids, is the text itself, and is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from attrs import define, frozen
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from vflair_core.communication.message import Role
from vflair_core.communication.program import Program, tensors_of
from vflair_core.errors import LeakError
from vflair_core.parties.data_party import remote_cache
from vflair_core.parties.data_party.interception import token_tables
from vflair_core.parties.data_party.other_text import OtherText, is_text, one_vector
from vflair_core.parties.data_party.probes import Probe, ProbeStopped
from vflair_core.partition.partition import SCORED
from vflair_core.randomness import set_random_states

PROBES = 3  # with text of the form at hand, at least
FREE_PROBES = 2  # with words drawn everywhere
MOST_PROBES = 16
WORDS = (
    16  # that must have been drawn where they were free, over all probes of equal form, for a proof
)
POSITIONS = 4  # of one text: what is proven of fewer holds for texts as short only

Probing = Callable[[Probe], AbstractContextManager[None]]


@define(eq=False)
class Call:
    """A call of the data party's model: what it takes to make it again with other text."""

    forward: Callable[..., Any]
    inputs: dict[str, Any]
    past: Any = None  # a copy of the cache as it was before the call
    random: Sequence[Tensor] = ()  # random states then, of the CPU and of every GPU in use
    new: int = 1  # positions that it reads anew
    visible: int = 0  # positions that this call reads, those in the cache included
    training: bool = False

    @property
    def has_past(self) -> bool:
        """Whether there is something in the cache already."""
        return self.visible > self.new

    @property
    def reach(self) -> int:
        """How many positions a proof must have seen change, to hold for calls like this one."""
        return min(self.visible, POSITIONS)


@frozen
class Roles:
    """The role of each tensor that a program takes, and whether the proof holds for other texts of the form."""

    each: tuple[Role, ...]
    proven: bool


def find_roles(
    model: PreTrainedModel,
    call: Call,
    program: Program,
    actual: list[Tensor],
    disclose: tuple[str, ...],
    probing: Probing,
) -> Roles:
    """Return the role of each tensor that `program` takes.

    Raises:
        LeakError: A tensor that is not a hidden state changes with the text and is not in `disclose`.
    """
    alike, proven = _of_equal_form(model, call, program, probing)
    free = list(_with_words_everywhere(model, call, program, probing))
    residual = program.residual
    roles = []
    for number, (leaf, tensor) in enumerate(zip(program.leaves, actual, strict=True)):
        evidence = _Evidence(
            [run.tensors[number] for run in alike], [run.tensors[number] for run in free], tensor
        )
        roles.append(_role(leaf, evidence, disclose, residual=number in residual))
    return Roles(tuple(roles), proven)


def _of_equal_form(
    model: PreTrainedModel, call: Call, program: Program, probing: Probing
) -> tuple[list[ProbeStopped], bool]:
    """Runs with other text of the form at hand, and whether enough words were free to differ in them."""
    runs: list[ProbeStopped] = []
    drawn: dict[str, int] = {}
    longest: dict[str, int] = {}
    for seed in range(MOST_PROBES):
        probe = Probe(program.id, torch.Generator().manual_seed(seed))
        text = OtherText(model.config, probe.generator)
        runs.append(_run(model, call, probe, text, probing))
        drawn = {key: drawn.get(key, 0) + count for key, count in text.drawn.items()}
        longest = {key: max(most, longest.get(key, 0)) for key, most in text.longest.items()}
        enough = all(count >= WORDS for count in drawn.values())
        if len(runs) >= PROBES and (enough or not all(drawn.values())):
            break
    held = call.visible - call.new  # positions in the cache
    # An end token may have taken one place.
    seen = all(most + held >= max(call.reach - 1, 1) for most in longest.values())
    return runs, bool(drawn) and enough and seen


def _with_words_everywhere(
    model: PreTrainedModel, call: Call, program: Program, probing: Probing
) -> Iterator[ProbeStopped]:
    """Runs with words drawn where padding and ends were, too. Text that the model cannot take shows nothing."""
    for seed in range(FREE_PROBES):
        probe = Probe(program.id, torch.Generator().manual_seed(MOST_PROBES + seed))
        text = OtherText(model.config, probe.generator, keeps_form=False)
        try:
            yield _run(model, call, probe, text, probing)
        except LeakError:
            continue


@frozen(eq=False)
class _Evidence:
    """What one tensor was in each run, and what it is in the call at hand."""

    alike: list[Tensor]
    free: list[Tensor]
    actual: Tensor

    @property
    def computed(self) -> bool:
        """Whether it was computed from embeddings or weights."""
        return any(version.requires_grad for version in (*self.alike, *self.free))

    def same(self, versions: Sequence[Tensor]) -> bool:
        """Whether it is what it is in all `versions`."""
        return all(torch.equal(self.actual, other) for other in versions)


def _role(
    leaf: tuple[str, str, int], evidence: _Evidence, disclose: tuple[str, ...], *, residual: bool
) -> Role:
    name, dtype, _ = leaf
    if name == SCORED:
        return "disclosed"  # it is made of the labels, which a probe leaves where they are
    if evidence.computed and evidence.actual.is_floating_point():
        # The text at hand is a witness too: random text hardly ever holds the one word that a value may tell.
        constant = evidence.free and evidence.same([*evidence.alike, *evidence.free])
        return "weight" if constant and not residual else "smashed"
    if evidence.same(evidence.alike):
        return "smashed" if residual and evidence.actual.is_floating_point() else "structure"
    if name in disclose:
        return "disclosed"
    raise LeakError(
        f"{name!r} ({dtype}, shape {tuple(evidence.actual.shape)}) would carry the text across the cut: it changes when "
        "the tokens change and is not computed from their embeddings. Choose another cut, or, if you accept "
        f"this, say Partition(..., disclose=({name!r},)): it is recorded with every result.",
        tensor=name,
    )


def _run(
    model: PreTrainedModel, call: Call, probe: Probe, text: OtherText, probing: Probing
) -> ProbeStopped:
    """Run the local part with other text. Nothing is sent, and no state of the caller changes."""
    devices = list(range(torch.cuda.device_count()))
    with (
        probing(probe),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices),
        _embedding(model, text),
    ):
        set_random_states(call.random)  # the dropout of the call at hand
        inputs = {
            key: _other_cache(call.past, text) if isinstance(value, Cache) else text.of(key, value)
            for key, value in call.inputs.items()
        }
        try:
            call.forward(**inputs)
        except ProbeStopped as captured:
            return captured.with_traceback(None)  # which holds all that the run held
        except Exception as error:
            raise LeakError(
                "The model cannot be run with other content of the same form, so what depends on the text is not "
                f"known: {type(error).__name__}: {error}."
            ) from error
    met = "; ".join(", ".join(other.modules) for other in probe.met) or "nothing"
    raise LeakError(
        "With other text of the same length the model makes other calls to the model party, so the calls "
        f"themselves would tell the text: {met}."
    )


@contextmanager
def _embedding(model: PreTrainedModel, text: OtherText) -> Iterator[None]:
    """While this lasts, what embeddings give requires gradients, so that all that comes of it does."""
    tables: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    hooks = [table.register_forward_hook(_as_computed) for table in tables]
    if text.fixes_embeddings:
        hooks += [table.register_forward_hook(_as_one_vector) for table in token_tables(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _as_computed(_module: nn.Module, _args: Any, output: Any) -> None:
    for tensor in tensors_of(output):
        if tensor.is_floating_point() and tensor.is_leaf:
            tensor.requires_grad_()


def _as_one_vector(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return one_vector(output)


def _other_cache(cache: Cache | None, text: OtherText) -> Cache | None:
    if cache is None:
        return None
    other = remote_cache.copied(cache)
    text.cache(other)
    return other


def unfixed_by_embeddings(
    model: PreTrainedModel, call: Call, program: Program, roles: Sequence[Role], probing: Probing
) -> list[str]:
    """Names of the smashed tensors that change with the text although what the embeddings give does not.

    A defense that stands at the embeddings does not see what changes them: something else of the model reads the text.
    """
    runs = []
    for seed in range(2):
        probe = Probe(
            program.id, torch.Generator().manual_seed(0)
        )  # one answer to what comes before
        words = torch.Generator().manual_seed(seed)
        text = OtherText(model.config, words, fixes_embeddings=True)
        runs.append(_run(model, call, probe, text, probing).tensors)
    found = zip(program.leaves, roles, *runs, strict=True)
    return [
        name
        for (name, *_), role, first, second in found
        if role == "smashed" and not torch.equal(first, second)
    ]


def once_more(
    model: PreTrainedModel, call: Call, program: Program, probing: Probing
) -> tuple[Tensor, ...]:
    """Return what `program` would take if other text of the form at hand were read."""
    probe = Probe(program.id, torch.Generator().manual_seed(0))
    run = _run(model, call, probe, OtherText(model.config, probe.generator), probing)
    return tuple(tensor.detach() for tensor in run.tensors)


def form_of(call: Call) -> bytes:
    """A digest of how many positions a call has, of its masks, and of what else is not its content.

    Masks that hide nothing and positions that count from the left say nothing.
    """
    width = call.visible
    digest = hashlib.blake2b(f"{width} {call.training}".encode())
    for key, value in sorted(call.inputs.items(), key=lambda item: item[0]):
        if not isinstance(value, Tensor) or is_text(key, value) or _is_usual(key, value, width):
            continue
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(
            value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        )
    return digest.digest()


def _is_usual(key: str, value: Tensor, visible: int) -> bool:
    if "mask" in key:
        return bool(value.all())
    if "position" in key and value.dim():
        if value.shape[-1] == 1:  # of every step of a generation
            return bool((value == visible - 1).all())
        counted = torch.arange(visible - value.shape[-1], visible, device=value.device)
        return torch.equal(value, counted.expand_as(value))
    return False
