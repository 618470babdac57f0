"""Which tensors depend on the text: found by running the local part again with other text of equal length.

A tensor that stays the same is `structure` (or `weight`, when a local weight made it). A floating tensor
that changes and was computed from the embeddings is `smashed`, and every defense applies to it. Anything
else that changes, be it whole numbers, flags or numbers copied from ids, is the text itself, and is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from attrs import define
from torch import Tensor, nn
from transformers.cache_utils import Cache

from vflair_core.errors import LeakError
from vflair_core.message import Role
from vflair_core.program import Program

PROBES = 3


@define(eq=False)
class Captured(BaseException):
    """Stops a probe where the exchange would have happened, with what would have crossed."""

    program: Program
    tensors: list[Tensor]

    def first_argument(self) -> Tensor:
        """The tensor that the first call of the program is about: the hidden states."""
        _, _, args, kwargs = self.program.steps[0]
        trees = [*args, *(tree for _, tree in kwargs)]
        return self.tensors[next(tree[1] for tree in trees if tree[0] == "leaf")]


@define(eq=False)
class Call:
    """A call of the data party's model: what it takes to make it again with other text."""

    forward: Callable[..., Any]
    inputs: dict[str, Any]
    past: Any = None  # a copy of the cache as it was before the call


def find_roles(
    model: nn.Module, call: Call, program: Program, actual: list[Tensor], disclose: tuple[str, ...]
) -> tuple[Role, ...]:
    """Return the role of each tensor that `program` takes.

    Raises:
        LeakError: A tensor that is not a hidden state changes with the text and is not in `disclose`.
    """
    runs = [_probe(model, call, seed) for seed in range(PROBES)]
    for run in runs:
        if run.program.id != program.id:
            raise LeakError(
                "With other text of the same length the model makes other calls to the model party, so the "
                f"calls themselves would tell the text: {', '.join(run.program.modules)} against "
                f"{', '.join(program.modules)}."
            )
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
        f"this, say Partition(..., disclose=({name!r},)): it is recorded with every result."
    )


def _probe(model: nn.Module, call: Call, seed: int) -> Captured:
    """Run the local part with text number `seed`. Nothing is sent, and no state of the caller changes."""
    generator = torch.Generator().manual_seed(seed)
    devices = list(range(torch.cuda.device_count()))
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(0)  # equal dropout in all probes
        inputs = {key: _other(model, key, value, generator) for key, value in call.inputs.items()}
        if "past_key_values" in inputs:
            inputs["past_key_values"] = _copy_cache(call.past)
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        hook = embeddings.register_forward_hook(lambda _module, _args, out: out.requires_grad_())
        try:
            call.forward(**inputs)
        except Captured as captured:
            return captured
        finally:
            hook.remove()
    raise LeakError(
        "The model made no call to the model party when it was run again with other text."
    )


def _copy_cache(cache: Cache | None) -> Cache | None:
    # A graph may hang on the cached states; a probe needs their values only.
    with torch.no_grad():
        return copy.deepcopy(cache)


def _with_special(ids: Tensor, config: Any, generator: torch.Generator) -> Tensor:
    """Plant end-of-text tokens here and there: some models mask or pool by them."""
    end = config.eos_token_id
    if end is None:
        return ids
    first = end[0] if isinstance(end, (list, tuple)) else end
    chosen = torch.rand(ids.shape, generator=generator).to(ids.device) < 0.2
    return ids.masked_fill(chosen, first)


def _other(model: nn.Module, key: str, value: Any, generator: torch.Generator) -> Any:
    """Other content of equal form for an input that carries text; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point() and "mask" not in key:
        noise = torch.randn(value.shape, generator=generator)
        return noise.to(value).requires_grad_()
    if key.endswith("input_ids") or key == "labels":
        config = model.config.get_text_config()  # type: ignore[union-attr,operator]
        size = config.vocab_size if key != "labels" else max(int(value.max()) + 1, 1)
        ids = torch.randint(size, value.shape, generator=generator).to(value.device)
        if key != "labels":
            ids = _with_special(ids, config, generator)
        pad = config.pad_token_id
        if pad is not None and key != "labels":  # equal lengths: padding stays, no new padding
            ids = torch.where(ids == pad, (pad + 1) % size, ids)
            ids = torch.where(value == pad, value, ids)
        return ids if key != "labels" else torch.where(value < 0, value, ids)
    return value.clone()
