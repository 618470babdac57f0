"""The rules of a submission, and everything by which one breaks them. What can be derived from a file is derived, not believed."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import field, frozen, validators

from vflair_core.errors import VflairError
from vflair_core.experiments.attack_phase import REFERENCES
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.experiment import Experiment
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.grading.ranking import strongest
from vflair_core.experiments.grading.scores import Utility, scores
from vflair_core.experiments.result import Result
from vflair_core.experiments.studies.pieces import arms_of, cell_key, launched

Entry = dict[str, Any]  # a cell of a submission
OF_TEXT = {"tokens", "response"}
TARGETS = OF_TEXT | {"labels", "answers", "members"}
ABSOLUTE = re.compile(r"([/~]|[A-Za-z]:\\\\)\S*$")
PLUGIN = re.compile(r"[A-Za-z]\w*\.py")  # the name of a file, and no path


@frozen
class Rules:
    """What a submission must have.

    Attributes:
        seeds: Different seeds of each setting.
        victims: Graded victims of each attack, over all seeds of a setting.
    """

    seeds: int = field(default=3, validator=validators.ge(1))
    victims: int = field(default=30, validator=validators.ge(1))


def digest_of(content: Mapping[str, Any]) -> str:
    """Hash of all of a submission but this."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()


def problems(content: Mapping[str, Any], rules: Rules) -> list[str]:
    """Everything by which a submission breaks the rules."""
    if content.get("digest") != digest_of(content):
        return ["its digest is not that of its content: it was changed after it was made."]
    try:
        return list(_wrong(content, rules))
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, VflairError) as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        return [f"it is not as `vflair submit` writes one ({told})."]


def _wrong(content: Mapping[str, Any], rules: Rules) -> Iterator[str]:
    for name in ("title", "by"):
        if not content[name].strip():
            yield f"it has no {name}."
    for name in content["plugins"]:
        if not PLUGIN.fullmatch(name):
            yield f"{name!r} is no name of a plugin's file, like my_plugin.py."
    if not content["cells"]:
        yield "it has no cell with a result."
    keys = [entry["key"] for entry in content["cells"]]
    if len(set(keys)) < len(keys):
        yield "one of its cells is there twice."
    for entry in content["cells"]:
        name = ", ".join(f"{k} = {v}" for k, v in entry["labels"].items()) or entry["key"]
        for each in _of_cell(entry, content["plugins"]):
            yield f"{name}: {each}"
    yield from _together(content["cells"], rules)


def _of_cell(entry: Entry, plugins: Mapping[str, str]) -> Iterator[str]:
    e, numbers = experiment_from(entry["experiment"]), entry["numbers"]
    if Result(numbers, {}, {}, "").numbers_hash != entry["numbers_hash"]:
        yield "its numbers are not those that were hashed."
    if cell_key(e, entry["environment"]) != entry["key"]:
        yield "its key is not that of its experiment and versions."
    if e.isolation != "process":
        yield 'isolation is "inline": attacks must run in a process that cannot reach the truth.'
    if e.channel != "local:":
        yield f"its model party is at {e.channel}: who runs it again must not have to ask a machine."
    if not e.attacks:
        yield "nothing attacks it."
    for path in sorted(
        set(_paths([entry["experiment"], entry["task"], entry["environment"]["files"]]))
    ):
        yield f"it names {path}, which is on one machine: take it from the hub or a package, or name it from where it is run."
    known = {f"file {hashlib.sha256(text.encode()).hexdigest()[:16]}" for text in plugins.values()}
    deciding = entry["environment"]["deciding"]
    for what, source in {**entry["environment"]["sources"], **deciding}.items():
        if source.startswith("file ") and source not in known:
            yield f"the code of {what} is a file that is not part of it: give it by --plugin."
        elif not source.startswith("file ") and " " not in source:
            yield f"{what} is from {source}, which has no version."
    if set(arms_of(e)) != numbers.keys() & REFERENCES.keys():
        yield f"it has not the arms of its experiment: {', '.join(arms_of(e))}."
        return
    for arm in arms_of(e):
        for each in _of_arm(e, arm, numbers[arm], entry["hits"][arm]):
            yield f"{arm}: {each}"
    ignored = [
        t for t, read in numbers.get("defended", {}).get("evaluated", {}).items() if not read
    ]
    if ignored:
        yield f"no attack on {' or '.join(ignored)} took the defense into account: add one that knows it (K4) or asked through it."
    yield from _derived(numbers)


def _paths(value: Any) -> Iterator[str]:
    """The absolute paths in nested values, names of keys too."""
    if isinstance(value, Mapping):
        yield from _paths([*value, *value.values()])
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _paths(each)
    elif isinstance(value, str) and ABSOLUTE.match(value):
        yield value


def _of_arm(
    e: Experiment, arm: str, numbers: Mapping[str, Any], hits: Sequence[Any]
) -> Iterator[str]:
    wanted = {
        (attack.name, "+".join(names)) for name, _, attack, names in launched(e) if name == arm
    }
    given = {(grade["attack"], grade["knowledge"]) for grade in numbers["attacks"]}
    if wanted != given:
        yield "its grades are not of the attacks of its experiment."
    if len(hits) != len(numbers["attacks"]):
        yield "its hits are not of its grades."
    for grade, right in zip(numbers["attacks"], hits, strict=False):
        for each in _of_grade(arm, grade, right, e.victims.count):
            yield f"{grade['attack']} ({grade['knowledge']}) {each}"


