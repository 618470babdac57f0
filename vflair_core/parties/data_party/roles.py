"""Which tensors depend on the text: found by running the local part again with other text of equal length.

A tensor that stays the same is `structure` (or `weight`, when a local weight made it). A floating tensor
that changes and was computed from the embeddings is `smashed`, and every defense applies to it. Anything
else that changes, be it whole numbers, flags or numbers copied from ids, is the text itself, and is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from attrs import define
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from vflair_core.communication.message import Role
from vflair_core.communication.program import Program, tensors_of
from vflair_core.errors import LeakError
from vflair_core.parties.data_party.probes import Probe, ProbeStopped
from vflair_core.partition.partition import SCORED
from vflair_core.randomness import set_random_states

PROBES = 3


@define(eq=False)
class Call:
    """A call of the data party's model: what it takes to make it again with other text."""

    forward: Callable[..., Any]
    inputs: dict[str, Any]
    past: Any = None  # a copy of the cache as it was before the call
    random: Sequence[Tensor] = ()  # random states then, of the CPU and of every GPU in use


def find_roles(
    model: nn.Module,
    call: Call,
    program: Program,
    actual: list[Tensor],
    disclose: tuple[str, ...],
    probing: Callable[[Probe], AbstractContextManager[None]],
) -> tuple[Role, ...]:
    """Return the role of each tensor that `program` takes.

    Raises:
        LeakError: A tensor that is not a hidden state changes with the text and is not in `disclose`.
    """
    runs = []
    for seed in range(PROBES):
        probe = Probe(program.id, torch.Generator().manual_seed(seed))
        with probing(probe):
            runs.append(_run(model, call, probe))
    # The text at hand is one more witness: random text hardly ever holds the one word a mask may tell.
    columns = zip(*(run.tensors for run in runs), strict=True)
    return tuple(
        _role(leaf, list(column), tensor, disclose)
        for leaf, column, tensor in zip(program.leaves, columns, actual, strict=True)
    )


def _role(
    leaf: tuple[str, str, int], versions: list[Tensor], actual: Tensor, disclose: tuple[str, ...]
) -> Role:
    name, dtype, _ = leaf
    first = versions[0]
    if name == SCORED:
        return "disclosed"  # it is made of the labels, which a probe leaves where they are
    computed = any(version.requires_grad for version in versions)
    if all(torch.equal(first, other) for other in versions[1:]):
        if computed:
            return "weight"
        if torch.equal(first, actual):
            return "structure"
    if first.is_floating_point() and computed:
        return "smashed"
    if name in disclose:
        return "disclosed"
    raise LeakError(
        f"{name!r} ({dtype}, shape {tuple(first.shape)}) would carry the text across the cut: it changes when "
        "the tokens change and is not computed from their embeddings. Choose another cut, or, if you accept "
        f"this, say Partition(..., disclose=({name!r},)): it is recorded with every result.",
        tensor=name,
    )


def _run(model: nn.Module, call: Call, probe: Probe) -> ProbeStopped:
    """Run the local part with other text. Nothing is sent, and no state of the caller changes."""
    devices = list(range(torch.cuda.device_count()))
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices):
        set_random_states(call.random)  # the dropout of the call at hand
        inputs = {
            key: _copy_cache(call.past)
            if isinstance(value, Cache)
            else _other(model, key, value, probe)
            for key, value in call.inputs.items()
        }
        tables = [part for part in model.modules() if isinstance(part, nn.Embedding)]
        hooks = [table.register_forward_hook(_as_computed) for table in tables]
        try:
            call.forward(**inputs)
        except ProbeStopped as captured:
            return captured
        except Exception as error:
            raise LeakError(
                "The model cannot be run with other content of the same form, so what depends on the text is not "
                f"known: {type(error).__name__}: {error}."
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
    met = "; ".join(", ".join(other.modules) for other in probe.met) or "nothing"
    raise LeakError(
        "With other text of the same length the model makes other calls to the model party, so the calls "
        f"themselves would tell the text: {met}."
    )


def _as_computed(_module: nn.Module, _args: Any, output: Any) -> None:
    """Let what an embedding gives require gradients, so that all that comes of it does."""
    for tensor in tensors_of(output):
        if tensor.is_floating_point():
            tensor.requires_grad_()


def _copy_cache(cache: Cache | None) -> Cache | None:
    # A graph may hang on the cached states; a probe needs their values only.
    with torch.no_grad():
        return copy.deepcopy(cache)


def _other(model: nn.Module, key: str, value: Any, probe: Probe) -> Any:
    """Other content of equal form for an input that carries text; anything else as it is."""
    if isinstance(value, ModelOutput):
        return type(value)(**{k: _other(model, k, item, probe) for k, item in value.items()})
    if isinstance(value, (tuple, list)):
        return type(value)(_other(model, key, item, probe) for item in value)
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point() and "mask" not in key:
        noise = torch.randn(value.shape, generator=probe.generator).to(value)
        return torch.where(_places_in(value), value, noise).requires_grad_()
    if key.endswith("input_ids"):
        return _other_ids(model.config, value, probe.generator)
    if key == "labels" and value.dim() > 1 and not value.is_floating_point():  # tokens
        return torch.where(value < 0, value, _other_ids(model.config, value, probe.generator))
    if key == "labels":
        size = max(int(value.max()) + 1, 1)
        labels = torch.randint(size, value.shape, generator=probe.generator).to(value.device)
        return torch.where(value < 0, value, labels)
    return value.clone()


def _places_in(value: Tensor) -> Tensor:
    """Columns of whole numbers beside others: patches come with their row and column, which are form, not content."""
    whole = (
        (value == value.round()).flatten(0, -2).all(0) if value.dim() > 1 else torch.tensor(True)
    )
    return (whole & ~whole.all()).to(value.device)


def _other_ids(config: Any, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Random tokens in which padding and places of images stay, and some end tokens, which some models mask by."""
    text: Any = config.get_text_config()
    size = getattr(text, "vocab_size", None) or int(ids.max()) + 1
    named: set[int | None] = {getattr(text, "pad_token_id", None), *_places(config), *_places(text)}
    fixed = {token for token in named if token is not None}
    free = next(token for token in range(size) if token not in fixed)
    other = torch.randint(size, ids.shape, generator=generator).to(ids.device)
    end = getattr(text, "eos_token_id", None)
    end = end[0] if isinstance(end, (list, tuple)) else end
    if ids.dim() < 2 or (end is not None and end >= size):  # configs name ends that have no word
        end = None
    stays = torch.zeros_like(ids, dtype=torch.bool)
    for token in fixed:
        stays |= ids == token
        other = other.masked_fill(other == token, free)
    count = 0 if end is None else max(int((ids[0] == end).sum()), 1)
    if end is not None and count < ids.shape[-1]:  # some words must be free to differ
        scores = torch.rand(ids.shape, generator=generator).to(ids.device).masked_fill(stays, -1)
        other = other.masked_fill(other == end, free)
        other = other.scatter(1, scores.topk(count, dim=1).indices, end)
    return torch.where(stays, ids, other)


def _places(config: Any) -> set[int]:
    """Tokens that stand for an image, a video or sound: where they are is form, not content."""
    senses = ("image", "video", "audio", "vision")
    return {
        value
        for name, value in config.to_dict().items()
        if isinstance(value, int) and "token" in name and name.startswith(senses)
    }
