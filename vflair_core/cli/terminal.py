"""What a run found, on a terminal: a summary, and the sentences behind it on request."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from vflair_core.attacks.knowledge import shown
from vflair_core.cli.tables import say, table
from vflair_core.experiments.attack_phase import REFERENCES
from vflair_core.experiments.cut_sweep import Recovery
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.grading.ranking import NOT_EVALUATED
from vflair_core.experiments.result import Result
from vflair_core.experiments.seams import UNREAD, uncovered, unread

WARNING = (
    "failed",
    "NOT EVALUATED",
    "NO GUESS",
    "THE LOSS IS NOT FINITE",
    "MECHANISM DOES NOT MATCH",
    "ACTS OTHERWISE ON A TEXT ALONE",
)  # words of remarks that nobody should miss


def show_result(result: Result, folder: Path, *, verbose: bool = False) -> None:
    """Print the numbers in a few lines; `verbose` adds what is to be said of them, and a private sentence beside what
    was recovered of it.
    """
    present = [arm for arm in REFERENCES if arm in result.numbers]
    arms = [arm for arm in present if not arm.startswith("active")]
    active = [arm for arm in present if arm.startswith("active")]
    scores = result.numbers.get("dcs", {}).get("per_attack", ())
    metric = result.numbers[arms[0]]["metric"]
    say(f"{result.task['name']} · MP is {metric} · numbers {result.numbers_hash}")
    _utility(result, present)
    _privacy(result, arms, scores)
    if active:
        _privacy(result, active)
    remarks, console = list(_remarks(result, present)), Console()
    warnings = [line for line in remarks if any(word in line for word in WARNING)]
    if verbose:
        for line in remarks:
            style = "yellow" if line in warnings else ""
            console.print(line, style=style, highlight=False, markup=False)
    for line in _seeds(result):
        say(line)
    if verbose and (sentence := _sentence(result, arms)) is not None:
        console.print(sentence)
    if not verbose:
        say(_in_short(remarks, warnings))
    say(f"Written to {folder}: result.json, transcript.safetensors, experiment.toml.")


def _in_short(remarks: Sequence[str], warnings: Sequence[str]) -> str:
    """How much there is to say, and what of it is a warning."""
    words = [word for word in WARNING if any(word in line for line in warnings)]
    warned = f"{len(warnings)} of them warnings ({', '.join(words)})" if words else "no warning"
    return f"{len(remarks)} remarks, {warned}: --verbose shows them, with what was recovered of a text."


def show_cuts(rows: Sequence[Recovery], folder: Path, *, as_json: bool) -> None:
    """Print what was recovered at each cut."""
    if as_json:
        Console().print_json(data=[attrs.asdict(row) for row in rows])
        return
    say("recovered by cut (AP with its 95 % interval)")
    lines = []
    for row in rows:
        low, high = row.interval
        reached = f"{row.attack_performance:.3f} [{low:.2f}, {high:.2f}]"
        bypassed = row.positive_control
        control = "" if bypassed is None else f"{bypassed:.3f} of {row.reference:.3f}"
        numbers = (reached, f"{row.floor:.3f}", f"{row.main_performance:.3f}", control)
        lines.append((row.attack, str(row.head), row.arm, row.knowledge, *numbers, row.verdict))
    columns = ("attack", "head", "arm", "knows", "AP", "floor", "MP", "control", "verdict")
    table(columns, lines, whole=("arm", "AP"))
    say(f"Written to {folder}: cuts.json, cuts.svg, and a folder for each cut.")


def show_grades(grades: Mapping[str, Sequence[Grade]]) -> None:
    """Print what attacks of kept evidence reached."""
    say("AP with its 95 % interval")
    lines = [
        (
            *(grade.attack, shown(grade.knowledge), arm, _performance(grade.to_dict())),
            *(f"{grade.floor:.3f}", grade.verdict),
        )
        for arm, each in grades.items()
        for grade in each
    ]
    table(("attack", "knows", "arm", "AP", "floor", "verdict"), lines, whole=("arm", "AP"))


def _utility(result: Result, arms: list[str]) -> None:
    lines = []
    for arm in arms:
        numbers, cost = result.numbers[arm], result.cost[arm]
        first, last = (numbers["evaluations"][n]["metrics"]["loss"] for n in (0, -1))
        promises = [_promise(guarantee) for guarantee in numbers["guarantees"]]
        lines.append(
            (
                arm,
                f"{numbers['main_performance']:.3f}",
                f"{first:.3f} → {last:.3f}",
                "; ".join(promises) or "none",
                f"{cost['total_bytes'] / 1e6:.1f}",
                f"{sum(cost['seconds'].values()):.0f}",
            )
        )
    columns = ("", "MP", "held-out loss", "guarantee", "MB", "seconds")
    table(columns, lines, whole=("held-out loss",))


def _promise(guarantee: dict[str, Any]) -> str:
    if guarantee["mechanism"] is None:
        return "none (empirical)"
    return f"ε {guarantee['epsilon']:.4g}, δ {guarantee['delta']:g}"


def _privacy(result: Result, arms: list[str], scores: Sequence[dict[str, Any]] = ()) -> None:
    """AP of each attack in each arm, with its 95 % interval."""
    lines = []
    for row, last in enumerate(result.numbers[arms[-1]]["attacks"]):
        grades = [result.numbers[arm]["attacks"][row] for arm in arms]
        cells = [_performance(grade) for grade in grades]
        cells.append(f"{last['floor']:.3f}")
        if scores:
            cells.append(f"{scores[row]['dcs']:.3f}")
        lines.append((_named(last), last["knowledge"], *cells))
    if lines:
        say("AP with its 95 % interval")
        reached = tuple(f"AP {arm}" for arm in arms)
        columns = ("attack", "knows", *reached, "floor", *(("DCS",) if scores else ()))
        table(columns, lines, whole=reached)


def _named(row: dict[str, Any]) -> str:
    """An attack, and that it is its grade of the responses if it is."""
    apart = row["target"] == "response"
    return f"{row['attack']}, response" if apart else str(row["attack"])


def _performance(grade: dict[str, Any]) -> str:
    low, high = grade["interval"]
    return f"{grade['attack_performance']:.3f} [{low:.2f}, {high:.2f}]"


def _remarks(result: Result, arms: list[str]) -> Iterator[str]:
    for arm in arms:
        equal = result.numbers[arm].get("unsplit_losses_equal")
        if equal is not None:
            apart = result.numbers[arm]["unsplit_losses_differ_by"]
            word = "equal" if equal else f"failed to equal (by up to {apart:.1g})"
            yield f"{arm}: all training losses {word} the unsplit model's."
        losses = result.numbers[arm].get("losses", ())
        if broken := [step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)]:
            yield (
                f"{arm}: THE LOSS IS NOT FINITE since step {broken[0]}, and nothing that comes after says anything: lower "
                "train.learning_rate, or train in another dtype."
            )
        told = result.numbers[arm].get("mechanism")
        if told is not None and not told["matches"]:
            yield (
                f"{arm}: MECHANISM DOES NOT MATCH: what crossed of public text is not what the defenses say would cross "
                f"(p = {told['p']:.3f}), so K4 was told something else."
            )
        company = result.numbers[arm].get("company")
        alone = not result.numbers[arm].get("companions")
        if alone and company is not None and not company["agrees"]:
            yield (
                f"{arm}: ACTS OTHERWISE ON A TEXT ALONE than in a batch (p = {company['p']:.3f}), so victims that cross alone "
                "are no measure of it: give no victims.companions, or train.batch_size - 1."
            )
        for target, there in result.numbers[arm].get("evaluated", {}).items():
            if not there:
                yield f"{arm}, {target}: {NOT_EVALUATED}."
        yield from _strongest(arm, result.numbers[arm].get("strongest", ()))
        yield from _seams(arm, result.numbers[arm].get("seams", ()))
        for guarantee in result.numbers[arm]["guarantees"]:
            outside = (
                f" Outside the claim: {guarantee['excluded']}." if guarantee["mechanism"] else ""
            )
            yield f"{guarantee['defense']}: {guarantee['statement']}.{outside}"
        for found in result.numbers[arm]["findings"]:
            figures = [f"{name} {value:.3f}" for name, value in found.items() if name != "defense"]
            yield f"{found['defense']} measured of itself: {', '.join(figures)}."
        for grade in result.numbers[arm]["attacks"]:
            if grade["verdict"] != "ok":
                yield f"{arm}, {_named(grade)}: {grade['verdict']}."
            if unanswered := grade["details"].get("unanswered"):
                yield (
                    f"{arm}, {_named(grade)}: NO GUESS at {unanswered:.1%} of the private positions, which count as wrong: "
                    "what it read is the least that it could."
                )
            if grade["course"]:
                yield f"{arm}, {_named(grade)}: AP {_course(grade['course'])}."


def _course(points: Sequence[dict[str, float]]) -> str:
    """AP at about each quarter of what was spent."""
    whole = points[-1]["forwards"]
    quarters = [
        min(points, key=lambda point: abs(point["forwards"] - whole * n / 4)) for n in (1, 2, 3, 4)
    ]
    told = dict.fromkeys((p["forwards"], p["attack_performance"]) for p in quarters)
    return ", ".join(f"{reached:.3f} after {spent:,.0f} forwards" for spent, reached in told)


def _strongest(arm: str, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The strongest attack on each target, from the first preset at which it is that."""
    said: dict[tuple[str, str], str] = {}
    for row in rows:
        place = (
            row["target"],
            row["knowledge"].partition(" + ")[2],
        )  # what is beyond presets stands apart
        if said.get(place) == row["attack"]:
            continue
        said[place] = row["attack"]
        low, high = row["interval"]
        yield (
            f"{arm}, {row['target']} from {row['knowledge']}: strongest is {row['attack']} with AP "
            f"{row['attack_performance']:.3f} [{low:.2f}, {high:.2f}], floor {row['floor']:.3f}."
        )


