"""Run an experiment: public pretraining, the undefended arm, the defended arm, and what compares them."""

from __future__ import annotations

import copy
import importlib.metadata
import platform
import resource
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from vflair_core.arm import Arm, choose, run_arm
from vflair_core.attack import wants
from vflair_core.attacking import Launch
from vflair_core.channel import Transcript
from vflair_core.defense import Defense
from vflair_core.errors import ExperimentError
from vflair_core.experiment import AttackSpec, Experiment, Victims
from vflair_core.metrics import dcs, normalised_dcs
from vflair_core.plugins import build, find, observe, plugin_manager
from vflair_core.pretraining import prepare_model, prior_guess
from vflair_core.reader import Reader
from vflair_core.result import Result
from vflair_core.setting import Clock, Reporter, Setting
from vflair_core.task import Task
from vflair_core.training import train_unsplit
from vflair_core.worker import stream_seed

if TYPE_CHECKING:
    import pluggy


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
    folder = Path(out) if out is not None else None
    observe(plugins, "vflair_run_started", strict=strict, experiment=experiment)
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng():
            if experiment.threads:
                torch.set_num_threads(experiment.threads)
            result, transcripts = _go(experiment, plugins, report, folder, strict=strict)
    except BaseException as error:
        observe(plugins, "vflair_run_failed", experiment=experiment, error=error)
        raise
    finally:
        torch.set_num_threads(threads)
    if folder is not None:
        _write(folder, experiment, result, transcripts)
    observe(plugins, "vflair_run_finished", strict=strict, result=result)
    return result


