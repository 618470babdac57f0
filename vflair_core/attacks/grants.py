"""What can be granted to an attack, one row each: how it is made of the workspace, and when it is there at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import Parameter, Signature
from typing import Any

import torch
from attrs import frozen
from safetensors.torch import load_file

from vflair_core.attacks.adaptive import Side, watched
from vflair_core.attacks.attack import Launch
from vflair_core.attacks.evidence import Evidence, save_evidence
from vflair_core.attacks.halves import Head, Tail
from vflair_core.attacks.knowledge import ADAPTIVE, OBSERVABLES, granted, names_of
from vflair_core.attacks.reading import SAVED, noted
from vflair_core.attacks.scratch import scratch_folder
from vflair_core.attacks.workspace import Workspace, write_workspace
from vflair_core.tasks.task import Example


class GrantedKnowledge(Mapping[str, Any]):
    """Name → knowledge, for one attack in one pass: what was granted and is there, and no more."""

    def __init__(
        self, workspace: Workspace, attack: dict[str, Any], which: str, progress: Any
    ) -> None:
        self.workspace, self.attack, self.which, self.progress = workspace, attack, which, progress
        self.used: set[str] = set()  # of what makes an attack adaptive
        self.read: set[str] = set()  # seams that it has read
        self.seen = workspace.observables(which)
        observed = frozenset(self.seen)  # names: asking for one would make its tensor
        self.granted = frozenset(attack["granted"])
        self.names = [
            name
            for name in sorted(self.granted)
            if (GRANTS[name].there(self) if name in GRANTS else name in observed)
        ]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        known = GRANTS[name].load(self) if name in GRANTS else self.seen[name]
        if name in OBSERVABLES:
            return noted(name, known, self.seen, self.read.add)
        if name in ("head", "tail", "current_head", "current_tail") and self._is_current(name):
            self.read.add(SAVED)
        return watched(known, lambda: self.used.add(name)) if name in ADAPTIVE else known

    def _is_current(self, name: str) -> bool:
        """Whether a half is the data party's as it is now, which it has where its weights are saved."""
        return f"current_{name.removeprefix('current_')}" in self.granted

    @property
    def job(self) -> dict[str, Any]:
        """What is known of the arm beside tensors."""
        return self.workspace.job

    def latest(self, name: str) -> tuple[Head, Tail | None]:
        """Head and tail as they are now if ``current_`` `name` was granted, else as they were."""
        return self.workspace.current if self._is_current(name) else self.workspace.pretrained


@frozen
class Grant:
    """One piece of knowledge: how it is made of what lies in the workspace, and when it is there at all."""

    load: Callable[[GrantedKnowledge], Any]
    there: Callable[[GrantedKnowledge], bool] = lambda _: True


def _has_tail(k: GrantedKnowledge) -> bool:
    return k.workspace.partition.kind == "HBT"


def _defended(k: GrantedKnowledge) -> bool:
    """In the bypassed pass, and without defenses, there is nothing to know of them."""
    return k.which != "bypassed" and bool(k.job["defenses"])


def _works_on(side: Side) -> Callable[[GrantedKnowledge], bool]:
    return lambda k: _defended(k) and k.workspace.has_mechanism(side)


def _mechanism(side: Side) -> Callable[[GrantedKnowledge], Any]:
    def load(k: GrantedKnowledge) -> Any:
        told = k.workspace.mechanism(side, with_parameters="parameters" in k.granted)
        return told if "hidden_grad" in k.seen else told.inference()  # nothing was trained

    return load


def _file(name: str) -> Callable[[GrantedKnowledge], bool]:
    return lambda k: (k.workspace.folder / name.format(k.which)).exists()


def _auxiliary(
    name: str, made: Callable[[GrantedKnowledge, Any], Any] = lambda _, rows: rows
) -> Grant:
    """A list that the task or the experiment made, if it did."""
    return Grant(lambda k: made(k, k.job["auxiliary"][name]), lambda k: name in k.job["auxiliary"])


# All that can be granted beside what is seen of the messages (`observables.py`).
GRANTS: dict[str, Grant] = {
    # always
    "task_kind": Grant(lambda k: k.job["task_kind"]),
    "partition": Grant(lambda k: k.workspace.partition),
    "generator": Grant(lambda k: torch.Generator().manual_seed(k.attack["seed"])),
    "device": Grant(lambda k: k.workspace.device),
    "progress": Grant(lambda k: k.progress),
    "body": Grant(lambda k: k.workspace.body),
    # weights
    "tokenizer": Grant(lambda k: k.workspace.tokenizer),
    "embeddings": Grant(lambda k: k.workspace.embeddings),
    "pretrained_head": Grant(lambda k: k.workspace.pretrained[0]),
    "pretrained_tail": Grant(lambda k: k.workspace.pretrained[1], _has_tail),
    "pretrained_model": Grant(  # a classifier is no language-model prior
        lambda k: k.workspace.pretrained_model, lambda k: k.job["task_kind"] == "causal-lm"
    ),
    "current_head": Grant(lambda k: k.workspace.current[0]),
    "current_tail": Grant(lambda k: k.workspace.current[1], _has_tail),
    "head": Grant(lambda k: k.latest("head")[0]),
    "tail": Grant(lambda k: k.latest("tail")[1], _has_tail),
    # the defense
    "mechanism": Grant(_mechanism("mechanism"), _works_on("mechanism")),
    "parameters": Grant(_mechanism("mechanism"), _works_on("mechanism")),
    "gradient_mechanism": Grant(_mechanism("gradient_mechanism"), _works_on("gradient_mechanism")),
    "replacement": Grant(lambda k: k.workspace.replacement, _works_on("replacement")),
    # what else an experiment may make
    "public_texts": _auxiliary("public_texts"),
    "in_domain": _auxiliary("in_domain"),
    "few_labelled": _auxiliary("few_labelled", lambda _, rows: [Example(**row) for row in rows]),
    "known_labels": _auxiliary("known_labels", lambda _, rows: dict(rows)),
    "candidates": _auxiliary("candidates"),
    "queries": _auxiliary("queries", lambda k, _: k.workspace.queries(k.which)),
    "updates": Grant(lambda k: k.workspace.updates(k.which), _file("updates-{}.safetensors")),
    "adversary_state": Grant(
        lambda k: load_file(k.workspace.folder / "adversary.safetensors"),
        _file("adversary.safetensors"),
    ),
}


def knowledge_of(evidence: Evidence, knowledge: str | Iterable[str]) -> dict[str, Any]:
    """All that `knowledge` grants of some evidence, as the process of an attack would have it; for tests of attacks.

    Raises:
        AttackError: A name is not in the vocabulary, or a defense cannot be told.
    """

    def asking() -> None:
        """An attack that asks for all that it may."""

    names = [Parameter(name, Parameter.KEYWORD_ONLY) for name in sorted(granted(knowledge))]
    asking.__signature__ = Signature(names)  # type: ignore[attr-defined]
    with scratch_folder() as scratch:
        store, folder = scratch / "store", scratch / "granted"
        folder.mkdir()
        save_evidence(store, evidence)
        launch = Launch("test", asking, names_of(knowledge))
        write_workspace(folder, store, [launch], torch.get_num_threads(), torch.device("cpu"))
        workspace = Workspace(folder)
        (attack,) = workspace.job["attacks"]
        return dict(GrantedKnowledge(workspace, attack, "main", lambda *_: None))
