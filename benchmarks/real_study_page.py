"""Write what `benchmarks/real_study.py` found into docs/choosing-a-defense.md: a table for each cut, and the figure.

`python benchmarks/real_study_page.py`. Tables go between the lines `<!-- CUT -->` and `<!-- end -->` of the page. Hits of several
seeds are pooled; intervals are bootstrapped over victims. Needs matplotlib.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from real_study import CUTS, KNOBS, RESULTS

from vflair_core.experiments.grading.statistics import interval, pooled

DOCS = Path(__file__).parents[1] / "docs"
PAGE, FIGURE = DOCS / "choosing-a-defense.md", DOCS / "images" / "privacy-and-utility.png"
# Who knows what, and whose attacks that includes.
PRESETS = {
    "K1": {"K1"},
    "K1 + queries": {"K1", "K1+queries"},
    "K2": {"K1", "K2"},
    "K4": {"K1", "K2", "K4"},
}
TITLES = {
    "real-hbt": "HBT, two blocks at each end",
    "real-deep": "HBT, eight and two blocks",
    "real-ht": "HT, two blocks",
}
Cell = list[dict[str, Any]]  # of one cut, defense and keep: what each seed found


def main() -> None:
    """Write tables and figure."""
    text = PAGE.read_text()
    cells = {cut: found(cut) for cut in CUTS}
    for cut, of in cells.items():
        if not of:
            continue
        before, mark, rest = text.partition(f"<!-- {cut} -->\n")
        _, end, after = rest.partition("<!-- end -->\n")
        if not end:
            raise SystemExit(f"{PAGE} has no lines <!-- {cut} --> and <!-- end --> for the table.")
        text = before + mark + "\n" + table(of) + "\n" + end + after
    PAGE.write_text(text)
    draw(cells)


def found(cut: str) -> dict[tuple[str, float], Cell]:
    """Read what there is of a cut: by defense and keep, in the order of the defenses.

    Rows are compared with each other, so only seeds count that all defenses at 90 % have been run with.
    """
    cells = defaultdict(list)
    for path in sorted((RESULTS / cut).glob("*.json")):
        one = json.loads(path.read_text())
        cells[one["defense"], one["keep"]].append(one)
    each = [{one["seed"] for one in cell} for (_, keep), cell in cells.items() if keep >= 0.9]
    shared = set.intersection(*each) if each else set()
    cells = {key: [one for one in cell if one["seed"] in shared] for key, cell in cells.items()}
    cells = {key: cell for key, cell in cells.items() if cell}
    order = list(KNOBS)
    return dict(sorted(cells.items(), key=lambda cell: (-cell[0][1], order.index(cell[0][0]))))


def strongest(cell: Cell, preset: str) -> tuple[str, float, tuple[float, float]] | None:
    """The attack that development victims choose among those that a preset allows; its AP on the others, and the interval."""
    of: dict[tuple[str, str], Cell] = defaultdict(list)
    for one in cell:
        for grade in one["grades"]:
            if grade["knowledge"] in PRESETS[preset]:
                of[grade["attack"], grade["knowledge"]].append(grade)
    if not of:
        return None
    mean = {
        name: sum(g["development"] for g in grades) / len(grades) for name, grades in of.items()
    }
    best = max(mean, key=lambda name: (mean[name], name[1]))
    hits = [tuple(hit) for grade in of[best] for hit in grade["hits"]]
    return best[0], pooled(hits), interval(hits)


def table(cells: dict[tuple[str, float], Cell]) -> str:
    """A row for each defense and keep."""
    rows = [
        "| defense, tuned | perplexity | accuracy | K1 + queries | K2 = K3 | K4 | one release is |",
        "|---|---|---|---|---|---|---|",
    ]
    for (defense, keep), cell in cells.items():
        name = defense if keep == 1.0 else f"{defense}, {round(100 * keep)} %"
        if any(not one["grades"] for one in cell):
            rows.append(f"| {name}: | not even {_option(cell)} keeps that much | | | | | |")
            continue
        row = [f"{name}: {_option(cell)}" if cell[0]["options"] else name]
        row += [f"{mean(cell, 'perplexity'):.0f}", _share(mean(cell, "token_accuracy"))]
        for preset in ("K1 + queries", "K2", "K4"):
            most = strongest(cell, preset)
            assert most is not None
            low, high = most[2]
            row.append(f"{_share(most[1])} [{_share(low)}, {_share(high)}]{_mark(most[0])}")
        rows.append("| " + " | ".join([*row, _promise(cell)]) + " |")
    return "\n".join(rows) + "\n"


def mean(cell: Cell, metric: str) -> float:
    return sum(one["metrics"][metric] for one in cell) / len(cell)


def _option(cell: Cell) -> str:
    """The tuned option: from the least to the largest that seeds came to."""
    option = KNOBS[cell[0]["defense"]].option
    values = [one["options"][option] for one in cell if option in one["options"]]
    return f"{option} {_span(values)}" if values else option


def _span(values: list[float]) -> str:
    least, most = (_number(value) for value in (min(values), max(values)))
    return least if least == most else f"{least}–{most}"


def _number(value: float) -> str:
    """Two digits: five evaluations do not find more."""
    if isinstance(value, float):
        return f"{value:.2g}" if value < 1 else f"{float(f'{value:.2g}'):,.0f}"
    return str(value)


def _share(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")


def _mark(attack: str) -> str:
    return {"linear-inverter": " l", "vocabulary-search": " s"}.get(attack, "")


def _promise(cell: Cell) -> str:
    proved = [one["promise"]["epsilon"] for one in cell if one["promise"]]
    return f"ε {_span(proved)}" if all(proved) and proved else "–"


def draw(cells: dict[str, dict[tuple[str, float], Cell]]) -> None:
    """Draw AP against utility, one line a defense: a row of axes for each cut, who knows the defense beside who may only ask."""
    cuts = [cut for cut in cells if len(cells[cut]) > 1]
    figure, axes = plt.subplots(
        len(cuts), 2, figsize=(9, 3.8 * len(cuts)), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )  # fmt: skip
    for row, cut in zip(axes, cuts, strict=True):
        for axis, preset in zip(row, ("K4", "K1 + queries"), strict=True):
            for number, defense in enumerate(name for name in KNOBS if name != "none"):
                points = _points(cells[cut], defense, preset)
                if len(points) > 1:
                    marker = "osD^v<>Pph"[number]
                    axis.plot(*zip(*points, strict=True), marker=marker, ms=5, lw=1, label=defense)
            axis.set_title(f"{TITLES[cut]}: {preset}", fontsize=9)
            axis.set_xlim(1.02, 0.45)
            axis.set_ylim(-0.03, 1.03)
            axis.grid(alpha=0.3)
        row[0].set_ylabel("private tokens read (AP)")
    for axis in axes[-1]:
        axis.set_xlabel("utility kept (undefended / defended perplexity)")
    axes[0][0].legend(fontsize=7, loc="lower left")
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=110)


def _points(
    of: dict[tuple[str, float], Cell], defense: str, preset: str
) -> list[tuple[float, float]]:
    """Utility kept and AP, from undefended to strong."""
    plain = of["none", 1.0]
    some = [
        cell for (name, _), cell in of.items() if name == defense and all(c["grades"] for c in cell)
    ]
    points = [(1.0, strongest(plain, preset))]
    points += [
        (mean(plain, "perplexity") / mean(cell, "perplexity"), strongest(cell, preset))
        for cell in some
    ]
    return [(kept, most[1]) for kept, most in points if most is not None]


if __name__ == "__main__":
    main()
