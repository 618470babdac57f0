"""From an experiment to what all its arms share, and the model they cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vflair_core.attacks.adaptive import check_one_replaces
from vflair_core.attacks.attack import Launch
from vflair_core.attacks.isolation import attack_device
from vflair_core.attacks.knowledge import BEFORE, names_of
from vflair_core.defenses.defense import Defense
from vflair_core.errors import ExperimentError, alternatives
from vflair_core.experiments.base_model import prepare_model
from vflair_core.experiments.context import Clock, Reporter, RunContext, noise_seed
from vflair_core.experiments.experiment import AttackSpec, Experiment, Victims
from vflair_core.experiments.model_party_elsewhere import check_elsewhere
from vflair_core.experiments.pretraining import prior_guess
from vflair_core.experiments.victims import (
    check_secrets,
    companions_of,
    victims_of,
    with_companions,
)
from vflair_core.offers import build, find
from vflair_core.partition.adapters import check_peft
from vflair_core.partition.partition import Partition
from vflair_core.randomness import stream_seed
from vflair_core.tasks.task import Task

if TYPE_CHECKING:
    import pluggy


def build_run(
    e: Experiment,
    plugins: pluggy.PluginManager,
    *,
    report: Reporter = lambda *_: None,
    out: Path | None = None,
    strict: bool = False,
    keep: bool = False,
    collecting: bool = False,
    cache: Path | None = None,
    trained: Path | None = None,
    clock: Clock | None = None,
) -> tuple[RunContext, Any]:
    """Build the task and the attacks and run the public phase; return what all arms share, and the model.

    An arm consumes its model: give it a copy. `run` does the two arms of an experiment; who compares many defenses
    runs one arm for each, with the same setting.
    """
    attack_device(e.attack_device)  # what is not there is told before anything is built
    clock = clock or Clock()
    report("building the task", 0, 1)
    with clock("task"):
        task: Task = build(find(plugins, "tasks", e.task.name), e.task.options)
    # Who is told it finds neither the experiment's seed, which makes tasks and orders, nor that of the noise.
    seed = stream_seed(noise_seed(e.seed, task), "attacks")
    launches = make_launches(e.attacks, plugins, seed)
    adversary = make_adversary(e.adversary, plugins, seed) if e.adversary else None
    _check(e, task, launches, adversary, make_defenses(e, plugins))
    report("building the task", 1, 1)
    report("building the model", 0, 1)
    with clock("pretraining"):
        model, tokenizer, processor = prepare_model(e, task, report, cache)
    _check_model(e, model)
    report("building the model", 1, 1)
    e = with_companions(e, task, model)
    setting = RunContext(
        experiment=e,
        private_seed=seed,
        plugins=plugins,
        report=report,
        strict=strict,
        out=out,
        task=task,
        tokenizer=tokenizer,
        processor=processor,
        pretrained={key: value.clone() for key, value in model.state_dict().items()},
        launches=launches,
        adversary=adversary,
        victims=victims_of(e, task),
        prior=_prior(e, task, model, tokenizer),
        keep=keep or collecting,
        collecting=collecting,
        cache=cache,
        trained=trained,
    )
    return setting, model


def _check(
    e: Experiment,
    task: Task,
    launches: Sequence[Launch],
    adversary: Launch | None,
    defenses: Sequence[Defense],
) -> None:
    """See that the parts fit each other, as far as that needs no model: before the public phase, which takes long."""
    for launch in launches:
        _check_offered(launch, e.victims)
    if adversary is not None:
        _check_offered(adversary, e.victims, active=True)
    check_elsewhere(e)
    if e.train.lora.r:
        check_peft()
    companions_of(e, task)
    check_secrets(e, task)
    check_one_replaces(defenses, launches)
    if e.victims.companions and e.partition.only_scored:
        raise ExperimentError(
            "partition.only_scored returns positions that some row of a batch scores for all of its rows, so "
            "victims cross alone: set victims.companions = 0."
        )


def _check_model(e: Experiment, model: Any) -> None:
    """See that the victims can cross in batches of this model, if they are to."""
    if e.victims.companions and model.config.is_encoder_decoder:
        raise ExperimentError(
            f"{type(model).__name__} has two stacks, which pad a batch each in its own way, so victims cross alone: set "
            "victims.companions = 0."
        )


def make_launches(
    specs: Sequence[AttackSpec], plugins: pluggy.PluginManager, seed: int
) -> list[Launch]:
    """Build attacks with their options.

    Raises:
        AttackError: One asks for more than it is granted.
    """
    launches = [Launch(spec.name, _attack(plugins, spec), spec.knowledge, seed) for spec in specs]
    for launch in launches:
        launch.check()
    return launches


def make_adversary(spec: AttackSpec, plugins: pluggy.PluginManager, seed: int) -> Launch:
    """Build the attack whose model party cheats; it is launched when all is over, with what it kept.

    Raises:
        ExperimentError: It is no active attack.
        AttackError: It asks for more than it is granted, then or before.
    """
    attack = _attack(plugins, spec)
    if not hasattr(attack, "adversary"):
        raise ExperimentError(
            f"{spec.name!r} under [adversary] only watches: it has no method `adversary`. List it under [[attacks]]; "
            "an active one is feature-space-hijacking."
        )
    launch = Launch(spec.name, attack, (*names_of(spec.knowledge), "adversary_state"), seed)
    launch.check()
    briefing_of(launch).check()
    return launch


def briefing_of(launch: Launch) -> Launch:
    """What an active attack is granted before anything crosses."""
    names = tuple(sorted(launch.granted & BEFORE))
    return Launch(launch.name, launch.attack, names, launch.seed, opening=True)


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


def _check_offered(launch: Launch, victims: Victims, *, active: bool = False) -> None:
    """Some knowledge exists only if the experiment makes it."""
    made = {
        "adversary_state": (active, f"[adversary] name = {launch.name!r}"),
        "updates": (victims.share_updates, "victims.share_updates = true"),
        "known_labels": (victims.known, "victims.known = 8"),
        "candidates": (victims.candidates, "victims.candidates = 8"),
    }
    for name in launch.required:
        makes, how = made.get(name, (True, ""))
        if not makes:
            raise ExperimentError(
                f"{launch.name} needs {name}, which this experiment does not make. Set {how} (an assumption that "
                "the result states), or leave the attack out."
            )


def make_defenses(e: Experiment, plugins: pluggy.PluginManager) -> list[Defense]:
    """Build the defenses that an experiment lists, in its order.

    Raises:
        ExperimentError: A plugin offers something else under that name.
    """
    made = [build(find(plugins, "defenses", spec.name), spec.options) for spec in e.defenses]
    for spec, defense in zip(e.defenses, made, strict=True):
        if not isinstance(defense, Defense):
            raise ExperimentError(f"{spec.name!r} is a {type(defense).__name__}, not a Defense.")
    return made


def _prior(e: Experiment, task: Task, model: Any, tokenizer: Any) -> torch.Tensor | None:
    if task.kind != "causal-lm":
        return None
    length = e.victims.max_length or e.train.max_length
    return prior_guess(model, tokenizer, task.public, length)


def choose_partition(model: Any, e: Experiment, plugins: pluggy.PluginManager) -> Partition:
    """The cut of the experiment, or the one that the plugin it names chooses.

    Raises:
        ExperimentError: The plugin it names does not answer.
    """
    if not e.partition_plugin:
        return e.partition
    answers = plugins.hook.vflair_partition.get_hookimpls()
    chosen = [i for i in answers if i.plugin_name == e.partition_plugin]
    if not chosen:
        names = [i.plugin_name for i in answers]
        raise ExperimentError(
            f"No plugin {e.partition_plugin!r} answers vflair_partition."
            f"{alternatives(e.partition_plugin, names)}"
        )
    given: dict[str, Any] = {"model": model, "partition": e.partition}
    answer: Any = chosen[0].function(**{n: given[n] for n in chosen[0].argnames})
    return e.partition if answer is None else answer