def _seams(arm: str, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What crossed and nobody looked at, and what no defense stands before."""
    if unseen := unread(rows):
        yield f"{arm}: crossed, and {UNREAD}: {', '.join(unseen)}."
    if arm.endswith("defended") and not arm.endswith("undefended") and (bare := uncovered(rows)):
        yield f"{arm}: crossed, and covered by no defense: {', '.join(bare)}."


def _seeds(result: Result) -> Iterator[str]:
    """What all seeds say together, where there are several."""
    for key, where in (("over_seeds", "seeds"), ("over_seeds_active", "seeds, active adversary")):
        if key in result.numbers:
            yield from _over(result.numbers[key], where)


def _over(found: dict[str, Any], where: str) -> Iterator[str]:
    for row in found["attacks"]:
        if "change" not in row:
            yield f"{len(found['seeds'])} {where}, {_named(row)}: AP {row['undefended']:.3f} undefended."
            continue
        low, high = row["change_interval"]
        yield (
            f"{len(found['seeds'])} {where}, {_named(row)}: AP {row['undefended']:.3f} → {row['defended']:.3f}, "
            f"change {row['change']:+.3f} [{low:+.3f}, {high:+.3f}] (paired, 95 %)."
        )
    for row in found["adaptive"]:
        (blind, knowing), (low, high) = row["attack_performance"], row["gain_interval"]
        yield (
            f"{len(found['seeds'])} {where}, {row['attack']} through the defense: AP {blind:.3f} ({row['blind']}, blind) → "
            f"{knowing:.3f} ({row['adaptive']}), gain {row['gain']:+.3f} [{low:+.3f}, {high:+.3f}] (paired, 95 %)."
        )


def _sentence(result: Result, arms: list[str]) -> Panel | None:
    """The first planted record, or else the first victim, as the strongest token attack saw it."""
    grades = [g for g in result.numbers[arms[-1]]["attacks"] if g["target"] == "tokens"]
    if not grades:
        return None
    attack = max(grades, key=lambda grade: grade["attack_performance"])["attack"]
    rows = {
        arm: [s for s in result.samples if s["arm"] == arm and s["attack"] == attack]
        for arm in arms
    }
    texts = [row["private"] for row in rows[arms[0]]]
    chosen = next((n for n, text in enumerate(texts) if "@" in text), 0)
    grid = Table.grid(padding=(0, 2))
    grid.add_row("[bold]private[/]", escape(texts[chosen]))
    for arm in arms:
        grid.add_row(f"[bold]{arm}[/]", escape(rows[arm][chosen]["recovered"]))
    return Panel(grid, title=f"what {attack} recovered", title_align="left")
