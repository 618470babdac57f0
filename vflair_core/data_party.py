"""The data party: keeps the text, the labels and its layers, and talks to the model party."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn

from vflair_core import cache as caches
from vflair_core import protocol
from vflair_core.channel import Channel
from vflair_core.checkpoint import save_weights
from vflair_core.defense import Batch, Defense, Exchange
from vflair_core.errors import DefenseError, PartitionError
from vflair_core.message import Crossing, Kind, Message, Phase, Role
from vflair_core.program import Program
from vflair_core.roles import Call, Captured, find_roles

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache

    from vflair_core.absent import Recorder
    from vflair_core.partition import Partition


MAX_PATHS = 4096  # remembered ways of calling the model; forgetting them costs time only


class DataParty:
    """Owns `model`, which stays a transformers model: call it, train it, generate with it as always.

    Args:
        model: A transformers model whose modules `absent` are stand-ins (made by `split`).
        partition: The cut.
        channel: The way to the model party.
        absent: Names of the modules the model party holds, in call order.
        defenses: Applied in this order on the way out, in reverse on the way back.
        tokenizer: Needed for `encode` and `ask`.
        seed: Seed of the defenses' noise; None draws it from the operating system.
        untied: Weights that got a second copy because both sides use them.
    """

    recorder: Recorder
    order: tuple[str, ...] = ()  # names of all weights, in the order of the whole model

    def __init__(
        self,
        model: PreTrainedModel,
        partition: Partition,
        channel: Channel,
        absent: tuple[str, ...],
        *,
        defenses: Sequence[Defense] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int | None = None,
        untied: tuple[str, ...] = (),
    ) -> None:
        self.partition, self.channel, self.absent, self.untied = partition, channel, absent, untied
        self.tokenizer, self.defenses, self.seed = tokenizer, tuple(defenses), seed
        self.task_kind = "*"
        self.step = 0
        self.fingerprint = ""
        self.session = uuid.uuid4().hex
        self.bypass_defenses = False
        self.roles: dict[str, tuple[Role, ...]] = {}
        self._generators = [_generator(seed, n) for n in range(len(self.defenses))]
        self._registered: set[str] = set()
        self._released_graphs: list[int] = []
        self._released_caches: list[str] = []
        self._copied_caches: list[tuple[str, str]] = []
        self._exchanges = self._seq = 0
        self._call: Call | None = None
        self._last: Exchange | None = None
        self._begun: Exchange | None = None
        self._probing = False
        self._seen_paths: set[Any] = set()
        self.model = _hand_over_forward(model, self)
        embeddings = model.get_input_embeddings()
        embeddings.register_forward_hook(self._on_embeddings)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Weights by the names they have in the whole model."""
        return self.model.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Weights, in the order of the whole model."""
        return self.model.parameters()

    @property
    def disclosed(self) -> set[str]:
        """Tensors that crossed although they depend on the text, because the partition says they may."""
        crossing = any("disclosed" in roles for roles in self.roles.values())
        return set(self.partition.disclose) if crossing else set()

    def save(self, folder: str | Path) -> Path:
        """Write the weights this party owns, and nothing else, to ``data_party.safetensors``."""
        return save_weights(
            Path(folder) / "data_party.safetensors", self.model, self.fingerprint, self.step
        )

    # -- calling the model ------------------------------------------------------------------------------

    def run_forward(self, forward: Any, inputs: dict[str, Any]) -> Any:
        """Run the model's own forward with the defenses that act on whole batches around it."""
        if self._probing:
            return forward(**inputs)
        for defense in self._active("expand"):
            inputs = {
                **inputs,
                **defense.expand({k: v for k, v in inputs.items() if torch.is_tensor(v)}),
            }
        self.recorder.reset()
        self._call = Call(forward, inputs, self._past(inputs))
        try:
            outputs = forward(**inputs)
            if self.model.training and torch.is_grad_enabled() and self._last is not None:
                for defense in self._active("penalty"):
                    there = attrs.evolve(self._last, generator=self._generator_of(defense))
                    _add_penalty(outputs, defense.penalty(there), defense)
        finally:
            self._call = self._last = self._begun = None
        for defense in reversed(self._active("contract")):
            outputs = defense.contract(outputs)
        return outputs

    def smashed(self, **inputs: Any) -> Tensor:
        """Run the head alone and return the undefended hidden states it would send: (B, T, D).

        Nothing crosses. With a `past_key_values`, the local and the absent layers both advance.
        """
        cache = inputs.get("past_key_values")
        if cache is not None:
            caches.attach(cache, self._absent_layers(), lambda _id: None)
        self._probing = True
        try:
            self.model(**inputs)
        except Captured as captured:
            hidden = captured.first_argument()
            if cache is not None:
                caches.advance(cache, self._absent_layers(), hidden.shape[1])
            return hidden
        finally:
            self._probing = False
            self.recorder.reset()
        raise PartitionError("The model was run without reaching the model party.")

    def complete(self, returned: Tensor, **inputs: Any) -> Any:
        """Run the local tail on `returned` as if the model party had sent it, and return the outputs."""
        handover = self.recorder.handover
        self.recorder.handover = lambda _program, _leaves, _cache: [returned]
        self._probing = True
        try:
            return self.model(**inputs)
        finally:
            self._probing = False
            self.recorder.handover = handover
            self.recorder.reset()

    def _past(self, inputs: dict[str, Any]) -> Cache | None:
        """Copy the cache before a call takes a path not seen yet: its roles must be found from there."""
        cache = inputs.get("past_key_values")
        if cache is None:
            return None
        length, ids = cache.get_seq_length(), inputs.get("input_ids")
        given = tuple(key for key, value in inputs.items() if value is not None)
        positions = None if ids is None else ids.shape[-1]
        path = (given, length == 0, positions == 1, self.model.training, _all_ones(inputs))
        if path in self._seen_paths:
            return None
        if len(self._seen_paths) >= MAX_PATHS:
            self._seen_paths.clear()
        self._seen_paths.add(path)
        with torch.inference_mode(False), torch.no_grad():
            return copy.deepcopy(cache)

    def exchange(self, program: Program, leaves: list[Tensor], cache: Cache | None) -> list[Tensor]:
        """Take a finished program from the recorder and carry out the round."""
        if self._probing:
            raise Captured(program, leaves)
        roles = self.roles.get(program.id) or self._find_roles(program, leaves, cache)
        positions = _positions(leaves, roles)
        exchange, self._begun = self._begun or self._begin(positions), None
        self._last = exchange
        spec = None
        if cache is not None:
            remote = caches.attach(
                cache,
                self._absent_layers(),
                self._released_caches.append,
                lambda old, new: self._copied_caches.append((old, new)),
            )
            spec = {"id": remote.id, "deeds": list(remote.deeds)}
            if not remote.known:
                spec["layers"] = remote.layers
        returned = protocol.cross(self, exchange, program, leaves, roles, spec)
        if cache is not None:
            remote.deeds.clear()
            remote.known = True
            caches.advance(cache, self._absent_layers(), positions)
        return returned

    def _begin(self, positions: int) -> Exchange:
        """Number the next exchange. It begins at the embeddings if a defense stands there."""
        self._exchanges += 1
        inputs = self._call.inputs if self._call else {}
        phase = self._phase(inputs.get("past_key_values"))
        return Exchange(
            self._exchanges, self.step, phase, mask=_mask(inputs, positions), batch=inputs
        )

    def _absent_layers(self) -> list[int]:
        modules = (self.model.get_submodule(name) for name in self.absent)
        return sorted({index for module in modules for index in module.layers})  # type: ignore[union-attr]

    def _phase(self, cache: Cache | None) -> Phase:
        if self.model.training and torch.is_grad_enabled():
            return "train"
        if cache is None:
            return "eval"
        return "prefill" if getattr(cache, "vflair_remote", None) is None else "decode"

    def _find_roles(
        self, program: Program, leaves: list[Tensor], cache: Cache | None
    ) -> tuple[Role, ...]:
        if self._call is None:
            raise PartitionError(
                "The model party was reached by a call of an inner module before the whole model was called "
                "this way. Call data_party.model(...) once first."
            )
        call = self._call
        if cache is not None and call.past is None:
            call = attrs.evolve(call, past=self._rewound(cache, call.inputs))
        self._probing = True
        try:
            roles = find_roles(self.model, call, program, leaves, self.partition.disclose)
        finally:
            self._probing = False
            self.recorder.reset()
        self.roles[program.id] = roles
        return roles

    def _rewound(self, cache: Cache, inputs: dict[str, Any]) -> Cache | None:
        if inputs.get("past_key_values") is None:
            return None
        with torch.inference_mode(False), torch.no_grad():
            past = copy.deepcopy(cache)
            ids = inputs.get("input_ids")
            new = ids.shape[-1] if ids is not None else inputs["inputs_embeds"].shape[1]
            for index in self._absent_layers():
                past.layers[index].length += new  # type: ignore[union-attr]
            past.crop(-new)
        return past

    # -- defenses ---------------------------------------------------------------------------------------

    def defend(self, place: str, tensor: Any, exchange: Exchange, *, name: str, role: Role) -> Any:
        """Pass `tensor` through the method `place` of every defense that has one."""
        defenses = self._active(place)
        if not defenses:
            return tensor
        axes = _axes(tensor, exchange)
        incoming = place in ("on_returned", "on_smashed_grad")
        for defense in reversed(defenses) if incoming else defenses:
            self._check_support(defense, exchange.phase)
            if place == "on_smashed" and axes not in defense.axes:
                raise DefenseError(
                    f"{type(defense).__name__} cannot defend {name!r}: its axes are {axes!r} (shape "
                    f"{tuple(tensor.shape)}) and the defense knows {', '.join(sorted(defense.axes))}. Use "
                    "another cut or another defense."
                )
            there = attrs.evolve(
                exchange,
                name=name,
                role=role,
                axes=axes,
                generator=self._generator_of(defense),
            )
            tensor = getattr(defense, place)(tensor, there)
        return tensor

    def _generator_of(self, defense: Defense) -> torch.Generator:
        return next(g for d, g in zip(self.defenses, self._generators, strict=True) if d is defense)

    def _active(self, place: str) -> list[Defense]:
        if self.bypass_defenses:
            return []
        base = getattr(Defense, place)
        return [d for d in self.defenses if getattr(type(d), place) is not base]

    def _check_support(self, defense: Defense, phase: Phase) -> None:
        cell = (self.partition.kind, self.task_kind, phase)
        for supported in defense.supports:
            if all(
                "*" in (ours, theirs) or ours == theirs
                for ours, theirs in zip(cell, supported, strict=True)
            ):
                return
        cells = "; ".join(" × ".join(cell) for cell in sorted(defense.supports))
        raise DefenseError(
            f"{type(defense).__name__} does not support {' × '.join(cell)} (partition × task × phase). "
            f"It supports {cells}."
        )

    def _on_embeddings(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        if self._probing or self._call is None or not self._active("on_embeddings"):
            return None
        self._begun = self._begun or self._begin(output.shape[1])
        defended: Tensor = self.defend(
            "on_embeddings", output, self._begun, name="embeddings", role="smashed"
        )
        return defended

    # -- text in, text out ------------------------------------------------------------------------------

    def defend_text(self, text: str) -> str:
        """Pass one text through the defenses that change text."""
        for defense in self._active("on_text"):
            text = defense.on_text({"text": text})["text"]
        return text

    def defend_tokens(self, batch: Batch) -> Batch:
        """Pass a tokenised batch through the defenses that change tokens."""
        for defense in self._active("on_tokens"):
            batch = defense.on_tokens(batch)
        return batch

    def defend_labels(self, labels: Tensor) -> Tensor:
        """Pass labels through the defenses that change them."""
        exchange = Exchange(self._exchanges + 1, self.step, "train")
        defended: Tensor = self.defend("on_labels", labels, exchange, name="labels", role="smashed")
        return defended

    # -- messages ---------------------------------------------------------------------------------------

    def open(self, optimizer: Mapping[str, Any] | None = None) -> None:
        """Start a session with the model party; `optimizer` asks it to make one of its allow-list."""
        from vflair_core.counterparts import describe

        self._registered.clear()
        counterparts, weights = describe(self.defenses)
        meta: dict[str, Any] = {"fingerprint": self.fingerprint, "counterparts": counterparts}
        if optimizer is not None:
            meta["optimizer"] = dict(optimizer)
        self.request("open", None, weights, meta)

    def request(
        self,
        kind: Kind,
        exchange: Exchange | None,
        crossings: Sequence[Crossing],
        meta: Mapping[str, Any],
    ) -> Message:
        """Send one message of this session and return the reply."""
        graphs, gone, copies = (
            self._released_graphs[:],
            self._released_caches[:],
            self._copied_caches[:],
        )
        never = {new for _, new in copies} & set(gone)  # copied and dropped between two messages
        news = {
            "released_graphs": graphs,
            "released_caches": [key for key in gone if key not in never],
            "copied_caches": [pair for pair in copies if pair[1] not in never],
        }
        self._seq += 1
        reply = self.channel.request(
            Message(
                kind,
                self.session,
                self.step,
                exchange.number if exchange else 0,
                self._seq,
                exchange.phase if exchange else "control",
                tuple(crossings),
                {**meta, **{key: value for key, value in news.items() if value}},
            )
        )
        # Only now: a refused message released nothing. What was added meanwhile stays for the next one.
        del self._released_graphs[: len(graphs)], self._released_caches[: len(gone)]
        del self._copied_caches[: len(copies)]
        if "program" in meta:
            self._registered.add(meta["id"])
        return reply

    def forward_meta(
        self, program: Program, *, grad: bool, wants: list[int], cache: dict[str, Any] | None
    ) -> dict[str, Any]:
        """What a forward message says beside its tensors; a program is spelt out once per session."""
        meta: dict[str, Any] = {
            "id": program.id,
            "grad": grad,
            "wants": wants,
            "training": self.model.training,
            "cache": cache,
        }
        device = self.model.device.type
        if torch.is_autocast_enabled(device):
            meta["autocast"] = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
        if program.id not in self._registered:
            meta["program"] = program.to_wire()
        return meta

    def release(self, exchange: int) -> None:
        """Tell the model party, with the next message, that no backward will come for `exchange`."""
        self._released_graphs.append(exchange)


def _add_penalty(outputs: Any, penalty: Tensor | None, defense: Defense) -> None:
    if penalty is None or not isinstance(outputs, dict):
        if penalty is not None:
            raise DefenseError(
                f"{type(defense).__name__} adds to the loss, which a tuple of outputs does not name: call the "
                "model with return_dict=True."
            )
        return
    if outputs.get("loss") is not None:
        outputs["loss"] = outputs["loss"] + penalty


def _hand_over_forward(model: PreTrainedModel, party: DataParty) -> PreTrainedModel:
    """Give the model a class of its own whose forward goes through the party; all else stays inherited."""
    original = type(model)
    names = [name for name in inspect.signature(original.forward).parameters if name != "self"]

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(zip(names, args, strict=False)) | kwargs
        return party.run_forward(functools.partial(original.forward, self), inputs)

    model.__class__ = type(
        original.__name__, (original,), {"forward": forward, "__module__": __name__}
    )
    return model


def _generator(seed: int | None, index: int) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        digest = hashlib.sha256(f"defense {index} {seed}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:7], "little"))
    return generator


def _positions(leaves: list[Tensor], roles: tuple[Role, ...]) -> int:
    hidden = [leaf for leaf, role in zip(leaves, roles, strict=True) if role == "smashed"]
    return hidden[0].shape[1] if hidden and hidden[0].dim() > 1 else 1


def _mask(inputs: Mapping[str, Any], positions: int) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return mask[:, -positions:] if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _all_ones(inputs: Mapping[str, Any]) -> bool | None:
    mask = inputs.get("attention_mask")
    return bool(mask.all()) if isinstance(mask, Tensor) else None


def _axes(tensor: Tensor, exchange: Exchange) -> str:
    """Name the dimensions: B and T by the batch at hand, D the last one, ? where nothing fits."""
    ids = exchange.batch.get("input_ids")
    if ids is None:
        ids = exchange.batch.get("inputs_embeds")
    if ids is None or ids.dim() < 2 or tensor.dim() < 2:
        return "BTD"[: tensor.dim()]
    batch, positions = ids.shape[:2]
    if tensor.dim() == 3 and tuple(tensor.shape[:2]) == (batch, positions):
        return "BTD"
    if tensor.dim() == 3 and tuple(tensor.shape[:2]) == (positions, batch):
        return "TBD"
    return "BD" if tensor.dim() == 2 and tensor.shape[0] == batch else "?" * tensor.dim()
