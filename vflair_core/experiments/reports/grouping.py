"""Cells put together by what they are: which are seeds of one setting, and which settings are compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from vflair_core.experiments.experiment import Model, Named
from vflair_core.experiments.reports.settings import Group, Setting, Trial, hash_of
from vflair_core.experiments.studies.cell import Cell

# What tells apart neither what is trained nor what crosses, or is told otherwise.
_ASIDE = (
    "seed", "seeds", "attacks", "adversary", "check_unsplit", "save", "isolation", "threads", "attack_device",
)  # fmt: skip
# Axes of a grid that figures tell by something else than their labels.
_TOLD_OTHERWISE = {
    "model", "task", "seed", "defense", "defenses", "attack", "attacks", "knowledge", "keep",
}  # fmt: skip


def why_unread(cell: Cell) -> str:
    """Why a cell's numbers cannot stand beside others, or ""."""
    if cell.result is None and cell.tuned is not None and cell.error:
        return f"no setting was found: {cell.error}"
    if cell.result is None:
        return "failed" if cell.error else "not run"
    if not cell.result.finished:
        return "the result is not finished"
    if "undefended" not in cell.result.numbers:
        return "no undefended reference"
    if cell.experiment.defenses and "defended" not in cell.result.numbers:
        return "no defended arm"
    if cell.experiment.seeds:
        return "it has seeds of its own; give the study an axis of seeds instead"
    return ""


def groups_of(cells: Iterable[Cell]) -> tuple[Group, ...]:
    """Put readable cells together, in the order in which they come."""
    readable = [cell for cell in cells if not why_unread(cell)]
    models = _names({hash_of(c.experiment.model): _model_name(c) for c in readable})
    tasks = _names({hash_of(c.experiment.task): _task_name(c) for c in readable})
    together: dict[tuple[str, str, str], dict[str, list[Cell]]] = {}
    for cell in readable:
        e = cell.experiment
        place = (models[hash_of(e.model)], tasks[hash_of(e.task)], e.partition.kind)
        together.setdefault(place, {}).setdefault(_setting_key(cell), []).append(cell)
    return tuple(_group(place, of_setting) for place, of_setting in together.items())


def text_of(spec: Named) -> str:
    """A defense or an attack with its options on one line."""
    options = ", ".join(f"{name} = {_short(value)}" for name, value in spec.options.items())
    return f"{spec.name} ({options})" if options else spec.name


def _group(place: tuple[str, str, str], of_setting: Mapping[str, Sequence[Cell]]) -> Group:
    varying = _varying([cells[0].labels for cells in of_setting.values()])
    settings = [_setting(key, cells, varying) for key, cells in of_setting.items()]
    references = [
        _reference([s for s in settings if s.base == base])
        for base in dict.fromkeys(setting.base for setting in settings)
    ]
    return Group(*place, settings=_told_apart(settings), references=_told_apart(references))


def _told_apart(settings: Sequence[Setting]) -> tuple[Setting, ...]:
    """The settings with names of their own: by the depth of their cut, or else by a piece of their key."""
    made = tuple(settings)
    for tell in (lambda setting: f"head {setting.head}", lambda setting: setting.key[:6]):
        names = [setting.name for setting in made]
        made = tuple(
            attrs.evolve(s, place=", ".join(filter(None, (s.place, tell(s)))))
            if names.count(s.name) > 1
            else s
            for s in made
        )
    return made


def _setting(key: str, cells: Sequence[Cell], varying: Sequence[str]) -> Setting:
    first = cells[0]
    seeds = sorted({cell.experiment.seed for cell in cells})
    anywhere = _plain(first)
    anywhere["partition"] = {**anywhere["partition"], "head": None}
    return Setting(
        key=key,
        defense=_defense_name(first),
        place=", ".join(f"{axis} {first.labels[axis]}" for axis in varying),
        base=hash_of(_plain(first, without=("defenses",))),
        line=hash_of([anywhere, _aim(first)]),
        experiment=first.experiment,
        trials=tuple(
            Trial(seed, tuple(cell for cell in cells if cell.experiment.seed == seed))
            for seed in seeds
        ),
    )