def _go(
    e: Experiment,
    plugins: pluggy.PluginManager,
    report: Reporter,
    out: Path | None,
    *,
    strict: bool,
) -> tuple[Result, dict[str, Transcript]]:
    clock = Clock()
    with clock("task"):
        task: Task = build(find(plugins, "tasks", e.task.name), e.task.options)
    launches = [Launch(a.name, _attack(plugins, a), a.knowledge, e.seed) for a in e.attacks]
    for launch in launches:
        launch.check()
        _check_offered(launch, e.victims)
    defenses = _defenses(e, plugins)
    with clock("pretraining"):
        model, tokenizer, processor = prepare_model(e, task, report)
    setting = Setting(
        experiment=e,
        plugins=plugins,
        report=report,
        strict=strict,
        out=out,
        task=task,
        tokenizer=tokenizer,
        processor=processor,
        pretrained={key: value.clone() for key, value in model.state_dict().items()},
        launches=launches,
        victims=_victims(e, task),
        prior=_prior(e, task, model, tokenizer),
    )
    arms = {"undefended": run_arm("undefended", copy.deepcopy(model), [], setting, [])}
    if e.check_unsplit:
        with clock("unsplit reference"):
            _compare_unsplit(copy.deepcopy(model), setting, arms["undefended"])
    if defenses:
        references = arms["undefended"].references
        arms["defended"] = run_arm("defended", model, defenses, setting, references)
    numbers: dict[str, Any] = {name: arm.numbers for name, arm in arms.items()}
    if "defended" in arms and arms["defended"].grades:
        numbers["dcs"] = _scores(arms["undefended"], arms["defended"])
    cost: dict[str, Any] = {name: arm.cost for name, arm in arms.items()}
    cost["seconds"] = clock.seconds
    cost["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    facts = {"name": task.name, "kind": task.kind, "source": task.source, "licence": task.licence}
    result = Result(
        numbers=numbers,
        cost=cost,
        experiment=e.to_dict(),
        config_hash=e.digest,
        versions=_versions(),
        plugins=[attrs.asdict(info) for info in getattr(plugins, "about", list)()],
        task={**facts, **task.facts},
        samples=[{"arm": name, **row} for name, arm in arms.items() for row in arm.samples],
    )
    return result, {name: arm.transcript for name, arm in arms.items()}


def _attack(plugins: pluggy.PluginManager, spec: AttackSpec) -> Callable[..., Any]:
    """A class of the plugin is built with its options; a function is the attack itself."""
    offered = find(plugins, "attacks", spec.name)
    thing = offered.load()
    if isinstance(thing, type):
        return build(offered, spec.options)  # type: ignore[no-any-return]
    if spec.options:
        raise ExperimentError(
            f"Attack {spec.name!r} is a function and has no options; {', '.join(spec.options)} given."
        )
    return thing


def _check_offered(launch: Launch, victims: Victims) -> None:
    """Some knowledge exists only if the experiment makes it."""
    made = {
        "updates": (victims.share_updates, "victims.share_updates = true"),
        "known_labels": (victims.known, "victims.known = 8"),
        "candidates": (victims.candidates, "victims.candidates = 8"),
    }
    for name in wants(launch.attack)[0]:
        there, how = made.get(name, (True, ""))
        if not there:
            raise ExperimentError(
                f"{launch.name} needs {name}, which this experiment does not make. Set {how} (an assumption that "
                "the result states), or leave the attack out."
            )


def _defenses(e: Experiment, plugins: pluggy.PluginManager) -> list[Defense]:
    made = [build(find(plugins, "defenses", spec.name), spec.options) for spec in e.defenses]
    for spec, defense in zip(e.defenses, made, strict=True):
        if not isinstance(defense, Defense):
            raise ExperimentError(f"{spec.name!r} is a {type(defense).__name__}, not a Defense.")
    return made


def _victims(e: Experiment, task: Task) -> list[Any]:
    there = len(task.train if e.victims.split == "train" else task.test)
    if there < e.victims.count:
        raise ExperimentError(
            f"victims.count is {e.victims.count}, and task {task.name!r} has {there} "
            f"{e.victims.split} examples."
        )
    return [task.row(e.victims.split, n) for n in range(e.victims.count)]


def _prior(e: Experiment, task: Task, model: Any, tokenizer: Any) -> torch.Tensor | None:
    if task.kind != "causal-lm":
        return None
    length = e.victims.max_length or e.train.max_length
    return prior_guess(model, tokenizer, task.public, length)


def _compare_unsplit(whole: Any, setting: Setting, arm: Arm) -> None:
    """Train the unsplit model on the same batches: the losses must be the same, bit for bit."""
    if arm.numbers[
        "untied"
    ]:  # the cut gave the output layer its own copy, so the witness gets one too
        output = whole.get_output_embeddings()
        output.weight = torch.nn.Parameter(output.weight.detach().clone())
    choose(whole, setting.experiment, arm.slices)
    torch.manual_seed(stream_seed(setting.experiment.seed, "dropout"))
    train = setting.experiment.train
    reader = Reader(setting.tokenizer, setting.reading(whole), train.max_length)
    batches = (
        reader.batch(examples, pack_rows=train.packing).batch for examples in setting.batches()
    )
    losses = train_unsplit(whole, batches, train)
    pairs = zip(losses, arm.numbers["losses"], strict=True)
    arm.numbers["unsplit_losses_equal"] = losses == arm.numbers["losses"]
    arm.numbers["unsplit_losses_differ_by"] = max((abs(a - b) for a, b in pairs), default=0.0)


def _scores(undefended: Arm, defended: Arm) -> dict[str, Any]:
    """DCS for parity with VFLAIR-LLM, and its chance-normalised form, whose worst case ranks."""
    best, main = (arm.numbers["main_performance"] for arm in (undefended, defended))
    chance = undefended.numbers["chance"]
    rows: list[dict[str, Any]] = []
    for before, after in zip(undefended.grades, defended.grades, strict=True):
        row: dict[str, Any] = {"attack": after.attack, "knowledge": after.knowledge}
        row["dcs"] = dcs(after.attack_performance, main, best)
        row["normalised"] = (
            None  # an attack that fails a control or finds nothing undefended ranks nothing
        )
        if before.verdict == after.verdict == "ok":
            attacks = (after.attack_performance, before.floor, before.attack_performance)
            row["normalised"] = normalised_dcs(*attacks, main, chance, best)
        rows.append(row)
    ranked = [row["normalised"] for row in rows if row["normalised"] is not None]
    return {
        "per_attack": rows,
        "mean": sum(row["dcs"] for row in rows) / len(rows),
        "normalised_worst": min(ranked) if ranked else None,
    }


def _write(
    out: Path, experiment: Experiment, result: Result, transcripts: dict[str, Transcript]
) -> None:
    """The transcript of the last arm is the one to attack again; the undefended one lies beside it."""
    from vflair_core.config import to_toml

    out.mkdir(parents=True, exist_ok=True)
    (out / "experiment.toml").write_text(to_toml(experiment))
    for arm, transcript in transcripts.items():
        last = arm == list(transcripts)[-1]
        transcript.save(
            out / ("transcript.safetensors" if last else f"transcript-{arm}.safetensors")
        )
    result.to_json(out / "result.json")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "peft", "vflair-core"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