def _of_grade(
    arm: str, grade: Mapping[str, Any], hits: Sequence[Any], victims: int
) -> Iterator[str]:
    reached, (low, high) = grade["attack_performance"], grade["interval"]
    if grade["target"] not in TARGETS:
        yield f"guesses {grade['target']!r}, which is none of {', '.join(sorted(TARGETS))}."
    for control, needed in {
        "negative_control": grade["target"] in OF_TEXT,
        "positive_control": bool(REFERENCES[arm]),
    }.items():
        if type(grade[control]) not in {float, int} and (needed or grade[control] is not None):
            yield f"has no {control.replace('_', ' ')}."
    if not (0 <= reached <= 1 and low - 1e-9 <= reached <= high + 1e-9):
        yield f"is right at a rate of {reached} in [{low}, {high}]."
    right, possible = (sum(pair[n] for pair in hits) for n in (0, 1))
    if len(hits) > victims or any(not 0 <= pair[0] <= pair[1] for pair in hits):
        yield "has hits that no run can have."
    elif grade["target"] in OF_TEXT and possible and abs(right / possible - reached) > 1e-6:
        yield f"is right at a rate of {reached}, and its hits are {right} of {possible}."


def _derived(numbers: Mapping[str, Any]) -> Iterator[str]:
    """What follows from the grades must follow from them."""
    grades = {
        arm: [_grade(g) for g in numbers[arm]["attacks"]] for arm in REFERENCES if arm in numbers
    }
    for arm, each in grades.items():
        if not _same(strongest(each), numbers[arm]["strongest"]):
            yield f"{arm}: its strongest attacks are not those of its grades."
    if "defended" in grades:
        plain, main = numbers["undefended"], numbers["defended"]["main_performance"]
        utility = Utility(main, plain["main_performance"], plain["chance"])
        made = scores(grades["undefended"], grades["defended"], utility)
        if not _same(made, numbers["dcs"]):
            yield "its scores are not those of its grades."


def _grade(plain: Mapping[str, Any]) -> Grade:
    course = [{**point, "seconds": 0.0} for point in plain["course"]]
    known = tuple(plain["knowledge"].split("+"))
    return Grade(
        **{**plain, "knowledge": known, "course": course, "interval": tuple(plain["interval"])}
    )


def _same(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _together(entries: Sequence[Entry], rules: Rules) -> Iterator[str]:
    """What is wrong with cells of one setting beside each other."""
    settings: dict[str, list[Entry]] = defaultdict(list)
    places: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        settings[setting_of(entry)].append(entry)
        places[place_of(entry)].append(entry)
    for group in settings.values():
        name = _named(group[0])
        seeds = {entry["experiment"]["seed"] for entry in group}
        if len(seeds) < rules.seeds:
            yield f"{name}: {len(seeds)} seeds, and {rules.seeds} are needed."
        graded = sum(
            min((len(hits) for arm in e["hits"].values() for hits in arm), default=0) for e in group
        )
        if graded < rules.victims:
            yield f"{name}: {graded} graded victims over all seeds, and {rules.victims} are needed."
    for group in places.values():
        if len(set(map(attacks_of, group))) > 1:
            yield f"{_named(group[0])} and others like it are attacked by different attacks or with different budgets."
        trials = sorted({entry["tuned"]["budget"] for entry in group if entry["tuned"]})
        if len(trials) > 1:
            yield f"{_named(group[0])} and others like it were tuned with {trials[0]} to {trials[-1]} trainings."


def setting_of(entry: Entry) -> str:
    """What cells share that differ in their seed only, and in what a tuned option came to with it."""
    defenses, tuned = entry["experiment"]["defenses"], entry["tuned"]
    if tuned:
        fixed = [
            [each["name"], {k: v for k, v in each["options"].items() if k != tuned["option"]}]
            for each in defenses
        ]
        defenses = [fixed, tuned["option"], tuned["keep"]]
    return json.dumps([place_of(entry), defenses], sort_keys=True, default=list)


def place_of(entry: Entry) -> str:
    """What cells share that differ in seed and defenses only: they are compared, so they must be attacked alike."""
    e = dict(entry["experiment"]) | {"seed": 0, "defenses": [], "attacks": []}
    options = {k: v for k, v in e["task"]["options"].items() if k != "seed"}
    e["task"] = {**e["task"], "options": options}
    return json.dumps(e, sort_keys=True, default=list)


def attacks_of(entry: Entry) -> str:
    """By what a cell is attacked, with which knowledge and budgets: what cells must share to be compared."""
    return json.dumps(entry["experiment"]["attacks"], sort_keys=True, default=list)


def _named(entry: Entry) -> str:
    labels = {k: v for k, v in entry["labels"].items() if k != "seed"}
    return ", ".join(f"{k} = {v}" for k, v in labels.items()) or entry["experiment"]["task"]["name"]
