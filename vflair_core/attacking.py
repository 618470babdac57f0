"""Attack what crossed: record the victims, hand the evidence to the worker, grade what it guessed."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import structlog
import torch
from attrs import field, frozen
from safetensors.torch import save_file
from torch import Tensor, nn

from vflair_core.attack import check, wants
from vflair_core.channel import Transcript
from vflair_core.data_party import DataParty
from vflair_core.defense import Defense
from vflair_core.errors import AttackError
from vflair_core.grading import Grade, Truth
from vflair_core.judging import Reference, grade, judge, performance
from vflair_core.knowledge import granted
from vflair_core.model_party import ModelParty
from vflair_core.plugins import target_of
from vflair_core.task import Task
from vflair_core.tuning import plain_state
from vflair_core.worker import MARK, Progress, read_guess, stream_seed, work

log = structlog.get_logger()
Isolation = Literal["process", "inline"]


@frozen(eq=False)
class Launch:
    """One attack of a run: the callable, what it may know, and the seed of its random stream."""

    name: str
    attack: Callable[..., Any]
    knowledge: str | tuple[str, ...] = "K4"
    seed: int = 0

    @property
    def granted(self) -> frozenset[str]:
        """All names the attack may use."""
        return granted(self.knowledge)

    def check(self) -> None:
        """See that the attack asks for nothing it is not granted; raises `AttackError`."""
        check(self.attack, self.granted)

    @property
    def label(self) -> str:
        """The knowledge as a result shows it."""
        return self.knowledge if isinstance(self.knowledge, str) else "+".join(self.knowledge)


@frozen(eq=False)
class Evidence:
    """What an attacker could hold: two passes of messages, weights, and auxiliary data."""

    party: DataParty
    model_party: ModelParty
    pretrained: dict[str, Tensor]
    main: Transcript
    bypassed: Transcript | None
    releases: int
    task: Task
    auxiliary: dict[str, Any] = field(factory=dict)
    queries: Mapping[str, Transcript] = field(factory=dict)  # by pass: main, bypassed
    updates: Mapping[str, list[dict[str, Tensor]]] = field(factory=dict)  # by pass


def attack_and_grade(
    launches: Sequence[Launch],
    evidence: Evidence,
    truth: Truth,
    *,
    prior: Tensor | None,
    subset: Sequence[int],
    control: Truth | None = None,
    development: int = 0,
    references: Sequence[Reference] | None = None,
    isolation: Isolation = "process",
    progress: Progress = lambda *_: None,
    threads: int | None = None,
) -> list[Grade]:
    """Run the attacks on `evidence` and grade them against `truth`.

    Args:
        launches: The attacks.
        evidence: What they may see, before it is cut down to what each is granted.
        truth: What really was there; it stays in this process.
        prior: (T,) the best guess of someone who knows the public text and saw no message.
        subset: Rows of the victims that crossed again with the defense bypassed.
        control: What really was there then; a defense that changes text does not change it.
        development: Last victims, which choose among attacks and are not reported.
        references: What each attack reached in the undefended arm; None for that arm itself.
        isolation: process for a worker of its own, inline for this process.
        progress: Told (attack, done, total) now and then.
        threads: CPU threads of the worker.

    Raises:
        AttackError: An attack asks for more than it is granted, or fails.
    """
    if not launches:
        return []
    for launch in launches:
        launch.check()
    with tempfile.TemporaryDirectory(prefix="vflair-") as name:
        folder = Path(name)
        victims = {"main": len(truth.tokens), "bypassed": len(subset)}
        _furnish(folder, launches, evidence, victims, threads or torch.get_num_threads())
        _run(folder, isolation, progress)
        grades = []
        for number, launch in enumerate(launches):
            guess, seconds = read_guess(folder / f"guess-{number}-main")
            if guess.tokens is not None and "candidates" in sum(wants(launch.attack), ()):
                raise AttackError(
                    f"{launch.name} was offered candidates, among which are the victims' texts, so it may not "
                    "guess tokens."
                )
            decode = getattr(evidence.party.tokenizer, "decode", None)
            reported = range(len(truth.tokens) - development)
            found = grade(
                guess.of(reported), truth.of(reported), prior, decode, name=launch.name, knowledge=launch.label,
            )  # fmt: skip
            found.adaptive = _is_adaptive(launch, evidence)
            if development:
                apart = range(len(reported), len(truth.tokens))
                found.development = performance(guess.of(apart), truth, apart)
            found.seconds = seconds
            bypassed = None
            if evidence.bypassed is not None:
                again, _ = read_guess(folder / f"guess-{number}-bypassed")
                bypassed = _accuracy_of(again, truth, subset, control)
            found.reference = performance(guess.of(subset), truth, subset)
            grades.append(judge(found, references[number] if references else None, bypassed))
    return grades


def _is_adaptive(launch: Launch, evidence: Evidence) -> bool:
    """Whether the attack can take the defense into account: told of its mechanism, or of what comes through it."""
    asked = {name for kind in wants(launch.attack) for name in kind} & launch.granted
    defenses = evidence.party.defenses.each
    told = any(type(defense).mechanism is not Defense.mechanism for defense in defenses)
    used = ("mechanism", "parameters") if told else ()
    return bool(defenses) and bool(asked & {"queries", *used})


def _accuracy_of(guess: Any, truth: Truth, subset: Sequence[int], control: Truth | None) -> float:
    if control is None:
        return performance(guess, truth, subset)
    return performance(guess, control, range(len(subset)))


def _run(folder: Path, isolation: Isolation, progress: Progress) -> None:
    if isolation == "inline":
        work(folder, progress)
        return
    command = [sys.executable, "-m", "vflair_core.worker", str(folder)]
    with (
        (folder / "stderr.txt").open("w") as errors,
        subprocess.Popen(  # noqa: S603
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=folder,
            env=_environment(),
        ) as process,
    ):
        assert process.stdout is not None  # PIPE was asked for
        for line in process.stdout:
            if line.startswith(MARK):
                progress(*json.loads(line.removeprefix(MARK)))
    code = process.returncode
    if code:
        report = folder / "error.json"
        if report.exists():
            facts = json.loads(report.read_text())
            log.error("attack_failed", traceback=facts["traceback"])
            raise AttackError(f"An attack failed: {facts['error']}")
        said = (folder / "stderr.txt").read_text()[-2000:]
        raise AttackError(f"The attack worker ended with code {code}: {said}")


def _environment() -> dict[str, str]:
    """What the worker needs of this process's environment, and nothing else of it."""
    kept = (
        "PATH",
        "PYTHONPATH",
        "VIRTUAL_ENV",
        "HOME",
        "TMPDIR",
        "LD_LIBRARY_PATH",
        "HF_HUB_OFFLINE",
    )
    here = os.pathsep.join(path for path in sys.path if path)
    return {name: os.environ[name] for name in kept if name in os.environ} | {"PYTHONPATH": here}


