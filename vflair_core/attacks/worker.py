"""Runs attacks in a process of their own: ``python -m vflair_core.attacks.worker FOLDER``.

The folder holds the transcript and the granted knowledge: no truth, no noise seed and no private text, and
neither does this process. It is no sandbox: an attack that breaks out of its process attacks the machine, not
the messages. Guesses are written back into the folder.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vflair_core.attacks.adaptive import Side, has_mechanism, told, told_replacement
from vflair_core.attacks.attack import launch
from vflair_core.attacks.guess_files import Course, Found, leave_so_far, write_guess
from vflair_core.attacks.halves import Head, Tail, halves
from vflair_core.attacks.knowledge import AUXILIARY, DEFENSE
from vflair_core.attacks.observables import Observables, Spot
from vflair_core.communication.channel import Transcript
from vflair_core.defenses.defense import Mechanism, Replacement
from vflair_core.errors import AttackError
from vflair_core.parties.split import Partition
from vflair_core.plugins import load_target
from vflair_core.tasks.task import Example

MARK = "@vflair "
Progress = Callable[[str, int, int], None]


class Room:
    """The folder, opened: every piece of knowledge is loaded when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job: dict[str, Any] = json.loads((folder / "job.json").read_text())
        self.partition = Partition(**self.job["partition"])
        self.device = torch.device(self.job["device"])  # of models; what crossed stays on the CPU

    def observables(self, which: str) -> Observables:
        """What crossed in one pass over the victims: ``"main"`` or ``"bypassed"``."""
        records = Transcript.load(self.folder / f"{which}.safetensors").messages
        return Observables(
            records,
            self.job["releases"][which],
            is_ht=self.partition.kind == "HT",
            victims=self.job["victims"][which],
            spots=self._spots(which),
        )

    def queries(self, which: str) -> list[tuple[str, Tensor]]:
        """Public texts, and the smashed data of each in one pass."""
        name, texts = f"queries-{which}", self.job["auxiliary"]["queries"]
        records = Transcript.load(self.folder / f"{name}.safetensors").messages
        seen = Observables(records, victims=len(texts), spots=self._spots(name))
        return list(zip(texts, seen.of_each("smashed"), strict=True))

    def _spots(self, name: str) -> list[Spot]:
        return [Spot(*spot) for spot in self.job["spots"].get(name, [])]

    def updates(self, which: str) -> list[dict[str, Tensor]]:
        """The gradients of the data party's weights, by name, for each victim or batch of them in a pass."""
        count = self.job["victims"][which] // self.job["update_batch"]
        rows: list[dict[str, Tensor]] = [{} for _ in range(count)]
        for key, value in load_file(self.folder / f"updates-{which}.safetensors").items():
            number, name = key.split(".", 1)
            rows[int(number)][name] = value
        return rows

    def model(self, weights: str) -> Any:
        """Build the model with one of the two sets of weights: ``"pretrained"`` or ``"current"``."""
        import transformers

        config = transformers.AutoConfig.from_pretrained(self.folder)
        model = getattr(transformers, self.job["model_class"])(config)
        there = load_file(self.folder / f"{weights}.safetensors")
        odd = model.load_state_dict(there, strict=False)
        if odd.unexpected_keys or (odd.missing_keys and weights != "body"):
            raise AttackError(f"The {weights} weights do not fit {self.job['model_class']}: {odd}.")
        return model.eval().requires_grad_(False)

    @cached_property
    def pretrained(self) -> tuple[Head, Tail | None]:
        return halves(self.model("pretrained"), self.partition, self.device)

    @cached_property
    def current(self) -> tuple[Head, Tail | None]:
        return halves(self.model("current"), self.partition, self.device)

    @cached_property
    def pretrained_model(self) -> Any:
        return self.model("pretrained").to(self.device)

    @cached_property
    def body(self) -> Any:
        """The model party's modules, and nothing of the data party's."""
        from vflair_core.parties.split import split

        return split(self.model("body"), self.partition)[1].model.to(self.device)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def embeddings(self) -> Tensor:
        return load_file(self.folder / "embeddings.safetensors")["embeddings"]

    @cached_property
    def replacement(self) -> Replacement | None:
        texts = self.job["auxiliary"]["public_texts"]
        return told_replacement(self.job["defenses"], self.tokenizer, self.embeddings, texts)

    def has_mechanism(self, side: Side) -> bool:
        """Whether knowing the defenses could help against one side of them."""
        return has_mechanism(self.job["defenses"], side)

    def mechanism(self, side: Side, *, with_parameters: bool) -> Mechanism:
        """The defenses of the run as one mechanism, in their order."""
        state = load_file(self.folder / "defenses.safetensors") if with_parameters else None
        return told(self.job["defenses"], side, state)


