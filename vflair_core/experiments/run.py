"""Run an experiment: public pretraining, the undefended arm, the defended arm, and what compares them."""

from __future__ import annotations

import copy
import importlib.metadata
import platform
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from vflair_core.attacks.knowledge import shown
from vflair_core.communication.transcript import Transcript
from vflair_core.experiments.arm import Arm, choose, run_arm
from vflair_core.experiments.build import build_run, make_defenses
from vflair_core.experiments.context import Clock, Reporter, RunContext
from vflair_core.experiments.experiment import Experiment
from vflair_core.experiments.grading.ranking import evaluated, strongest
from vflair_core.experiments.grading.scores import dcs, normalised_dcs
from vflair_core.experiments.result import Result
from vflair_core.experiments.seeds import over_seeds
from vflair_core.plugins import observe, plugin_manager
from vflair_core.randomness import stream_seed
from vflair_core.tasks.preprocessor import Preprocessor
from vflair_core.training.fine_tuning import train_unsplit

if TYPE_CHECKING:
    import pluggy


def run(
    experiment: Experiment,
    *,
    plugins: pluggy.PluginManager | None = None,
    report: Reporter = lambda *_: None,
    out: str | Path | None = None,
    strict: bool = False,
    keep_evidence: bool = False,
    cache: str | Path | None = None,
) -> Result:
    """Run `experiment` and return what it found; with `out`, write result, transcript and experiment there.

    Args:
        experiment: What to run.
        plugins: Where tasks, defenses and attacks come from; by default everything installed.
        report: Told (phase, done, total) now and then.
        out: Folder to write to; it is made.
        strict: Let an observer that raises stop the run.
        keep_evidence: Write all that an attacker could hold, and the truth, into `out`, for `attack_again`.
        cache: Folder in which what defenses prepare on public text is kept for other runs.

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
            result, transcripts = _run_seeds(
                experiment,
                folder,
                plugins=plugins,
                report=report,
                strict=strict,
                keep=keep_evidence,
                cache=Path(cache) if cache is not None else None,
            )
    except BaseException as error:
        observe(plugins, "vflair_run_failed", experiment=experiment, error=error)
        raise
    finally:
        torch.set_num_threads(threads)
    if folder is not None:
        _write(folder, experiment, result, transcripts)
    observe(plugins, "vflair_run_finished", strict=strict, result=result)
    return result


def _run_seeds(
    e: Experiment, out: Path | None, **options: Any
) -> tuple[Result, dict[str, Transcript]]:
    """Run once, or once with each seed: then the result is the first seed's, with what all of them say."""
    runs: dict[int, Mapping[str, Arm]] = {}
    first: Result | None = None
    for seed in e.seeds or (e.seed,):
        folder = out / f"seed-{seed}" if out is not None and e.seeds else out
        result, arms = _run_seed(attrs.evolve(e, seed=seed, seeds=()), folder, **options)
        first, runs[seed] = first or result, arms
    assert first is not None  # there is at least one seed
    transcripts = {name: arm.transcript for name, arm in next(iter(runs.values())).items()}
    if not e.seeds:
        return first, transcripts
    numbers = {**first.numbers, "over_seeds": over_seeds(_of_arms(runs, ""))}
    if e.adversary is not None:
        numbers["over_seeds_active"] = over_seeds(_of_arms(runs, "active-"))
    whole = attrs.evolve(first, numbers=numbers, experiment=e.to_dict(), config_hash=e.digest)
    return whole, transcripts


def _of_arms(runs: Mapping[int, Mapping[str, Arm]], prefix: str) -> dict[int, dict[str, Arm]]:
    """The arms of each seed with or without an active adversary, under the names of those without."""
    names = ("undefended", "defended")
    return {
        seed: {name: arms[prefix + name] for name in names if prefix + name in arms}
        for seed, arms in runs.items()
    }


