"""Every call of the data party's model, from inputs to outputs: the exchanges it takes, and the defenses around it.

The model runs its own forward. A stub that is reached records (`recorder.py`); when a program is complete, `exchange`
takes it through one round (`round.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from vflair_core.communication.connection import Connection
from vflair_core.communication.locks import Lock
from vflair_core.communication.message import Phase
from vflair_core.communication.program import Program
from vflair_core.defenses.account import Account
from vflair_core.defenses.defense import Exchange
from vflair_core.defenses.pipeline import Defenses
from vflair_core.errors import DefenseError, PartitionError
from vflair_core.parties.data_party import remote_cache
from vflair_core.parties.data_party.cache_guard import guarded
from vflair_core.parties.data_party.deferred import realised
from vflair_core.parties.data_party.dry_runs import DryRuns
from vflair_core.parties.data_party.embeddings import defending_embeddings
from vflair_core.parties.data_party.inputs import (
    RowPlacement,
    answer_mask,
    cache_in,
    learnt_of,
    mask_of,
    placed,
    positions_of,
    repeated,
    rows_of,
)
from vflair_core.parties.data_party.interception import (
    check_trainable,
    hand_over_forward,
    hand_over_parts,
    token_tables,
)
from vflair_core.parties.data_party.loss_gate import through_gates
from vflair_core.parties.data_party.recorded_outputs import check_recorded, recorded_elsewhere
from vflair_core.parties.data_party.recorder import Recorder
from vflair_core.parties.data_party.releases import ReleaseCounts, remember_owners
from vflair_core.parties.data_party.roles import Call
from vflair_core.parties.data_party.round import LossScale, round_trip
from vflair_core.parties.data_party.scored_positions import only_scored
from vflair_core.parties.data_party.stubs import put_stubs
from vflair_core.partition.adapter_state import OFF, AdapterStates, adapters_in
from vflair_core.partition.partition import Partition
from vflair_core.partition.stages import Stage, names_in, stage_of
from vflair_core.randomness import random_states
from vflair_core.tasks.collation import digests_of, is_defended


class ModelCalls:
    """Takes the model's forward over, and remembers what lies between the exchanges of one call.

    Args:
        model: A transformers model; it keeps its local modules, and stubs come where `absent` ones were.
        partition: The cut.
        stages: What the model party runs in one exchange each, in call order.
        absent: The modules of `stages` by name; only their structure is used.
        local: Blocks that both parties need: for each call, whether it is made here.
        connection: To the model party.
        defenses: The data party's.

    Raises:
        PartitionError: A defense stands at the embeddings, and the model has none.
    """

    sent: RowPlacement | None = None  # how the rows of the last call crossed

    def __init__(
        self,
        model: PreTrainedModel,
        partition: Partition,
        stages: tuple[Stage, ...],
        absent: Mapping[str, nn.Module],
        local: Mapping[str, tuple[bool, ...]],
        connection: Connection,
        defenses: Defenses,
    ) -> None:
        self.partition, self.stages = partition, stages
        self.connection, self.defenses = connection, defenses
        self.loss_scaling = LossScale()
        self.lock = Lock()
        self.exchanges = 0  # forwards across the cut so far
        self._call: Call | None = None
        self._last: Exchange | None = None
        self._done: list[Exchange] = []  # all of the call at hand
        self._begun: Exchange | None = None
        self._account = Account(type(model).__name__)
        self.counts = ReleaseCounts()
        # Tensors that were sent, by role, and exchanges that were bypassed.
        self.crossed: Counter[str] = Counter()
        # Of private text: what crossed in either direction by role and stack, every ``exchange``, and those with a ``cache``.
        self.crossed_by_stack: Counter[tuple[str, int]] = Counter()
        self._asking = False
        self._dropping = True  # in train mode
        self._adapters, self._without_adapters = AdapterStates(model), False
        self._adapters.look()  # a model that is cut may have some
        self.model = hand_over_forward(
            model, self.run_forward, self.counts.generating, self._adapters.look
        )
        hand_over_parts(model, names_in(stages), self.run_part)
        self.recorder = Recorder(self.exchange, stages, picks=partition.only_scored)
        self._recorded = recorded_elsewhere(model, absent.values())
        stubs = put_stubs(model, absent, local, self.recorder.call, self.recorder.calls)
        self.recorder.absent.update(stubs)
        self.dry_runs = DryRuns(model, self.recorder, stages, partition.disclosing)
        if not token_tables(model) and defenses.at("on_embeddings"):
            raise PartitionError(
                f"{type(model).__name__} has no table of token embeddings for a defense to stand at."
            )

    # -- a call of the whole model, or of a part of it --------------------------------------------------

    def run_forward(self, forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """Run the model's own forward with the defenses that act on whole batches around it."""
        with self.lock:
            if self.dry_runs.probe is not None:
                return forward(**inputs)
            account = self._begin_account(type(self.model).__name__, inputs)
            number, phase = self.exchanges + 1, self._phase(cache_in(inputs))
            around = Exchange(number, self.connection.step, phase, account=account)
            inputs = self.defenses.expand(inputs, around)
            self.sent = self._how_sent(inputs, around)
            account.owners = placed(account.owners, self.sent.places, rows_of(inputs))
            with self._calling(forward, inputs) as call:
                outputs = self._defended_forward(call)
            return self.defenses.contract(outputs, around)

    def run_part(self, forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """Run an inner model that was cut: within a call of the whole as it is; alone, as a call of its own.

        `generate` calls the encoder of a sequence-to-sequence model alone, for example.
        """
        with self.lock:  # another thread's call is not this one's whole
            if self.dry_runs.probe is not None or self._call is not None:
                return forward(**inputs)
            if self.defenses.at("expand"):
                raise DefenseError(
                    f"{type(self.defenses.at('expand')[0]).__name__} adds rows to calls of the whole model; here a "
                    "part of it is called alone."
                )
            self._begin_account(_owner_of(forward), inputs)

            def whole(**given: Any) -> Any:  # of which nothing is left with the model party
                return realised(forward(**given), possible=True)

            with self._calling(whole, inputs) as call:
                return self._gated(whole(**call.inputs), labelled=False)

    def _defended_forward(self, call: Call) -> Any:
        trains = self.model.training and torch.is_grad_enabled()
        labels = call.inputs.get("labels")
        if not trains:  # labels pass defenses in training only, and the loss is charged then
            undefended = labels is not None and not self.defenses.at("on_labels")
            return self._gated(call.forward(**call.inputs), labelled=undefended)
        check_trainable(self.model)
        if labels is not None:
            labelled = {**call.inputs, "labels": self._defended_labels(labels)}
            call.inputs = only_scored(self.model, self.partition, labelled)
        outputs = call.forward(**call.inputs)
        for exchange in self._done:
            self.defenses.penalise(outputs, exchange)
        return self._gated(outputs, labelled=labels is not None)

    def _gated(self, outputs: Any, *, labelled: bool) -> Any:
        """Let gradients come of nothing but the loss, where defenses see its labels or add to it."""
        sees_loss = self.defenses.at("on_labels") or self.defenses.at("penalty")
        if self.counts.public or not (sees_loss and torch.is_grad_enabled()):
            return outputs
        self._account.gated = True
        return through_gates(outputs, self.defenses, self._account, labelled=labelled)

    @contextmanager
    def _calling(self, forward: Callable[..., Any], inputs: dict[str, Any]) -> Iterator[Call]:
        """While this lasts, exchanges belong to this call."""
        self.recorder.begin()
        random = random_states(self.model.device) if self.model.training else ()
        try:
            with guarded(cache_in(inputs)):
                self._call = self.dry_runs.call(forward, inputs, random)
                with self._defending(inputs):
                    yield self._call
        finally:
            self._call = self._last = self._begun = None
            self._done, self._account = [], Account("a layer of the model party")

    @contextmanager
    def _defending(self, inputs: dict[str, Any]) -> Iterator[None]:
        """While this lasts, the defenses of embeddings act in the call at hand."""
        assert self._call is not None
        if not self.defenses.at("on_embeddings"):
            yield
            return
        apply = self._defended_embeddings
        with defending_embeddings(self.model, inputs, apply) as self._call.inputs:
            yield

    def _begin_account(self, called: str, inputs: dict[str, Any]) -> Account:
        owners = repeated(self.counts.owners_of(inputs), rows_of(inputs))
        self._account = Account(
            called, owners, bypassed=self.defenses.bypassed, public=self.counts.public
        )
        check_recorded(inputs, self._recorded)
        self._check(inputs)
        self._account.acted |= {"on_text", "on_tokens"}
        return self._account

    def _defended_embeddings(self, embeddings: Tensor) -> Tensor:
        if self.dry_runs.probe is not None:
            return embeddings
        self._begun = self._begun or self._begin(embeddings.shape[1])
        defended: Tensor = self.defenses.apply(
            "on_embeddings", embeddings, self._begun, name="embeddings", role="smashed"
        )
        return defended

    def _check(self, inputs: dict[str, Any]) -> None:
        """See that every defense supports the call, and that none which changes text is gone round."""
        self.defenses.check(self._phase(cache_in(inputs)))
        changing = self.defenses.at("on_text") + self.defenses.at("on_tokens")
        if changing and not is_defended(inputs.get("input_ids")) and not self._asking:
            raise DefenseError(
                f"{type(changing[0]).__name__} changes text before it is sent, and this batch did not come "
                "through it. Use data_party.encode(examples) or data_party.ask(texts)."
            )

    @contextmanager
    def answering(self) -> Iterator[None]:
        """While this lasts, the model may be given tokens: they have been through the defenses that act on text."""
        with self.lock:
            self._asking = True
            try:
                yield
            finally:
                self._asking = False

    def _how_sent(self, inputs: dict[str, Any], around: Exchange) -> RowPlacement:
        adding = self.defenses.at("contract")  # without, each row crosses in its own place
        numbers = torch.arange(rows_of(inputs), device=self.model.device if adding else None)
        shifted = not self.model.config.is_encoder_decoder
        return RowPlacement(
            self.defenses.places(numbers, around) if adding else numbers,
            learnt_of(inputs, shifted=shifted),
        )

    def _defended_labels(self, labels: Tensor) -> Tensor:
        if self.defenses.at("on_labels"):
            self._begun = self._begun or self._begin(labels.shape[-1])
            labels = self.defenses.apply("on_labels", labels, self._begun, name="labels")
        return labels

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """While this lasts, nothing is dropped at either party, though the model stays in its mode, train perhaps."""
        before = {module: module.training for module in self.model.modules()}
        mode, self._dropping = self.model.training, False
        self.model.eval()
        self.model.training = mode
        try:
            yield
        finally:
            self._dropping = True
            for module, training in before.items():
                module.training = training

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """While this lasts, the adapters of both parties are off."""
        before, self._without_adapters = self._without_adapters, True
        try:
            with adapters_in(self.model, OFF):
                yield
        finally:
            self._without_adapters = before

    # -- its exchanges ----------------------------------------------------------------------------------

    def exchange(
        self, program: Program, leaves: list[Tensor], cache: Cache | None, shapes: list[Tensor]
    ) -> list[Tensor]:
        """Take a finished program from the recorder and carry out the round."""
        if self.dry_runs.probe is not None:
            return self.dry_runs.probe.answer(program, leaves, shapes)
        roles = self.dry_runs.roles_of(self._call, program, leaves, cache)
        if self.defenses.at("on_embeddings") and self._call is not None:
            self.dry_runs.check_embeddings(self._call, program, roles, cache)
        positions = positions_of(leaves, roles)
        exchange, self._begun = self._begun or self._begin(positions), None
        self._last = exchange
        self._done.append(exchange)
        public = self.counts.public
        if not public:
            self.crossed.update(roles)
            self.crossed["bypassed"] += self.defenses.bypassed
        stack = next(n for n, s in enumerate(self.stages) if program.modules[0] in s.names)

        def count(*roles: str) -> None:
            self.crossed_by_stack.update((role, stack) for role in roles if not public)

        count("exchange", *roles, *(() if cache is None else ("cache",)))
        with self._remote(cache, program, positions) as spec:
            returned = round_trip(
                self.connection,
                self.defenses,
                self.counts,
                self.loss_scaling,
                exchange,
                program,
                leaves,
                roles,
                shapes,
                cache=spec,
                training=self.model.training and self._dropping,
                adapters=OFF if self._without_adapters else self._adapters.now(),
                count=count,
            )
        count(*["returned"] * len(returned))
        return returned

    @contextmanager
    def _remote(
        self, cache: Cache | None, program: Program, positions: int
    ) -> Iterator[dict[str, Any] | None]:
        """What the model party is told of a cache; when it has answered, both halves have grown."""
        if cache is None:
            yield None
            return
        remember_owners(cache, self._account.owners)
        remote = remote_cache.attached(cache) or remote_cache.attach(
            cache,
            self.recorder.layers(stage_of(program.modules, self.stages).names),
            self.connection.caches.append,
            lambda old, new: self.connection.copies.append((old, new)),
        )
        spec = {"id": remote.id, "deeds": list(remote.operations)}
        answered = self.connection.answered
        try:
            yield spec if remote.known else {**spec, "parts": remote.parts}
        finally:
            remote.exchanges += self.connection.answered > answered
        remote.operations.clear()
        remote.known = True
        remote_cache.advance(cache, positions, self.recorder.layers(program.modules))

    def _begin(self, positions: int) -> Exchange:
        """Number the next exchange. It begins at the embeddings if a defense stands there."""
        self.exchanges += 1
        inputs = self._call.inputs if self._call else {}
        phase = self._phase(cache_in(inputs))
        # A model with two stacks asks for its second after the first, or with what the first gave before.
        second = self._last is not None or inputs.get("encoder_outputs") is not None
        of_answer = second and bool(self.model.config.is_encoder_decoder)
        mask = answer_mask(inputs, positions) if of_answer else mask_of(inputs, positions)
        return Exchange(
            self.exchanges,
            self.connection.step,
            phase,
            mask=mask,
            batch=inputs,
            examples=self._examples_in(inputs),
            account=self._account,
        )

    def _examples_in(self, inputs: dict[str, Any]) -> tuple[bytes, ...]:
        """Of which example each row is; a decoy is one of its own."""
        owners = self._account.owners
        if not inputs or all(owners):
            return tuple(row[0].identity for row in owners)
        pairs = zip(owners, digests_of(inputs), strict=True)
        return tuple(row[0].identity if row else digest for row, digest in pairs)

    def _phase(self, cache: Cache | None) -> Phase:
        if self.model.training and torch.is_grad_enabled():
            return "train"
        if cache is None:
            return "eval"
        return "prefill" if remote_cache.attached(cache) is None else "decode"


def _owner_of(forward: Any) -> str:
    """The class whose forward was handed over."""
    return type(forward.args[0]).__name__