def _reference(settings: Sequence[Setting]) -> Setting:
    """The undefended arms of settings that share them, as a setting without defenses."""
    first = next((s for s in settings if not s.defended), settings[0])
    trials: dict[int, list[Cell]] = {}
    for cell in (cell for setting in (first, *settings) for cell in setting.cells):
        others = trials.setdefault(cell.experiment.seed, [])
        if cell.experiment.attacks not in [other.experiment.attacks for other in others]:
            others.append(_undefended(cell))
    anywhere = _plain(first.cells[0], without=("defenses",))
    anywhere["partition"] = {**anywhere["partition"], "head": None}
    return attrs.evolve(
        first,
        defense="undefended",
        line=hash_of(anywhere),
        experiment=attrs.evolve(first.experiment, defenses=()),
        trials=tuple(Trial(seed, tuple(cells)) for seed, cells in sorted(trials.items())),
    )


def _undefended(cell: Cell) -> Cell:
    """The cell as it would be without its defenses; its key stays, since its numbers are there."""
    assert cell.result is not None, "only finished cells are put together"
    result = cell.result
    numbers = {"undefended": result.numbers["undefended"]}
    kept = {arm: grades for arm, grades in cell.grades.items() if arm == "undefended"}
    experiment = attrs.evolve(cell.experiment, defenses=())
    return attrs.evolve(
        cell, experiment=experiment, result=attrs.evolve(result, numbers=numbers), grades=kept
    )


def _setting_key(cell: Cell) -> str:
    return hash_of([_plain(cell), _aim(cell)])


def _plain(cell: Cell, without: Sequence[str] = ()) -> dict[str, Any]:
    """What decides numbers apart from seed and attacks; of a tuned cell without the value that was found."""
    plain = cell.experiment.to_dict()
    for name in (*_ASIDE, *without):
        del plain[name]
    if cell.tuned is not None and "defenses" in plain:
        option = str(cell.tuned["option"]).rpartition(".")[2]
        plain["defenses"] = [
            {**spec, "options": {k: v for k, v in spec["options"].items() if k != option}}
            for spec in plain["defenses"]
        ]
    return plain


def _aim(cell: Cell) -> list[Any]:
    return [] if cell.tuned is None else [cell.tuned["option"], cell.tuned["keep"]]


def _defense_name(cell: Cell) -> str:
    specs = cell.experiment.defenses
    if not specs:
        return "undefended"
    if cell.tuned is None:
        return cell.labels.get("defense") or " + ".join(text_of(spec) for spec in specs)
    name = cell.labels.get("defense") or " + ".join(spec.name for spec in specs)
    return f"{name}, tuned to keep {cell.tuned['keep']:.0%}"


def _varying(labels: Sequence[Mapping[str, str]]) -> list[str]:
    """Axes on which the settings of a group differ, apart from those that are told otherwise."""
    axes = dict.fromkeys(axis for each in labels for axis in each)
    return [
        axis
        for axis in axes
        if axis not in _TOLD_OTHERWISE and len({each.get(axis) for each in labels}) > 1
        and all(axis in each for each in labels)
    ]  # fmt: skip


def _model_name(cell: Cell) -> str:
    model: Model = cell.experiment.model
    if "model" in cell.labels:
        return cell.labels["model"]
    if model.name:
        return f"{model.name} {model.gguf_file}".strip()
    return f"{model.config['model_type']}, random"


def _task_name(cell: Cell) -> str:
    return cell.labels.get("task") or cell.experiment.task.name


def _names(names: Mapping[str, str]) -> dict[str, str]:
    """The names by what they name; with a piece of its hash where two are called the same."""
    given = list(names.values())
    return {
        key: f"{name} ({key[:4]})" if given.count(name) > 1 else name for key, name in names.items()
    }


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