def _run_seed(e: Experiment, out: Path | None, **options: Any) -> tuple[Result, dict[str, Arm]]:
    """Run both arms with one seed; `options` are those of `build_run`."""
    clock = Clock()
    setting, model = build_run(e, out=out, clock=clock, **options)
    plugins = setting.plugins
    defenses = make_defenses(e, plugins)
    arms = {"undefended": run_arm("undefended", copy.deepcopy(model), [], setting, [])}
    if e.check_unsplit:
        with clock("unsplit reference"):
            _compare_unsplit(copy.deepcopy(model), setting, arms["undefended"])
    if defenses:
        references = arms["undefended"].references
        spare = copy.deepcopy(model) if setting.adversary else model
        arms["defended"] = run_arm("defended", spare, defenses, setting, references)
    if setting.adversary is not None:
        _go_active(arms, model, setting)
    numbers: dict[str, Any] = {name: arm.numbers for name, arm in arms.items()}
    if "defended" in arms and arms["defended"].grades:
        numbers["dcs"] = _scores(arms["undefended"], arms["defended"])
    for name, arm in arms.items():
        numbers[name]["strongest"] = strongest(arm.grades)
    if "defended" in arms:
        told, company = (numbers["defended"][name] for name in ("mechanism", "company"))
        beside = bool(setting.experiment.victims.companions)
        numbers["defended"]["evaluated"] = evaluated(
            arms["defended"].grades,
            numbers["defended"]["covers"],
            setting.task.kind,
            as_told=(told is None or told["matches"])
            and (beside or company is None or company["agrees"]),
        )
    cost: dict[str, Any] = {name: arm.cost for name, arm in arms.items()}
    cost["seconds"] = clock.seconds
    cost["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    task = setting.task
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
    return result, arms


def _go_active(arms: dict[str, Arm], model: Any, setting: RunContext) -> None:
    """Add both arms once more, under the active adversary."""
    plain = run_arm("active-undefended", copy.deepcopy(model), [], setting, [], active=True)
    arms["active-undefended"] = plain
    if "defended" in arms:
        defenses = make_defenses(setting.experiment, setting.plugins)
        arms["active-defended"] = run_arm(
            "active-defended", model, defenses, setting, plain.references, active=True
        )


def _compare_unsplit(whole: Any, setting: RunContext, arm: Arm) -> None:
    """Train the unsplit model on the same batches: the losses must be the same, bit for bit."""
    if arm.numbers[
        "untied"
    ]:  # the cut gave the output layer its own copy, so the witness gets one too
        output = whole.get_output_embeddings()
        output.weight = torch.nn.Parameter(output.weight.detach().clone())
    choose(whole, setting.experiment, arm.slices)
    torch.manual_seed(stream_seed(setting.experiment.seed, "dropout"))
    train = setting.experiment.train
    reader = Preprocessor(setting.tokenizer, setting.reading(whole), train.max_length)
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
        row: dict[str, Any] = {"attack": after.attack, "knowledge": shown(after.knowledge)}
        row["target"] = after.target
        row["dcs"] = dcs(after.attack_performance, main, best)
        row["normalised"] = (
            None  # an attack that fails a control or finds nothing undefended ranks nothing
        )
        if before.verdict == after.verdict == "ok":
            attacks = (after.attack_performance, before.floor, before.attack_performance)
            row["normalised"] = normalised_dcs(*attacks, main, chance, best)
        rows.append(row)
    ranked = [row for row in rows if row["normalised"] is not None]
    return {
        "per_attack": rows,
        "mean": sum(row["dcs"] for row in ranked) / len(ranked) if ranked else None,
        "normalised_worst": min(row["normalised"] for row in ranked) if ranked else None,
    }


def _write(
    out: Path, experiment: Experiment, result: Result, transcripts: dict[str, Transcript]
) -> None:
    """The transcript of the defended arm is the one to look at; those of other arms lie beside it."""
    from vflair_core.experiments.config import to_toml

    out.mkdir(parents=True, exist_ok=True)
    (out / "experiment.toml").write_text(to_toml(experiment))
    for arm, transcript in transcripts.items():
        last = arm == ("defended" if "defended" in transcripts else "undefended")
        transcript.save(
            out / ("transcript.safetensors" if last else f"transcript-{arm}.safetensors")
        )
    result.to_json(out / "result.json")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "peft", "vflair-core"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
