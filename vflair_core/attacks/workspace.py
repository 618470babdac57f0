"""The folder with what is granted to an attack: written here, and read here by the process that guesses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import load_file
from torch import Tensor

from vflair_core.attacks.adaptive import Side, has_mechanism, rebuilt_mechanism, rebuilt_replacement
from vflair_core.attacks.attack import Launch
from vflair_core.attacks.evidence import asked_names, needed, read_facts
from vflair_core.attacks.halves import Head, Tail, halves
from vflair_core.attacks.knowledge import DEFENSE
from vflair_core.attacks.observables import Observables, VictimRow
from vflair_core.communication.transcript import Transcript
from vflair_core.defenses.mechanism import ComposedMechanism, Replacement
from vflair_core.errors import AttackError
from vflair_core.offers import target_of
from vflair_core.parties.split import split
from vflair_core.partition.partition import Partition
from vflair_core.randomness import stream_seed


class Workspace:
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

    def _spots(self, name: str) -> list[VictimRow]:
        return [VictimRow(*spot) for spot in self.job["spots"].get(name, [])]

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
        tensors = load_file(self.folder / f"{weights}.safetensors")
        odd = model.load_state_dict(tensors, strict=False)
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
        return rebuilt_replacement(self.job["defenses"], self.tokenizer, self.embeddings, texts)

    def has_mechanism(self, side: Side) -> bool:
        """Whether knowing the defenses could help against one side of them."""
        return has_mechanism(self.job["defenses"], side)

    def mechanism(self, side: Side, *, with_parameters: bool) -> ComposedMechanism:
        """The defenses of the run as one mechanism, in their order."""
        state = load_file(self.folder / "defenses.safetensors") if with_parameters else None
        return rebuilt_mechanism(self.job["defenses"], side, state)


ALWAYS = ("config.json", "main.safetensors", "bypassed.safetensors")


def write_workspace(
    folder: Path, store: Path, launches: Sequence[Launch], threads: int, device: torch.device
) -> None:
    """Put into the worker's `folder` what is granted of the store, and the job; nothing else.

    Raises:
        AttackError: A defense cannot be told to an attack that asks for it.
    """
    facts, asked = read_facts(store), asked_names(launches)
    texts = {"public_texts"} if "replacement" in asked else set()  # which defenses calibrate on
    for file in (*ALWAYS, *sorted(needed(launches))):
        source = store / file
        if source.is_dir():  # the tokenizer, which is loaded with the config beside it
            shutil.copytree(source, folder, dirs_exist_ok=True)
        elif source.exists():
            shutil.copyfile(source, folder / file)  # no link: who writes in it changes no evidence
    tells = bool(asked & set(DEFENSE))
    same = (
        *("releases", "victims", "spots", "update_batch"),
        *("partition", "task_kind", "model_class"),
    )
    passes = list(facts["victims"])
    job = {
        "attacks": [_describe(n, launch, passes) for n, launch in enumerate(launches)],
        **{name: facts[name] for name in same},
        "defenses": [_checked(spec) if tells else {} for spec in facts["defenses"]],
        "auxiliary": {
            name: rows for name, rows in facts["auxiliary"].items() if name in asked | texts
        },
        "threads": threads,
        "device": str(device),
    }
    (folder / "job.json").write_text(json.dumps(job))


def _describe(number: int, launch: Launch, passes: list[str]) -> dict[str, Any]:
    attack: Any = launch.attack
    return {
        "number": number,
        "name": launch.name,
        "target": target_of(attack),
        "options": attrs.asdict(attack) if attrs.has(type(attack)) else {},
        "granted": sorted(launch.granted),
        "seed": stream_seed(launch.seed, f"attack {launch.name}"),
        "passes": passes,
    }


def _checked(spec: dict[str, Any]) -> dict[str, Any]:
    if spec["options"] is None:
        raise AttackError(
            f"{spec['target']} cannot be told to an adaptive attacker: make it an attrs class whose fields are its "
            "options."
        )
    return spec
