"""Run an experiment: public pretraining, the undefended arm, the defended arm, and what compares them."""

from __future__ import annotations

import copy
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from vflair_core.experiments.arm import Arm, choose, run_arm
from vflair_core.experiments.build import build_run, make_defenses
from vflair_core.experiments.comparison import compared
from vflair_core.experiments.context import Clock, Reporter, RunContext
from vflair_core.experiments.experiment import Experiment
from vflair_core.experiments.model_party_elsewhere import check_seeds
from vflair_core.experiments.output import RunFolder
from vflair_core.experiments.result import Result, facts_of, versions
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
    overwrite: bool = False,
    strict: bool = False,
    keep_evidence: bool = False,
    cache: str | Path | None = None,
) -> Result:
    """Run `experiment` and return what it found; with `out`, write result, transcript and experiment there.

    Each arm is written when it is done: of a run that ends early these stay, in a result that is not `finished`.

    Args:
        experiment: What to run.
        plugins: Where tasks, defenses and attacks come from; by default everything installed.
        report: Told (phase, done, total) now and then.
        out: Folder to write to; it is made, and holds no run yet.
        overwrite: Let a run that `out` holds go away.
        strict: Let an observer that raises stop the run.
        keep_evidence: Write all that an attacker could hold, and the truth, into `out`, for `attack_again`.
        cache: Folder in which the public phase, and what defenses prepare on public text, is kept for other runs.

    Raises:
        VflairError: Something in the experiment does not exist or does not fit, or `out` cannot be written to.
    """
    return run_sharing(
        None,
        experiment,
        plugins=plugins if plugins is not None else plugin_manager(),
        report=report,
        out=out,
        overwrite=overwrite,
        strict=strict,
        keep_evidence=keep_evidence,
        cache=cache,
    )


def run_sharing(
    trained: Path | None,
    experiment: Experiment,
    *,
    plugins: pluggy.PluginManager,
    out: str | Path | None,
    overwrite: bool = False,
    strict: bool = False,
    keep_evidence: bool = False,
    cache: str | Path | None = None,
    report: Reporter = lambda *_: None,
) -> Result:
    """Do what `run` does; undefended fine-tunings that are equal at several depths of the cut share the folder `trained`.

    Only who knows that nothing but the cut differs may give one: no version and no plugin is compared.
    """
    folder = None
    if out is not None:
        folder = RunFolder.claim(out, experiment, overwrite=overwrite)
    observe(plugins, "vflair_run_started", strict=strict, experiment=experiment)
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng():
            if experiment.threads:
                torch.set_num_threads(experiment.threads)
            result = _run_seeds(
                experiment,
                folder,
                plugins=plugins,
                report=report,
                strict=strict,
                keep=keep_evidence,
                cache=Path(cache) if cache is not None else None,
                trained=trained,
            )
    except BaseException as error:
        if folder is not None and (rest := folder.give_up()):
            error.add_note(rest)
        observe(plugins, "vflair_run_failed", experiment=experiment, error=error)
        raise
    finally:
        torch.set_num_threads(threads)
    observe(plugins, "vflair_run_finished", strict=strict, result=result)
    return result


def _run_seeds(e: Experiment, out: RunFolder | None, **options: Any) -> Result:
    """Run once, or once with each seed: then the result is the first seed's, with what all of them say."""
    check_seeds(e)
    if not e.seeds:
        return _run_seed(e, out, **options)[0]
    runs: dict[int, Mapping[str, Arm]] = {}
    first: Result | None = None
    for seed in e.seeds:
        alone = attrs.evolve(e, seed=seed, seeds=())
        folder = out.within(f"seed-{seed}", alone) if out is not None else None
        result, runs[seed] = _run_seed(alone, folder, **options)
        first = first or attrs.evolve(result, experiment=e.to_dict(), config_hash=e.digest)
        if out is not None:
            out.write(attrs.evolve(first, finished=False))
    assert first is not None  # there is at least one seed
    numbers = {**first.numbers, "over_seeds": over_seeds(_of_arms(runs, ""))}
    if e.adversary is not None:
        numbers["over_seeds_active"] = over_seeds(_of_arms(runs, "active-"))
    whole = attrs.evolve(first, numbers=numbers)
    if out is not None:
        for name, arm in runs[e.seeds[0]].items():
            out.write_transcript(name, arm.transcript)
        out.write(whole)
    return whole


def _of_arms(runs: Mapping[int, Mapping[str, Arm]], prefix: str) -> dict[int, dict[str, Arm]]:
    """The arms of each seed with or without an active adversary, under the names of those without."""
    names = ("undefended", "defended")
    return {
        seed: {name: arms[prefix + name] for name in names if prefix + name in arms}
        for seed, arms in runs.items()
    }


def _run_seed(
    e: Experiment, out: RunFolder | None, **options: Any
) -> tuple[Result, dict[str, Arm]]:
    """Run all arms with one seed, and write each when it is done; `options` are those of `build_run`."""
    clock, arms = Clock(), dict[str, Arm]()
    folder = out.path if out is not None else None
    setting, model = build_run(e, out=folder, clock=clock, **options)
    if out is not None:
        out.begin()
    for name, arm in _arms(model, setting, clock):
        arms[name] = arm
        if out is not None:
            out.write(_result_of(arms, e, setting, clock, finished=False))
            out.write_transcript(name, arm.transcript)
    result = _result_of(arms, e, setting, clock)
    if out is not None:
        out.write(result)
    return result, arms


def _arms(model: Any, setting: RunContext, clock: Clock) -> Iterator[tuple[str, Arm]]:
    """Run the arms one after the other: undefended, defended, and both once more under an active adversary."""
    e, passes = setting.experiment, (False, True) if setting.adversary is not None else (False,)
    for active in passes:
        name = "active-" if active else ""
        plain = run_arm(f"{name}undefended", copy.deepcopy(model), [], setting, [], active=active)
        if e.check_unsplit and not active:
            with clock("unsplit reference"), setting.phase("unsplit reference"):
                compare_unsplit(copy.deepcopy(model), setting, plain)
        yield f"{name}undefended", plain
        if e.defenses:
            spare = model if active == passes[-1] else copy.deepcopy(model)
            each = make_defenses(e, setting.plugins)
            references = plain.references
            arm = run_arm(f"{name}defended", spare, each, setting, references, active=active)
            yield f"{name}defended", arm


def _result_of(
    arms: Mapping[str, Arm],
    e: Experiment,
    setting: RunContext,
    clock: Clock,
    *,
    finished: bool = True,
) -> Result:
    """What these arms found, each by itself and compared."""
    beside = bool(setting.experiment.victims.companions)
    cost: dict[str, Any] = {name: arm.cost for name, arm in arms.items()}
    cost["seconds"] = dict(clock.seconds)
    cost["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Result(
        numbers=compared(arms, setting.task.kind, companions=beside),
        cost=cost,
        experiment=e.to_dict(),
        config_hash=e.digest,
        versions=versions(),
        plugins=[attrs.asdict(info) for info in getattr(setting.plugins, "about", list)()],
        task=facts_of(setting.task),
        samples=[{"arm": name, **row} for name, arm in arms.items() for row in arm.samples],
        finished=finished,
    )


def compare_unsplit(whole: Any, setting: RunContext, arm: Arm) -> None:
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