def _furnish(
    folder: Path,
    launches: Sequence[Launch],
    evidence: Evidence,
    victims: Mapping[str, int],
    threads: int,
) -> None:
    """Write the transcript and what is granted into the folder, and nothing else."""
    party, names = evidence.party, {n for launch in launches for n in launch.granted}
    asked = {n for launch in launches for kind in wants(launch.attack) for n in kind} & names
    model = party.model
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = config.tie_word_embeddings and not party.untied
    config.to_json_file(folder / "config.json", use_diff=False)
    evidence.main.save(folder / "main.safetensors")
    releases = {"main": evidence.releases}
    if evidence.bypassed is not None:
        evidence.bypassed.save(folder / "bypassed.safetensors")
        releases["bypassed"] = evidence.releases
    if asked & {"head", "tail", "pretrained_head", "pretrained_tail", "pretrained_model"}:
        _save_weights(folder / "pretrained.safetensors", evidence.pretrained)
    theirs = plain_state(evidence.model_party.model)
    if asked & {"body"}:
        _save_weights(folder / "body.safetensors", theirs)
    if names & {"current_head", "current_tail"} and asked & {
        "head",
        "tail",
        "current_head",
        "current_tail",
    }:
        _save_weights(folder / "current.safetensors", {**plain_state(model), **theirs})
    if "embeddings" in asked:
        table = evidence.pretrained[_embedding_name(model)]
        _save_weights(folder / "embeddings.safetensors", {"embeddings": table})
    if asked & {"tokenizer"}:
        party.tokenizer.save_pretrained(folder)  # type: ignore[union-attr]
    if asked & {"parameters", "mechanism"} and "parameters" in names:
        state = {
            f"{n}.{k}": v for n, d in enumerate(party.defenses.each) for k, v in d.state().items()
        }
        _save_weights(folder / "defenses.safetensors", state)
    for which, transcript in evidence.queries.items():
        transcript.save(folder / f"queries-{which}.safetensors")
    for which, each in evidence.updates.items():
        flat = {f"{n}.{name}": grad for n, row in enumerate(each) for name, grad in row.items()}
        if flat:
            _save_weights(folder / f"updates-{which}.safetensors", flat)
    job = {
        "attacks": [_describe(n, launch, evidence) for n, launch in enumerate(launches)],
        "releases": releases,
        "victims": dict(victims),
        "partition": attrs.asdict(party.partition),
        "task_kind": evidence.task.kind,
        "model_class": type(model).__mro__[1].__name__,
        "defenses": [_defense(defense) for defense in party.defenses.each] if asked & {"mechanism", "parameters"} else
        [{} for _ in party.defenses.each],
        "auxiliary": {k: v for k, v in evidence.auxiliary.items() if k in asked},
        "threads": threads,
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))


def _describe(number: int, launch: Launch, evidence: Evidence) -> dict[str, Any]:
    attack: Any = launch.attack
    options: dict[str, Any] = attrs.asdict(attack) if attrs.has(type(attack)) else {}
    return {
        "number": number,
        "name": launch.name,
        "target": target_of(attack),
        "options": options,
        "granted": sorted(launch.granted),
        "seed": stream_seed(launch.seed, f"attack {launch.name}"),
        "passes": ["main", "bypassed"] if evidence.bypassed is not None else ["main"],
    }


def _defense(defense: Any) -> dict[str, Any]:
    if not attrs.has(type(defense)):
        raise AttackError(
            f"{type(defense).__name__} cannot be told to an adaptive attacker: make it an attrs class whose "
            "fields are its options."
        )
    fields = [f.name for f in attrs.fields(type(defense)) if f.init]
    options = {name.lstrip("_"): getattr(defense, name) for name in fields}
    return {"target": target_of(defense), "options": options}


def _embedding_name(model: nn.Module) -> str:
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    return next(f"{name}.weight" for name, m in model.named_modules() if m is embeddings)


def _save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    save_file({k: v.detach().clone().contiguous() for k, v in weights.items() if v.numel()}, path)
