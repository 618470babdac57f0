"""Run an experiment from public pretraining to graded attacks."""

from __future__ import annotations

import copy
import importlib.metadata
import platform
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import structlog
import torch
from attrs import define, field, frozen

from vflair_core.attacking import Evidence, Launch, attack_and_grade, record_victims, truth_of
from vflair_core.channel import Transcript
from vflair_core.defense import Batch, Defense
from vflair_core.encoding import encode, shuffled
from vflair_core.errors import ExperimentError
from vflair_core.experiment import Experiment
from vflair_core.grading import Grade
from vflair_core.message import Message
from vflair_core.metrics import dcs, evaluate_party, normalised_dcs
from vflair_core.partition import Partition, split
from vflair_core.plugins import build, find, observe, plugin_manager
from vflair_core.pretraining import prepare_model, prior_guess
from vflair_core.result import Result
from vflair_core.task import Example, Task
from vflair_core.training import FineTuning, train_unsplit
from vflair_core.worker import stream_seed

if TYPE_CHECKING:
    import pluggy

    from vflair_core.data_party import DataParty

log = structlog.get_logger()


class Reporter(Protocol):
    """Shows how far a run is; the command line draws bars, a library user can pass anything."""

    def __call__(self, phase: str, done: int, total: int, /) -> None: ...


