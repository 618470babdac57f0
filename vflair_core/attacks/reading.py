"""What an attack really reads of what it is shown: its tensors note when somebody takes something out of them.

To be handed a tensor is not to read it: an attack that can work on one of two observables asks for both and looks at one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from vflair_core.attacks.observables import Observables
from vflair_core.communication.transcript import Record

LENGTHS = "lengths"  # the seam that the form of a tensor is
SAVED = "saved"  # the data party's weights as they are now, which lie where it saves them
SEAMS = {  # what leaks by each observable; `rounds` are told apart by the roles of their tensors
    "smashed": "smashed",
    "releases": "smashed",
    "returned": "returned",
    "logits": "returned",
    "hidden_grad": "hidden_grad",
    "smashed_grad": "smashed_grad",
    "updates": "updates",
    "mask": LENGTHS,
    "lengths": LENGTHS,
    "share": LENGTHS,
}
ROLES = {  # what leaks by a tensor of each role; the norms are the model party's own
    **{role: role for role in ("smashed", "returned", "hidden_grad", "smashed_grad", "disclosed")},
    "structure": LENGTHS,
    "weight": "updates",
    "counterpart": "updates",
}
Note = Callable[[str], None]


def noted(name: str, shown: Any, seen: Observables, note: Note) -> Any:
    """Return what is `shown` under the name of an observable, so that `note` is told the seam of what is read of it.

    Of a model with two stacks what leaks by the second is another seam: ``smashed 2``.
    """
    if name == "rounds":
        stacks = seen.stacks()
        return [_noted_record(record, stacks[record.exchange], note) for record in shown]
    if name == "updates":
        return [{key: watched(grad, "updates", note) for key, grad in row.items()} for row in shown]
    stack = max(seen.stacks().values(), default=0) if name == "logits" else 0
    return watched(shown, of_stack(SEAMS[name], stack), note)


def _noted_record(record: Record, stack: int, note: Note) -> Record:
    seam = ROLES.get(record.role)
    if seam is None:
        return record
    return attrs.evolve(record, tensor=watched(record.tensor, of_stack(seam, stack), note))


def of_stack(seam: str, stack: int) -> str:
    """The name of a seam in a stack; those of the first have no number."""
    own = seam in ("smashed", "returned", "hidden_grad", "smashed_grad", "caches")
    return f"{seam} {stack + 1}" if stack and own else seam


def watched(tensor: Tensor, seam: str, note: Note) -> Tensor:
    """The same tensor, which tells `note` its seam when its numbers are read, and ``lengths`` when its form is."""
    seen = tensor.as_subclass(Watched)
    seen.seam, seen.note = seam, note
    return seen


class Watched(Tensor):
    """A tensor that notes what is read of it; what is computed from it is an ordinary tensor.

    Noted is what goes through torch's functions, methods and attributes, which `torch.tensor`, `torch.vmap` and scripts of
    `torch.jit` do not.
    """

    seam: str
    note: Note

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for each in _watched_in((*args, *kwargs.values())):
            each.note(LENGTHS if func in FORM else each.seam)
        with torch._C.DisableTorchFunctionSubclass():
            answer = func(*args, **kwargs)
        if func is Tensor.detach and type(answer) is Tensor:  # which nn.Parameter asks to be alike
            return watched(answer, args[0].seam, args[0].note)
        return answer

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        self.note(self.seam)
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.note(self.seam)
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def _watched_in(values: Iterable[Any]) -> Iterator[Watched]:
    for value in values:
        if isinstance(value, Watched):
            yield value
        elif isinstance(value, list | tuple):
            yield from _watched_in(value)
        elif isinstance(value, dict):
            yield from _watched_in(value.values())


def _getters(*names: str) -> list[Any]:
    return [getattr(Tensor, name).__get__ for name in names]


# What tells the form of a tensor and none of its numbers.
FORM = {
    *_getters("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "grad_fn"),
    *_getters("is_leaf", "is_meta", "is_sparse", "is_quantized", "itemsize", "nbytes", "grad"),
    *(Tensor.__len__, Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement),
    *(Tensor.stride, Tensor.element_size, Tensor.is_contiguous, Tensor.storage_offset),
    *(Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex),
    *(torch.numel, Tensor.get_device, Tensor.requires_grad_),
    *(Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor),
    *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like),
    *(torch.randn_like, torch.randint_like),
}
