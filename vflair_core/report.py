"""What a run looks like on a terminal: bars while it runs, then the table and the sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vflair_core.result import Result

ARMS = ("undefended", "defended")


@contextmanager
def bars(*, quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a reporter that draws one bar per phase; a phase's number (a loss) may follow a comma."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        tasks: dict[str, Any] = {}

        def report(phase: str, done: int, total: int) -> None:
            key = phase.split(",", 1)[0]
            if key not in tasks:
                tasks[key] = progress.add_task(phase, total=total)
            progress.update(tasks[key], description=phase, completed=done, total=total)

        yield report


def show_result(result: Result, folder: Path) -> None:
    """Print the table of numbers and, side by side, a private sentence and what was recovered."""
    console = Console()
    arms = [arm for arm in ARMS if arm in result.numbers]
    console.print(_numbers(result, arms))
    for arm in arms:
        equal = result.numbers[arm].get("unsplit_losses_equal")
        if equal is not None:
            word = "equal" if equal else "DIFFER FROM"
            console.print(f"{arm}: all training losses {word} the unsplit model's.")
        for grade in result.numbers[arm]["attacks"]:
            if grade["verdict"] != "ok":
                console.print(
                    f"{arm}, {grade['attack']}: {escape(grade['verdict'])}.", style="yellow"
                )
    for sentence in _sentences(result, arms):
        console.print(sentence)
    console.print(f"Written to {folder}: result.json, transcript.safetensors, experiment.toml.")


def _numbers(result: Result, arms: list[str]) -> Table:
    table = Table(
        title=f"{result.task['name']} · numbers {result.numbers_hash}", title_justify="left"
    )
    for column in ("", "MP", "held-out loss", "attack (knowledge)", "AP [95 %]", "floor", "DCS"):
        table.add_column(column)
    for column in ("guarantee", "MB", "s"):
        table.add_column(column)
    scores = {row["attack"]: row for row in result.numbers.get("dcs", {}).get("per_attack", ())}
    for arm in arms:
        numbers, cost = result.numbers[arm], result.cost[arm]
        first, last = (numbers["evaluations"][n]["metrics"]["loss"] for n in (0, -1))
        facts = [
            arm,
            f"{numbers['main_performance']:.3f} {numbers['metric']}",
            f"{first:.3f} → {last:.3f}",
        ]
        promise = "; ".join(g["statement"] for g in numbers["guarantees"]) or "none"
        costs = [
            promise,
            f"{cost['total_bytes'] / 1e6:.1f}",
            f"{sum(cost['seconds'].values()):.0f}",
        ]
        for row, grade in enumerate(numbers["attacks"] or [None]):
            left = facts if row == 0 else [""] * len(facts)
            right = costs if row == 0 else [""] * len(costs)
            table.add_row(*left, *_attack(grade, scores if arm == "defended" else {}), *right)
    return table


def _attack(grade: dict[str, Any] | None, scores: dict[str, Any]) -> list[str]:
    if grade is None:
        return ["none", "", "", ""]
    low, high = grade["interval"]
    score = scores.get(grade["attack"])
    return [
        f"{grade['attack']} ({grade['knowledge']})",
        f"{grade['attack_performance']:.3f} [{low:.3f}, {high:.3f}]",
        f"{grade['floor']:.3f}",
        f"{score['dcs']:.3f}" if score else "",
    ]


def _sentences(result: Result, arms: list[str]) -> Iterator[Panel]:
    """The first planted record, or else the first victim, as the strongest token attack saw it."""
    grades = [g for g in result.numbers[arms[0]]["attacks"] if g["target"] == "tokens"]
    if not grades:
        return
    attack = max(grades, key=lambda grade: grade["attack_performance"])["attack"]
    rows = {
        arm: [s for s in result.samples if s["arm"] == arm and s["attack"] == attack]
        for arm in arms
    }
    texts = [row["private"] for row in rows[arms[0]]]
    chosen = next((n for n, text in enumerate(texts) if "@" in text), 0)
    lines = [f"[bold]private[/]     {escape(texts[chosen])}"]
    lines += [f"[bold]{arm:<11}[/] {escape(rows[arm][chosen]['recovered'])}" for arm in arms]
    yield Panel("\n".join(lines), title=f"what {attack} recovered", title_align="left")