@define
class Clock:
    """Seconds per phase."""

    seconds: dict[str, float] = field(factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def run(
    experiment: Experiment,
    *,
    plugins: pluggy.PluginManager | None = None,
    report: Reporter = lambda *_: None,
    out: str | Path | None = None,
    strict: bool = False,
) -> Result:
    """Run `experiment` and return what it found; with `out`, write result, transcript and experiment there.

    Args:
        experiment: What to run.
        plugins: Where tasks, defenses and attacks come from; by default everything installed.
        report: Told (phase, done, total) now and then.
        out: Folder to write to; it is made.
        strict: Let an observer that raises stop the run.

    Raises:
        VflairError: Something in the experiment does not exist or does not fit.
    """
    plugins = plugins if plugins is not None else plugin_manager()
    told = {"strict": strict}
    observe(plugins, "vflair_run_started", experiment=experiment, **told)
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng():
            if experiment.threads:
                torch.set_num_threads(experiment.threads)
            result, transcripts = _Run(
                experiment, plugins, report, strict, Path(out) if out else None
            ).go()
    except BaseException as error:
        observe(plugins, "vflair_run_failed", experiment=experiment, error=error)
        raise
    finally:
        torch.set_num_threads(threads)
    if out is not None:
        _write(Path(out), experiment, result, transcripts)
    observe(plugins, "vflair_run_finished", result=result, **told)
    return result


def _write(
    out: Path, experiment: Experiment, result: Result, transcripts: dict[str, Transcript]
) -> None:
    from vflair_core.config import to_toml

    out.mkdir(parents=True, exist_ok=True)
    (out / "experiment.toml").write_text(to_toml(experiment))
    names = {"undefended": "transcript.safetensors"} if len(transcripts) == 1 else {}
    for arm, transcript in transcripts.items():
        default = "transcript.safetensors" if arm == "defended" else f"transcript-{arm}.safetensors"
        transcript.save(out / names.get(arm, default))
    result.to_json(out / "result.json")


@define
class _Arm:
    """One of the two runs of an experiment: what it found and what the other needs of it."""

    numbers: dict[str, Any]
    cost: dict[str, Any]
    transcript: Transcript
    grades: list[Grade]
    guesses: list[dict[str, Any]]


@frozen(eq=False)
class _Run:
    experiment: Experiment
    plugins: pluggy.PluginManager
    report: Reporter
    strict: bool
    out: Path | None

    def go(self) -> tuple[Result, dict[str, Transcript]]:
        e, clock = self.experiment, Clock()
        with clock("task"):
            task: Task = build(find(self.plugins, "tasks", e.task.name), e.task.options)
        offered = [(spec, find(self.plugins, "defenses", spec.name)) for spec in e.defenses]
        defenses = lambda: [build(offer, spec.options) for spec, offer in offered]  # noqa: E731
        launches = [
            Launch(spec.name, _attack(self.plugins, spec), spec.knowledge, e.seed)
            for spec in e.attacks
        ]
        defenses()  # a wrong option must fail now, not after the first arm
        with clock("pretraining"):
            model, tokenizer = prepare_model(e, task, self.report)
        pretrained = {key: value.clone() for key, value in model.state_dict().items()}
        victims = self._victims(task)
        prior = None
        if task.kind == "causal-lm":
            prior = prior_guess(model, tokenizer, task.public, self._victim_length())
        batches = self._batches(task, tokenizer)
        setting = (task, tokenizer, pretrained, launches, victims, prior)

        arms: dict[str, _Arm] = {}
        whole = copy.deepcopy(model)
        arms["undefended"] = self._arm("undefended", whole, [], setting, batches, {})
        if e.check_unsplit:
            with clock("unsplit reference"):
                self._compare_unsplit(model, batches, arms["undefended"])
        if e.defenses:
            subset = {g.attack: g.details["subset"] for g in arms["undefended"].grades}
            arms["defended"] = self._arm("defended", model, defenses(), setting, batches, subset)
        for arm in arms.values():
            for grade in arm.grades:
                grade.details.pop("subset", None)
        numbers = self._numbers(arms, task)
        cost: dict[str, Any] = {name: arm.cost for name, arm in arms.items()}
        cost["seconds"] = clock.seconds
        cost["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        result = Result(
            numbers, cost, e.to_dict(), e.digest, _versions(), _plugins(self.plugins),
            {"name": task.name, "kind": task.kind, "source": task.source, "licence": task.licence, **task.facts},
            [{"arm": name, **row} for name, arm in arms.items() for row in arm.guesses],
        )  # fmt: skip
        return result, {name: arm.transcript for name, arm in arms.items()}

    # -- one arm ----------------------------------------------------------------------------------------

    def _arm(
        self,
        name: str,
        model: Any,
        defenses: list[Defense],
        setting: tuple[Any, ...],
        batches: list[Batch],
        references: dict[str, float],
    ) -> _Arm:
        e, clock = self.experiment, Clock()
        task, tokenizer, pretrained, launches, victims, prior = setting
        party, model_party = split(
            model,
            self._partition(model),
            defenses=defenses,
            tokenizer=tokenizer,
            channel=e.channel,
            wire=e.wire,
            devices=e.devices,
            seed=stream_seed(e.seed, "noise"),
            plugins=self.plugins,
        )
        party.task_kind = task.kind
        for defense in defenses:
            with clock("preparing"):
                defense.prepare(task.public, party)
        with self._watched(party):
            with clock("fine-tuning"):
                losses, evaluations = self._fine_tune(name, party, task, batches)
            if e.save:
                self._save(name, party, model_party)
            releases = self._releases(task, len(evaluations))
            with clock("victims"):
                main, bypassed, queries = self._record(
                    party, task, victims, defended=bool(defenses)
                )
        evidence = Evidence(
            party, model_party, pretrained, main, bypassed, e.victims.releases, task,
            self._auxiliary(task), queries,
        )  # fmt: skip
        truth = truth_of(party, victims, self._victim_length())
        with clock("attacks"):
            grades = attack_and_grade(
                launches,
                evidence,
                truth,
                prior=prior,
                subset=range(min(e.victims.bypass, len(victims))),
                references=references if defenses else None,
                isolation=e.isolation,
                progress=lambda label, done, total: self.report(f"{name}: {label}", done, total),
                threads=e.threads or None,
            )
        for grade in grades:
            observe(
                self.plugins, "vflair_attack_finished", name=grade.attack, grade=grade.to_dict(),
                strict=self.strict,
            )  # fmt: skip
        final = evaluations[-1]
        numbers = {
            "main_performance": next(iter(final["metrics"].values())),
            "metric": next(iter(final["metrics"])),
            "losses": losses,
            "evaluations": evaluations,
            "attacks": [_without_times(grade) for grade in grades],
            "guarantees": [
                {"defense": spec.name, **defense.guarantee(releases).to_dict()}
                for spec, defense in zip(e.defenses, defenses, strict=bool(defenses))
            ]
            if defenses
            else [],
            "releases_per_example": releases,
            "rows_sent": _rows(party),
            "partition": attrs.asdict(party.partition),
            "untied": list(party.untied),
            "disclosed": sorted(_disclosed(party)),
        }
        cost = {
            "messages": party.channel.messages,
            "bytes": {f"{r} {d}": t.bytes for (r, d), t in party.channel.traffic.items()},
            "total_bytes": sum(t.bytes for t in party.channel.traffic.values()),
            "channel_seconds": party.channel.seconds,
            "seconds": clock.seconds,
            "attack_seconds": {grade.attack: grade.seconds for grade in grades},
        }
        return _Arm(numbers, cost, main, grades, _samples(grades, truth))

    def _fine_tune(
        self, name: str, party: DataParty, task: Task, batches: list[Batch]
    ) -> tuple[list[float], list[dict[str, Any]]]:
        options = self.experiment.train
        rounds = FineTuning(party, options)
        evaluations, losses = [self._evaluate(party, task)], []
        torch.manual_seed(stream_seed(self.experiment.seed, "dropout"))
        per_epoch = -(-len(task.train) // options.batch_size)
        for number, batch in enumerate(batches, start=1):
            observe(self.plugins, "vflair_step_started", step=party.step, strict=self.strict)
            losses.append(rounds.step(party.defend_tokens(batch)))
            facts: dict[str, Any] = {"step": party.step, "strict": self.strict}
            observe(self.plugins, "vflair_step_finished", loss=losses[-1], **facts)
            log.debug("step_finished", arm=name, step=party.step, loss=losses[-1])
            if number % per_epoch == 0:
                observe(self.plugins, "vflair_epoch_finished", epoch=number // per_epoch, **facts)
            if (
                options.evaluate_every
                and number % options.evaluate_every == 0
                and number < len(batches)
            ):
                evaluations.append(self._evaluate(party, task))
            self.report(f"{name}: fine-tuning, loss {losses[-1]:.3f}", number, len(batches))
        evaluations.append(self._evaluate(party, task))
        return losses, evaluations

    def _partition(self, model: Any) -> Partition:
        """The cut of the experiment, or the one that the plugin it names chooses."""
        cut = self.experiment.cut
        if not cut:
            return self.experiment.partition
        hook = self.plugins.hook.vflair_partition
        chosen = [i for i in hook.get_hookimpls() if i.plugin_name == cut]
        if not chosen:
            there = ", ".join(i.plugin_name for i in hook.get_hookimpls()) or "none"
            raise ExperimentError(f"No plugin {cut!r} answers vflair_partition. Possible: {there}.")
        given = {"model": model, "partition": self.experiment.partition}
        answer = chosen[0].function(**{name: given[name] for name in chosen[0].argnames})
        return answer if answer is not None else self.experiment.partition

    def _save(self, arm: str, party: DataParty, model_party: ModelParty) -> None:
        if self.out is None:
            raise ExperimentError("save = true needs an output folder: pass out= (or --out).")
        folder = self.out / arm
        for path in (party.save(folder), model_party.save(folder, party.step)):
            facts: dict[str, Any] = {"path": str(path), "step": party.step}
            observe(self.plugins, "vflair_checkpoint_saved", strict=self.strict, **facts)

    def _releases(self, task: Task, evaluations: int) -> int:
        """Rows of smashed data of the example that crosses most often: its length times its crossings."""
        e = self.experiment
        train = -(-e.train.steps * e.train.batch_size // len(task.train))
        crossings = {"train": train, "test": evaluations}
        crossings[e.victims.split] += e.victims.releases
        return max(crossings.values()) * max(e.train.max_length, self._victim_length())

    def _evaluate(self, party: DataParty, task: Task) -> dict[str, Any]:
        options = self.experiment.train
        metrics = evaluate_party(
            party, task, batch_size=max(options.batch_size, 16), max_length=options.max_length
        )
        observe(
            self.plugins, "vflair_evaluated", step=party.step, metrics=metrics, strict=self.strict
        )
        return {"step": party.step, "metrics": metrics}

    def _record(
        self, party: DataParty, task: Task, victims: list[Example], *, defended: bool
    ) -> tuple[Transcript, Transcript | None, Transcript | None]:
        v, length = self.experiment.victims, self._victim_length()
        gradients = v.phase == "train"
        main = record_victims(
            party, victims, max_length=length, releases=v.releases, gradients=gradients
        )
        bypassed = queries = None
        if defended:
            bypassed = record_victims(
                party, victims[: v.bypass], max_length=length, gradients=gradients, bypass=True
            )
        if v.queries and task.public:
            publics = [Example(text, label=0) for text in task.public[: v.queries]]
            queries = record_victims(party, publics, max_length=length, gradients=False)
        return main, bypassed, queries

    @contextmanager
    def _watched(self, party: DataParty) -> Iterator[None]:
        """Tell the observers of messages, if there are any: a tap costs a copy of everything."""
        hooks = ("vflair_message_sent", "vflair_message_received")
        heard = any(getattr(self.plugins.hook, hook).get_hookimpls() for hook in hooks)
        taps: AbstractContextManager[Any] = (
            party.channel.tap(self._tell) if heard else nullcontext()
        )
        with taps:
            yield

    def _tell(self, message: Message, direction: str, seconds: float) -> None:
        for crossing in message.tensors:
            observe(
                self.plugins, f"vflair_message_{direction}", strict=self.strict, kind=message.kind,
                role=crossing.role, direction=direction, step=message.step, nbytes=crossing.nbytes,
                seconds=seconds,
            )  # fmt: skip

    # -- what both arms share ---------------------------------------------------------------------------

    def _batches(self, task: Task, tokenizer: Any) -> list[Batch]:
        options = self.experiment.train
        generator = torch.Generator().manual_seed(stream_seed(self.experiment.seed, "order"))
        order = shuffled(len(task.train), options.batch_size, generator)
        return [
            encode(
                tokenizer,
                [task.train[row] for row in next(order)],
                kind=task.kind,
                max_length=options.max_length,
            )
            for _ in range(options.steps)
        ]

    def _victim_length(self) -> int:
        return self.experiment.victims.max_length or self.experiment.train.max_length

    def _victims(self, task: Task) -> list[Example]:
        v = self.experiment.victims
        examples = task.train if v.split == "train" else task.test
        if len(examples) < v.count:
            raise ExperimentError(
                f"victims.count is {v.count}, and task {task.name!r} has {len(examples)} {v.split} examples."
            )
        return [examples[n] for n in range(v.count)]

    def _auxiliary(self, task: Task) -> dict[str, Any]:
        """What may be granted beside messages and weights. In-domain data are examples that are no victims."""
        v = self.experiment.victims
        count = v.count if v.split == "train" else 0
        others = [task.train[n] for n in range(count, min(count + 64, len(task.train)))]
        return {
            "public_texts": list(task.public),
            "in_domain": [example.text for example in others],
            "few_labelled": [attrs.asdict(example) for example in others[:16]],
            "queries": list(task.public[: v.queries]),
        }

    def _compare_unsplit(self, model: Any, batches: list[Batch], arm: _Arm) -> None:
        reference = copy.deepcopy(model)
        if arm.numbers["untied"]:
            reference = _untied(reference)
        torch.manual_seed(stream_seed(self.experiment.seed, "dropout"))
        losses = train_unsplit(reference, batches, self.experiment.train)
        arm.numbers["unsplit_losses_equal"] = losses == arm.numbers["losses"]

    def _numbers(self, arms: dict[str, _Arm], task: Task) -> dict[str, Any]:
        numbers: dict[str, Any] = {name: arm.numbers for name, arm in arms.items()}
        if "defended" not in arms or not arms["defended"].grades:
            return numbers
        undefended, defended = arms["undefended"], arms["defended"]
        best, main = undefended.numbers["main_performance"], defended.numbers["main_performance"]
        chance = 1 / len(task.labels) if task.kind == "classification" else 0.0
        scores: list[dict[str, Any]] = []
        for before, after in zip(undefended.grades, defended.grades, strict=True):
            normalised = normalised_dcs(
                after.attack_performance, after.floor, before.attack_performance, main, chance, best
            )
            score = dcs(after.attack_performance, main, best)
            scores.append({"attack": after.attack, "dcs": score, "normalised": normalised})
        numbers["dcs"] = {
            "per_attack": scores,
            "mean": sum(row["dcs"] for row in scores) / len(scores),
            "normalised_worst": min(row["normalised"] for row in scores),
        }
        return numbers


def _attack(plugins: Any, spec: Any) -> Callable[..., Any]:
    """A class of the plugin is built with its options; a function is the attack itself."""
    offered = find(plugins, "attacks", spec.name)
    thing = offered.load()
    if isinstance(thing, type):
        return build(offered, spec.options)  # type: ignore[no-any-return]
    if spec.options:
        raise ExperimentError(
            f"Attack {spec.name!r} has no options; {', '.join(spec.options)} given."
        )
    return thing


def _rows(party: DataParty) -> int:
    counted = party.channel.traffic.get(("smashed", "sent"))
    return counted.rows if counted else 0


def _disclosed(party: DataParty) -> set[str]:
    return (
        set(party.partition.disclose)
        if any("disclosed" in r for r in party.roles.values())
        else set()
    )


def _untied(model: Any) -> Any:
    """Give the output layer its own copy of a tied weight, as the cut did."""
    output = model.get_output_embeddings()
    output.weight = torch.nn.Parameter(output.weight.detach().clone())
    return model


def _without_times(grade: Grade) -> dict[str, Any]:
    plain = grade.to_dict()
    plain.pop("seconds")
    plain["details"].pop("subset", None)
    return plain


def _samples(grades: list[Grade], truth: Any) -> list[dict[str, Any]]:
    return [
        {"attack": grade.attack, "private": truth.texts[n], "recovered": text}
        for grade in grades
        for n, text in enumerate(grade.recovered)
    ]


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "tokenizers", "peft", "vflair-core")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _plugins(manager: Any) -> list[dict[str, Any]]:
    return [attrs.asdict(info) for info in getattr(manager, "about", list)()]
