"""Runs of the data party's local part that send nothing: to find roles, and for an attacker's head and tail."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from attrs import define, field
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from vflair_core.communication.execution import Execution
from vflair_core.communication.message import Role
from vflair_core.communication.program import Program
from vflair_core.errors import DefenseError, PartitionError
from vflair_core.parties.data_party import remote_cache
from vflair_core.parties.data_party.inputs import all_ones, cache_in, new_positions
from vflair_core.parties.data_party.probes import FixedAnswer, Probe, ProbeStopped
from vflair_core.parties.data_party.recorder import Recorder
from vflair_core.parties.data_party.roles import (
    Call,
    find_roles,
    form_of,
    once_more,
    unfixed_by_embeddings,
)
from vflair_core.partition.stages import Stage

MAX_PATHS = 4096  # remembered ways of calling the model; forgetting them costs time only
FIXED = ("structure", "weight")  # roles of what does not depend on the text
MAX_FORMS = (
    16  # whose masks and positions are held, to be compared with those of the next call of the form
)


@define(eq=False)
class DryRuns:
    """Runs of the data party's local part in which a `probe` answers instead of the model party, and what they showed."""

    model: PreTrainedModel
    recorder: Recorder
    stages: tuple[Stage, ...]
    disclose: tuple[str, ...]
    # Proven roles of what a program takes, by its id and how many positions the proof saw change.
    roles: dict[tuple[str, int], tuple[Role, ...]] = field(factory=dict)
    _embedded: set[Any] = field(
        factory=set
    )  # forms in which text reaches what is sent by embeddings only
    # Structure and weights of the forms of calls met last; apart, of those with a past, of which each step of a
    # generation is one, so that they do not push out the others, which are run again when they were forgotten.
    _met: OrderedDict[Any, list[Tensor]] = field(factory=OrderedDict)
    _met_with_past: OrderedDict[Any, list[Tensor]] = field(factory=OrderedDict)
    probe: Probe | None = None  # of the run under way
    seen_paths: set[Any] = field(factory=set)

    @contextmanager
    def probing(self, probe: Probe) -> Iterator[None]:
        """While this lasts, nothing is sent: `probe` answers instead of the model party."""
        before, calls = self.probe, self.recorder.calls.copy()
        self.probe = probe
        self.recorder.begin()
        try:
            yield
        finally:
            self.probe = before
            self.recorder.only_first = False
            self.recorder.reset()
            self.recorder.calls.clear()  # stubs of shared blocks count in this very object
            self.recorder.calls.update(calls)

    def smashed(self, inputs: dict[str, Any]) -> Tensor:
        """Run the head alone and return what it would send."""
        cache, layers = cache_in(inputs), self.recorder.layers(self.stages[-1].names)
        if cache is not None:
            remote_cache.attach(cache, layers, lambda _id: None)
        try:
            with self.probing(Probe()):
                self.recorder.only_first = True  # what follows would only cost time
                self.model(**inputs)
        except ProbeStopped as captured:
            hidden = captured.first_argument()
            if cache is not None:
                remote_cache.advance(cache, hidden.shape[1], layers)
            return hidden
        raise PartitionError("The model was run without reaching the model party.")

    def returned(self, inputs: dict[str, Any], body: nn.Module) -> Tensor:
        """Run the head, and then in `body` what the model party would be asked to run, with gradients through both."""
        try:
            with self.probing(Probe()):
                self.model(**inputs)
        except ProbeStopped as captured:

            def call(name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
                return body.get_submodule(name)(*args, **kwargs)

            return Execution(call, captured.tensors).run(captured.program)[0]
        raise PartitionError("The model was run without reaching the model party.")

    def complete(self, returned: Tensor, inputs: dict[str, Any]) -> Any:
        """Run the tail alone on what the model party would have returned."""
        with self.probing(FixedAnswer(returned)):
            return self.model(**inputs)

    def call(
        self, forward: Callable[..., Any], inputs: dict[str, Any], random: Sequence[Tensor]
    ) -> Call:
        """Note a call about to be made; with a copy of its cache if roles must be found from there."""
        cache, training = cache_in(inputs), self.model.training
        length = 0 if cache is None else remote_cache.length_of(cache)
        new = new_positions(inputs)
        call = Call(forward, inputs, None, random, new, new + length, training)
        if cache is None:
            return call
        path = self._path(call)
        if path in self.seen_paths and length:
            return call  # an empty one costs nothing to copy
        if len(self.seen_paths) >= MAX_PATHS:
            self.seen_paths.clear()
        self.seen_paths.add(path)
        return attrs.evolve(call, past=remote_cache.copied(cache))

    def _path(self, call: Call) -> tuple[Any, ...]:
        given = tuple(key for key, value in call.inputs.items() if value is not None)
        masked = all_ones(call.inputs)
        return (given, not call.has_past, call.new == 1, call.training, masked, call.reach)

    def roles_of(
        self, call: Call | None, program: Program, leaves: list[Tensor], cache: Cache | None
    ) -> tuple[Role, ...]:
        """Return the roles of what `program` takes: found anew unless a proof is remembered that holds for `call`.

        Raises:
            LeakError: A tensor that is not a hidden state tells something of the text.
            PartitionError: An inner module was called before the whole model was.
        """
        known = self._remembered(call, program)
        if call is None:
            if known is None:
                raise PartitionError(
                    f"{', '.join(program.modules[:3])} is the model party's, and was called by itself, outside a call of the "
                    "model: what it is given cannot be told to depend on text or not. Call data_party.model(...), or the "
                    "inner model around it."
                )
            return known
        if known is None or not self._holds(known, call, program, leaves, cache):
            known = self._find_roles(call, program, leaves, cache)
            form = self._form(known, call, program, leaves)
            _note(self._met_like(call), form, _fixed(known, leaves))
        return known

    def _remembered(self, call: Call | None, program: Program) -> tuple[Role, ...] | None:
        if call is not None:
            return self.roles.get((program.id, call.reach))
        each = (roles for (known, _), roles in self.roles.items() if known == program.id)
        return next(each, None)

    def _find_roles(
        self, call: Call, program: Program, leaves: list[Tensor], cache: Cache | None
    ) -> tuple[Role, ...]:
        call = self._from_before(call, program, cache)
        found = find_roles(self.model, call, program, leaves, self.disclose, self.probing)
        if found.proven:
            self.roles[program.id, call.reach] = found.each
        else:
            self.roles.pop((program.id, call.reach), None)
            self.seen_paths.discard(self._path(call))
        return found.each

    def check_embeddings(
        self, call: Call, program: Program, roles: tuple[Role, ...], cache: Cache | None
    ) -> None:
        """See that the text reaches what is sent by the embeddings only, where a defense stands.

        Raises:
            DefenseError: Something else of the model reads the text.
        """
        given = tuple(key for key, value in call.inputs.items() if value is not None)
        parts = tuple(map(id, self.model.modules()))  # an adapter that comes later is a part
        form = (program.id, call.reach, given, parts)
        if form in self._embedded:
            return
        call = self._from_before(call, program, cache)
        if names := unfixed_by_embeddings(self.model, call, program, roles, self.probing):
            raise DefenseError(
                f"A defense stands at the token embeddings, and {', '.join(names)} would tell the text by another way: "
                f"it changes with {' or '.join(given)} when what the embeddings give does not. Use a defense that "
                "stands at what is sent."
            )
        self._embedded.add(form)

    def _from_before(self, call: Call, program: Program, cache: Cache | None) -> Call:
        """The call with the cache as it was before it."""
        if cache is None or call.past is not None:
            return call
        return attrs.evolve(call, past=self._rewound(cache, call.inputs, program.modules))

    def _holds(
        self,
        roles: tuple[Role, ...],
        call: Call,
        program: Program,
        leaves: list[Tensor],
        cache: Cache | None,
    ) -> bool:
        """Whether what does not depend on the text is what it was in an earlier call of the same form.

        A form that was not met before is run once with other text, unless there is a past: each step of a generation is
        a form of its own.
        """
        at_hand = _fixed(roles, leaves)
        if not at_hand:
            return True
        form = self._form(roles, call, program, leaves)
        before = self._met_like(call).get(form)
        if before is None and not call.has_past:
            call = self._from_before(call, program, cache)
            before = _fixed(roles, once_more(self.model, call, program, self.probing))
        if before is not None and not all(map(torch.equal, before, at_hand)):
            return False
        _note(self._met_like(call), form, at_hand)
        return True

    def _met_like(self, call: Call) -> OrderedDict[Any, list[Tensor]]:
        return self._met_with_past if call.has_past else self._met

    def _form(
        self, roles: tuple[Role, ...], call: Call, program: Program, leaves: list[Tensor]
    ) -> tuple[Any, ...]:
        """What a call has in common with one whose masks and positions must be the same."""
        described = tuple(
            (*leaf, tuple(tensor.shape))
            for role, leaf, tensor in zip(roles, program.leaves, leaves, strict=True)
            if role in FIXED
        )
        weights = sum(w._version for w in self.model.parameters()) if "weight" in roles else 0
        return form_of(call), described, weights

    def _rewound(
        self, cache: Cache, inputs: dict[str, Any], modules: Sequence[str]
    ) -> Cache | None:
        if cache_in(inputs) is None:
            return None
        with torch.inference_mode(False), torch.no_grad():
            past = remote_cache.copied(cache)
            ids = inputs.get("input_ids")
            new = ids.shape[-1] if ids is not None else inputs["inputs_embeds"].shape[1]
            remote_cache.advance(past, new, self.recorder.layers(modules))
            past.crop(-new)
        return past


def _note(met: OrderedDict[Any, list[Tensor]], form: Any, fixed: list[Tensor]) -> None:
    if form not in met:
        met[form] = [tensor.clone() for tensor in fixed]
    met.move_to_end(form)
    if len(met) > MAX_FORMS:
        met.popitem(last=False)


def _fixed(roles: tuple[Role, ...], leaves: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that do not depend on the text."""
    pairs = zip(roles, leaves, strict=True)
    return [leaf.detach() for role, leaf in pairs if role in FIXED]