class Granted(Mapping[str, Any]):
    """Name → knowledge, for one attack in one pass: what was granted, and no more."""

    def __init__(self, room: Room, attack: dict[str, Any], which: str, progress: Any) -> None:
        self.room, self.attack, self.which, self.progress = room, attack, which, progress
        self.seen = room.observables(which)
        names = set(attack["granted"])
        if which == "bypassed" or not room.job["defenses"]:
            names -= set(DEFENSE)  # nothing was applied to these messages
        if room.job["task_kind"] != "causal-lm":
            names -= {"pretrained_model"}  # it is a classifier, no language-model prior
        if names & {"mechanism", "parameters"} and not room.has_mechanism("mechanism"):
            names -= {"mechanism", "parameters"}
        sides: tuple[Side, ...] = ("gradient_mechanism", "replacement")
        names -= {side for side in sides if side in names and not room.has_mechanism(side)}
        if room.partition.kind == "HT":
            names -= {"tail", "pretrained_tail", "current_tail"}
        if not (room.folder / f"updates-{which}.safetensors").exists():
            names -= {"updates"}
        if not (room.folder / "adversary.safetensors").exists():
            names -= {"adversary_state"}
        absent = set(AUXILIARY) - set(room.job["auxiliary"])  # the task has none
        self.names = [n for n in sorted(names - absent) if n not in _SEEN or n in self.seen]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        if name in self.seen:
            return self.seen[name]
        room = self.room
        latest = f"current_{name}" in self.attack["granted"] or name.startswith("current_")
        held = room.current if latest and name.endswith(("head", "tail")) else None
        match name:
            case "task_kind":
                return room.job["task_kind"]
            case "partition":
                return room.partition
            case "generator":
                return torch.Generator().manual_seed(self.attack["seed"])
            case "device":
                return room.device
            case "progress":
                return self.progress
            case "body" | "tokenizer" | "pretrained_model":
                return getattr(room, name)
            case "embeddings":
                return room.embeddings
            case "adversary_state":
                return load_file(room.folder / "adversary.safetensors")
            case "head" | "pretrained_head" | "current_head":
                return (held or room.pretrained)[0]
            case "tail" | "pretrained_tail" | "current_tail":
                return (held or room.pretrained)[1]
            case "mechanism" | "parameters" | "gradient_mechanism":
                side: Side = "gradient_mechanism" if name == "gradient_mechanism" else "mechanism"
                return room.mechanism(side, with_parameters="parameters" in self.attack["granted"])
            case "replacement":
                return room.replacement
            case "updates":
                return room.updates(self.which)
            case "known_labels":
                return dict(room.job["auxiliary"]["known_labels"])
            case "few_labelled":
                return [Example(**row) for row in room.job["auxiliary"]["few_labelled"]]
            case "queries":
                return room.queries(self.which)
            case _:
                return room.job["auxiliary"][name]


_SEEN = ("hidden_grad", "smashed_grad", "share", "logits")


def work(folder: Path, progress: Progress) -> None:
    """Run every attack of the job on every pass it is asked for, and write the guesses."""
    room = Room(folder)
    for attack in room.job["attacks"]:
        callable_ = load_target(attack["target"])
        callable_ = callable_(**attack["options"]) if isinstance(callable_, type) else callable_
        for which in attack["passes"]:
            label = f"{attack['name']} ({which})"
            start, course = time.perf_counter(), Course()

            def report(
                done: int,
                total: int,
                objective: float | None = None,
                tokens: Tensor | None = None,
                forwards: float | None = None,
                *,
                label: str = label,
                place: str = f"{attack['number']} {which}",
                start: float = start,
                course: Course = course,
            ) -> None:
                shown = label if objective is None else f"{label}, objective {objective:.4g}"
                if tokens is not None:  # who knows the truth says how much of it that is
                    tokens = tokens.cpu()
                    leave_so_far(folder, tokens, place)
                    if forwards is not None:
                        course.add(forwards, time.perf_counter() - start, tokens)
                progress(shown, done, total)

            torch.manual_seed(attack["seed"])
            guess = launch(callable_, Granted(room, attack, which, report))
            found = Found(guess, time.perf_counter() - start, course)
            write_guess(folder / f"guess-{attack['number']}-{which}", found)


def stream_seed(seed: int, name: str) -> int:
    """The seed of a named random stream: adding a stream changes no other."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "little")


def main(folder: str) -> int:
    """Entry point of the process; tells its parent how far it is by lines on standard output."""

    def tell(label: str, done: int, total: int) -> None:
        sys.stdout.write(MARK + json.dumps([label, done, total]) + "\n")
        sys.stdout.flush()

    job = json.loads((Path(folder) / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    try:
        work(Path(folder), tell)
    except Exception as error:  # noqa: BLE001 - the parent raises it by name
        report = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        (Path(folder) / "error.json").write_text(json.dumps(report))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
