"""The leaderboard: a page made of submissions, each setting with its defenses in order of their worst case."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from vflair_core.attacks.knowledge import PRESETS
from vflair_core.errors import ExperimentError
from vflair_core.experiments.studies.rules import Entry, attacks_of, place_of, setting_of
from vflair_core.experiments.studies.submission import read_submission

HEAD = """# Leaderboard

Results that anybody can check: each row comes from a file in `docs/leaderboard/`, which says what was run, with which versions and seeds,
and what was found. This page is made of those files.

```bash
vflair verify-result docs/leaderboard/NAME.json    # runs it again and compares
vflair leaderboard docs/leaderboard --out docs/leaderboard.md
```

**Utility** is main performance, and how much of what the undefended model does better than chance is left. **Read by** is the
strongest attack of those who know so much, mean over seeds, with the rate reached without any message (the floor) beside it; who was granted
something beyond the presets, as answered queries, has a column of their own. **Worst case** is the least, over seeds, of the score that
ranks: 1 if nothing is lost, .586 if all of the text is or all of the utility, .5 if both are. A row whose attack failed a control in some
seed says so and is not ranked. Rows are compared within a table only, where all were attacked alike.

## How to enter

A new attack or defense enters by a pull request with one file. Run a study with three seeds or more, its undefended cells, and
the same attacks for every defense, then

```bash
vflair submit runs/study/study.db --title "What it shows" --by "Who made it" --out docs/leaderboard/NAME.json
```

