"""Runs of the data party's local part that send nothing: to find roles, and for an attacker's head and tail."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from attrs import define, field
from torch import Tensor, nn
from transformers.cache_utils import Cache

from vflair_core.communication.execution import Execution
from vflair_core.communication.message import Role
from vflair_core.communication.program import Program
from vflair_core.errors import PartitionError
from vflair_core.parties.data_party import remote_cache
from vflair_core.parties.data_party.inputs import all_ones, cache_in
from vflair_core.parties.data_party.probes import FixedAnswer, Probe, ProbeStopped
from vflair_core.parties.data_party.recorder import Recorder
from vflair_core.parties.data_party.roles import Call, find_roles
from vflair_core.partition.stages import Stage

MAX_PATHS = 4096  # remembered ways of calling the model; forgetting them costs time only


@define(eq=False)
class DryRuns:
    """Runs of the data party's local part in which a `probe` answers instead of the model party, and what they showed."""

    model: nn.Module
    recorder: Recorder
    stages: tuple[Stage, ...]
    disclose: tuple[str, ...]
    roles: dict[str, tuple[Role, ...]] = field(factory=dict)  # of what a program takes, by its id
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

    def past(self, inputs: dict[str, Any]) -> Cache | None:
        """Copy the cache before a call takes a path not seen yet: its roles must be found from there."""
        cache = cache_in(inputs)
        if cache is None:
            return None
        length, ids = remote_cache.length_of(cache), inputs.get("input_ids")
        given = tuple(key for key, value in inputs.items() if value is not None)
        positions = None if ids is None else ids.shape[-1]
        path = (given, length == 0, positions == 1, self.model.training, all_ones(inputs))
        if path in self.seen_paths:
            return None
        if len(self.seen_paths) >= MAX_PATHS:
            self.seen_paths.clear()
        self.seen_paths.add(path)
        with torch.inference_mode(False), torch.no_grad():
            return copy.deepcopy(cache)

    def find_roles(
        self, call: Call | None, program: Program, leaves: list[Tensor], cache: Cache | None
    ) -> tuple[Role, ...]:
        """Return the roles of what `program` takes in `call`, and remember them."""
        if call is None:
            raise PartitionError(
                "The model party was reached by a call of an inner module before the whole model was called "
                "this way. Call data_party.model(...) once first."
            )
        if cache is not None and call.past is None:
            call = attrs.evolve(call, past=self._rewound(cache, call.inputs, program.modules))
        roles = find_roles(self.model, call, program, leaves, self.disclose, self.probing)
        self.roles[program.id] = roles
        return roles

    def _rewound(
        self, cache: Cache, inputs: dict[str, Any], modules: Sequence[str]
    ) -> Cache | None:
        if cache_in(inputs) is None:
            return None
        with torch.inference_mode(False), torch.no_grad():
            past = copy.deepcopy(cache)
            ids = inputs.get("input_ids")
            new = ids.shape[-1] if ids is not None else inputs["inputs_embeds"].shape[1]
            remote_cache.advance(past, new, self.recorder.layers(modules))
            past.crop(-new)
        return past
