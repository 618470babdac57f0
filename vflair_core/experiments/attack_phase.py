"""The attacks of an arm: write down its evidence and the truth, attack, grade; and attack what was kept again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vflair_core.attacks.attack import Launch
from vflair_core.attacks.evidence import (
    FILES,
    Evidence,
    check_held,
    check_unchanged,
    needed,
    read_facts,
    save_evidence,
)
from vflair_core.attacks.isolation import Isolation, attack_device
from vflair_core.attacks.observables import Capture
from vflair_core.attacks.scratch import scratch_folder
from vflair_core.errors import AttackError, ExperimentError
from vflair_core.experiments.build import make_launches
from vflair_core.experiments.capture import Crossed, crossing_again
from vflair_core.experiments.context import Reporter, RunContext
from vflair_core.experiments.experiment import AttackSpec
from vflair_core.experiments.grading.answer_key import AnswerKey
from vflair_core.experiments.grading.grader import attack_and_grade
from vflair_core.experiments.grading.grades import Grade, Reference
from vflair_core.experiments.grading.truth import Truth, truth_of
from vflair_core.experiments.output import KEY, closed, read_finished
from vflair_core.experiments.victims import auxiliary_of, candidates_of
from vflair_core.plugins import plugin_manager

if TYPE_CHECKING:
    import pluggy

    from vflair_core.parties.data_party.party import DataParty
    from vflair_core.parties.model_party.party import ModelParty

REFERENCES = {  # each arm, and the one whose grades it is compared with
    "undefended": "",
    "defended": "undefended",
    "active-undefended": "",
    "active-defended": "active-undefended",
}


def attack_arm(
    name: str,
    party: DataParty,
    model_party: ModelParty,
    setting: RunContext,
    crossed: Crossed,
    references: list[Reference],
    *,
    adversary: Mapping[str, Tensor] | None = None,
) -> tuple[list[Grade], Truth]:
    """Let the attacks work on what crossed, and grade them; return the grades and the truth.

    `adversary` is what the active adversary kept, where there was one; its own attack then comes last. Where evidence is
    only collected, nothing is attacked and there are no grades.
    """
    e, (main, bypassed, queries) = setting.experiment, crossed
    again = crossing_again(setting)
    launches = [] if setting.collecting else list(setting.launches)
    if adversary is not None and setting.adversary is not None and not setting.collecting:
        launches.append(setting.adversary)
    victims = {"main": len(setting.victims)} | ({"bypassed": len(again)} if bypassed else {})
    evidence = Evidence(
        party=party,
        model_party=model_party,
        pretrained=setting.pretrained,
        main=main,
        bypassed=bypassed,
        releases=e.victims.releases,
        task_kind=setting.task.kind,
        victims=victims,
        seed=setting.private_seed,
        auxiliary=auxiliary_of(setting.task, e.victims, setting.private_seed),
        queries=queries,
        adversary=adversary,
        update_batch=e.victims.update_batch,
    )
    key = _answer_key(party, setting, main, bypassed)
    with _store(name, setting) as store:
        save_evidence(store, evidence, FILES if setting.keep else needed(launches))
        grades = attack_and_grade(
            launches,
            store,
            key,
            decode=getattr(party.tokenizer, "decode", None),
            references=references if party.defenses.each else None,
            isolation=e.isolation,
            progress=lambda label, done, total: setting.report(f"{name}: {label}", done, total),
            threads=e.threads or None,
            device=e.attack_device,
        )
        if setting.keep:  # afterwards: no attack of the run can find it
            key.save(store / KEY)
    return grades, key.truth


def _answer_key(
    party: DataParty, setting: RunContext, main: Capture, bypassed: Capture | None
) -> AnswerKey:
    """The truth about what crossed, and which victims are for what."""
    e, again = setting.experiment, crossing_again(setting)
    preprocessor = party.preprocessor(setting.victim_length)
    facts: dict[str, Any] = {
        "known": e.victims.known,
        "members": candidates_of(setting.task, e.victims, setting.private_seed)[1],
    }
    return AnswerKey(
        truth_of(preprocessor, setting.victims, main.rows, **facts),
        tuple(range(len(again))),
        truth_of(preprocessor, again, bypassed.rows, **facts) if bypassed else None,
        setting.prior,
        e.victims.development,
        e.victims.update_batch,
    )


def is_active(launch: Launch) -> bool:
    """Whether it can only guess after an active adversary of its own."""
    return "adversary_state" in launch.required


@contextmanager
def _store(arm: str, setting: RunContext) -> Iterator[Path]:
    """Where the evidence of an arm lies: beside the result if it is kept, else nowhere for long."""
    if not setting.keep:
        with scratch_folder() as folder:
            yield folder
        return
    if setting.out is None:
        raise ExperimentError("Evidence is kept in an output folder: pass out= (or --out).")
    with closed(setting.out / f"evidence-{arm}") as store:
        yield store


def attack_again(
    run: str | Path,
    attacks: Sequence[AttackSpec],
    *,
    plugins: pluggy.PluginManager | None = None,
    isolation: Isolation = "process",
    device: str = "auto",
    report: Reporter = lambda *_: None,
) -> dict[str, list[Grade]]:
    """Attack the evidence that a run has kept in its folder `run`; return the grades of each arm.

    Neither party is needed. The undefended arm is the reference of the defended one and the seed is the run's, so an
    attack of the run gets the very grade that it had there, on the same `device` (see `Experiment.attack_device`).

    Raises:
        AttackError: The run is unfinished or kept no evidence, it was changed since, or an attack needs what the run did not make or more than is granted.
        ExperimentError: The device is not there.
    """
    attack_device(device)
    stores = {arm: Path(run) / f"evidence-{arm}" for arm in REFERENCES}
    stores = {arm: store for arm, store in stores.items() if (store / KEY).exists()}
    if not stores:
        raise AttackError(
            f"{run} holds no evidence to attack again. Run the experiment with --keep-evidence (keep_evidence=True); "
            "with several seeds, each has a folder of its own below."
        )
    finished, arms = read_finished(Path(run))
    if not finished:
        done = f"only {', '.join(arms)} is done" if arms else "no arm of it is done"
        raise AttackError(
            f"The run in {run} is unfinished: {done}, so its evidence is of half an experiment. Run it again "
            "(--overwrite), then attack."
        )
    for store in stores.values():
        check_unchanged(store)
    seed = read_facts(next(iter(stores.values())))["seed"]
    launches = make_launches(attacks, plugins if plugins is not None else plugin_manager(), seed)
    grades: dict[str, list[Grade]] = {}
    for arm, store in stores.items():
        here = [launch for launch in launches if arm.startswith("active") or not is_active(launch)]

        def report_progress(label: str, done: int, total: int, *, arm: str = arm) -> None:
            report(f"{arm}: {label}", done, total)

        grades[arm] = attack_store(
            store,
            here,
            references_of(grades[REFERENCES[arm]]) if REFERENCES[arm] else None,
            isolation=isolation,
            progress=report_progress,
            device=device,
        )
    return grades


def attack_store(
    store: Path, launches: Sequence[Launch], references: list[Reference] | None, **options: Any
) -> list[Grade]:
    """Attack what an arm left in the folder `store`, which holds the truth too; `options` are those of `attack_and_grade`.

    Raises:
        AttackError: An attack needs what the run did not make, or more than is granted.
    """
    for launch in launches:
        check_held(store, launch)
    key, decode = AnswerKey.load(store / KEY), _decoder(store)
    return attack_and_grade(launches, store, key, decode=decode, references=references, **options)


def references_of(grades: Sequence[Grade]) -> list[Reference]:
    """What each attack reached in the undefended arm, for the other arm to be compared with."""
    return [Reference(grade.reference, informative=grade.informative) for grade in grades]


def _decoder(store: Path) -> Any:
    if not (store / "tokenizer").exists():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(store / "tokenizer").decode