which names everything that the rules lack: cells that are not done, controls that are missing, defenses that no attack took into account,
attacks in this process, budgets that differ, plugins without a version. The code of a plugin in one file goes into the file (`--plugin FILE`); one that is published is named by its
version. Who reviews it runs `vflair verify-result`.
"""


@frozen
class Row:
    """A setting of one defense over its seeds."""

    defense: str
    option: str
    seeds: int
    main: float
    kept: float | None  # None of the undefended row
    read: dict[str, tuple[float, float, str]]  # by knowledge: rate, floor, attack
    worst: float | None
    remark: str
    file: str


def leaderboard(folder: str | Path) -> str:
    """The page of all submissions in a folder, as Markdown.

    Raises:
        ExperimentError: There is no such folder, or one of them does not keep the rules.
    """
    if not Path(folder).is_dir():
        raise ExperimentError(f"There is no folder {folder} with submissions.")
    places: dict[tuple[str, str], list[tuple[Entry, str]]] = defaultdict(list)
    for path in sorted(Path(folder).glob("*.json")):
        for entry in read_submission(path)["cells"]:
            places[place_of(entry), attacks_of(entry)].append((entry, path.name))
    parts, named = [HEAD], list[str]()
    for _, entries in sorted(places.items()):
        title, told = _heading(entries[0][0])
        named.append(title)
        again = f" ({named.count(title)})" if title in named[:-1] else ""
        parts += [f"## {title}{again}\n", f"{told}\n", _table(_rows(entries)), ""]
    return "\n".join(parts).rstrip() + "\n"


def _heading(entry: Entry) -> tuple[str, str]:
    """The setting in words: what rows of one table have in common."""
    e = entry["experiment"]
    cut, v, train = e["partition"], e["victims"], e["train"]
    model = (
        e["model"]["gguf_file"].removesuffix(".gguf")
        or e["model"]["name"]
        or e["model"]["config"]["model_type"]
    )
    kind = "HBT" if cut["tail"] else "HT"
    title = f"{model}, {e['task']['name']}, {kind} {cut['head']}+{cut['tail']}"
    told = f"Victims cross in {'training' if v['phase'] == 'train' else 'inference'}, {v['count']} with each seed"
    told += (
        f", after {train['steps']} steps of fine-tuning."
        if train["steps"]
        else ", of a model that is not fine-tuned."
    )
    attacks = "; ".join(_attack(each) for each in e["attacks"])
    return title, f"{told} Attacked by {attacks}."


def _attack(attack: Mapping[str, Any]) -> str:
    known = attack["knowledge"]
    words = [known if isinstance(known, str) else " + ".join(known)]
    words += [f"{name} {value}" for name, value in attack["options"].items()]
    return f"`{attack['name']}` ({', '.join(words)})"


def _rows(entries: Sequence[tuple[Entry, str]]) -> list[Row]:
    groups: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry, file in entries:
        groups[setting_of(entry), file].append(entry)
    rows = [_row(_defense(group[0]), group, file) for (_, file), group in groups.items()]
    return sorted(
        rows, key=lambda row: (row.kept is not None, row.worst is None, -(row.worst or 0.0))
    )


def _defense(entry: Entry) -> str:
    """The defenses by name, with options that are not tuned."""
    tuned = (entry["tuned"] or {}).get("option")
    told = []
    for each in entry["experiment"]["defenses"]:
        options = [f"{k} {v}" for k, v in each["options"].items() if k != tuned]
        told.append(each["name"] + (f" ({', '.join(options)})" if options else ""))
    return " + ".join(told)


def _row(defense: str, group: Sequence[Entry], file: str) -> Row:
    arm = "defended" if defense else "undefended"
    mains = [entry["numbers"][arm]["main_performance"] for entry in group]
    scores = [entry["numbers"].get("dcs") for entry in group]
    worst = [score and score["normalised_worst"] for score in scores]
    failed = sorted(
        {
            f"{grade['attack']}: {grade['verdict'].partition(':')[0]}"
            for entry in group
            for grade in entry["numbers"][arm]["attacks"]
            if grade["verdict"] != "ok" and "uninformative" not in grade["verdict"]
        }
    )
    ranked = bool(defense) and not failed and None not in worst
    return Row(
        defense=defense or "none",
        option=_tuned(group),
        seeds=len(group),
        main=_mean(mains),
        kept=_mean([_kept(entry) for entry in group]) if defense else None,
        read=_read(group, arm),
        worst=min(worst) if ranked else None,  # type: ignore[type-var]
        remark="; ".join(failed),
        file=file,
    )


def _tuned(group: Sequence[Entry]) -> str:
    tuned = [entry["tuned"] for entry in group if entry["tuned"]]
    if not tuned:
        return ""
    values = sorted(each["value"] for each in tuned)
    span = f"{values[0]:.3g}" if values[0] == values[-1] else f"{values[0]:.3g}–{values[-1]:.3g}"
    return f"{tuned[0]['option']} {span}, keeps {tuned[0]['keep']:g}"


def _kept(entry: Entry) -> float:
    plain, main = entry["numbers"]["undefended"], entry["numbers"]["defended"]["main_performance"]
    above = plain["main_performance"] - plain["chance"]
    return float((main - plain["chance"]) / above) if above > 0 else 1.0


def _read(group: Sequence[Entry], arm: str) -> dict[str, tuple[float, float, str]]:
    """What the strongest attack of each knowledge reads, mean over seeds; the attack is the one of most seeds."""
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for entry in group:
        best: dict[str, Mapping[str, Any]] = {}
        for row in entry["numbers"][arm]["strongest"]:
            known = row["knowledge"]
            if known not in best or row["attack_performance"] > best[known]["attack_performance"]:
                best[known] = row
        for known, row in best.items():
            found[known].append(row)
    result = {}
    for known, rows in found.items():
        names = [row["attack"] for row in rows]
        rates = [_mean([row[key] for row in rows]) for key in ("attack_performance", "floor")]
        attack = max(sorted(set(names)), key=names.count)
        seeds = f", {len(rows)} of {len(group)} seeds" if len(rows) < len(group) else ""
        result[known] = (rates[0], rates[1], attack + seeds)
    return result


def _knowledge(rows: Sequence[Row]) -> list[str]:
    """All presets that attacks read by, then what they were granted beyond, each with the least preset that it stands beside."""
    shown = {known for row in rows for known in row.read}
    plain = [preset for preset in PRESETS if preset in shown]
    least: dict[str, str] = {}
    for known in sorted(shown - set(plain)):
        least.setdefault(known.partition(" + ")[2], known)
    return plain + sorted(least.values(), key=lambda known: (len(known.split()), known))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _table(rows: Sequence[Row]) -> str:
    knowledge = _knowledge(rows)
    columns = [
        "defense",
        "utility",
        *(f"read by {known}" for known in knowledge),
        "worst case",
        "seeds",
        "file",
    ]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        kept = "" if row.kept is None else f" ({row.kept:.0%} kept)"
        read = [_cell(row.read.get(known)) for known in knowledge]
        worst = "" if row.worst is None else f"**{row.worst:.3f}**"
        cells = [
            f"`{row.defense}`" + (f", {row.option}" if row.option else ""),
            f"{row.main:.3f}{kept}",
            *read,
            worst or (row.remark or ("reference" if row.kept is None else "not ranked")),
            str(row.seeds),
            f"[{row.file.removesuffix('.json')}](leaderboard/{row.file})",
        ]
        lines.append(f"| {' | '.join(_plain(cell) for cell in cells)} |")
    return "\n".join(lines)


def _cell(read: tuple[float, float, str] | None) -> str:
    return "–" if read is None else f"{read[0]:.3f} {read[2]} (floor {read[1]:.3f})"


def _plain(text: str) -> str:
    """Words that cannot leave their cell of a table."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
