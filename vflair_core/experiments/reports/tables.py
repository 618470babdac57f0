"""The ranking, what leaks and what it costs as tables, in Markdown and in LaTeX."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from attrs import frozen

from vflair_core.experiments.output import aside
from vflair_core.experiments.reports.charts import Leaks, cost_of_setting, drawn_settings, leaks_of
from vflair_core.experiments.reports.grouping import groups_of
from vflair_core.experiments.reports.leakage import BASELINE
from vflair_core.experiments.reports.settings import Group, Setting
from vflair_core.experiments.reports.standings import Standing, Unranked, standings_of
from vflair_core.experiments.studies.cell import Cell

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "·": r"\textperiodcentered{}", "−": "$-$", "×": r"$\times$", "±": r"$\pm$", "ε": r"$\varepsilon$", "–": "--",
    "→": r"$\to$", "≤": r"$\le$", "≥": r"$\ge$",
}  # fmt: skip


@frozen
class Table:
    """Rows of words under their columns, each row with the key of its setting."""

    name: str
    caption: str
    columns: tuple[str, ...]
    keyed: tuple[tuple[str, tuple[str, ...]], ...]
    numbers: frozenset[str] = frozenset()  # columns set to the right
    linked: int = 0  # the column that names the setting

    @property
    def rows(self) -> tuple[tuple[str, ...], ...]:
        return tuple(row for _, row in self.keyed)


def write_tables(cells: Iterable[Cell], folder: str | Path) -> list[Path]:
    """Write the tables of a study to `folder`, each as Markdown and as LaTeX (booktabs), and return their paths.

    Args:
        cells: Of one study or several.
        folder: It is made; tables of the same name that are there are replaced.

    Raises:
        ExperimentError: The folder cannot be written.
    """
    groups = groups_of(cells)
    ranked, unranked = standings_of(groups)
    tables = [
        _ranking(ranked),
        _unranked(unranked),
        *(leakage_table(group, leaks_of(group)) for group in groups),
    ]
    tables += [_costs(groups)]
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    written = []
    for table in tables:
        if not table.rows:
            continue
        for ending, text in (("md", to_markdown(table)), ("tex", to_latex(table))):
            path = place / f"{table.name}.{ending}"
            with aside(path) as part:
                part.write_text(text, encoding="utf-8")
            written.append(path)
    return written


def leakage_table(group: Group, leaks: Leaks) -> Table:
    """What the strongest attacks recover in a group, undefended and defended."""
    rows = []
    for (target, knowledge), shown in leaks.items():
        for each in shown:
            setting, leak = each.setting, each.leak
            kept = sum(trial.utility for trial in setting.trials) / len(setting.trials)
            low, high = leak.interval
            row = (
                each.letter, setting.name, target, knowledge, f"{kept:.1%}", f"{leak.attack_performance:.3f}",
                f"{low:.3f} – {high:.3f}", f"{leak.floor:.3f}",
                "–" if leak.baseline is None else f"{leak.baseline:.3f}", " or ".join(leak.attacks), leak.mark,
            )  # fmt: skip
            rows.append((setting.key, row))
    columns = ("in figures", "setting", "target", "attacker knows", "utility kept", "AP", "95 %", "floor",
               "linear map", "strongest attack", "remark")  # fmt: skip
    return Table(
        f"leakage-{group.key}",
        f"What the strongest attack recovers: {group.name}. AP is the mean over seeds, its interval over seeds and victims; "
        f"the linear map is {BASELINE}, the baseline, with whatever it was granted.",
        columns,
        tuple(rows),
        frozenset({"utility kept", "AP", "95 %", "floor", "linear map"}),
        linked=1,
    )


def _ranking(standings: Sequence[Standing]) -> Table:
    rows = []
    for r in standings:
        low, high = r.interval
        row = (
            str(r.rank), r.setting.name, r.group.name, r.knowledge, f"{r.score:.3f}", f"{r.utility:.1%}",
            f"{r.undefended:.3f}", f"{r.defended:.3f}", f"{low:.3f} – {high:.3f}", f"{r.floor:.3f}",
            f"{r.positive_control:.3f}", f"{r.negative_control:.3f}", r.attack, "; ".join(r.marks),
        )  # fmt: skip
        rows.append((r.setting.key, row))
    columns = ("rank", "defense", "where", "attacker knows", "score", "utility kept", "AP undefended", "AP defended",
               "95 %", "floor", "positive control", "negative control", "worst case", "remarks")  # fmt: skip
    return Table(
        "ranking",
        "Defenses by their worst case: the chance-normalised score against the attack that leaves least of it.",
        columns,
        tuple(rows),
        frozenset({"rank", *columns[4:12]}),
        linked=1,
    )


def _unranked(rows: Sequence[Unranked]) -> Table:
    return Table(
        "not-ranked",
        "Defenses that have no place in the ranking.",
        ("defense", "where", "attacker knows", "why not"),
        tuple(
            (r.setting.key, (r.setting.name, r.group.name, r.knowledge or "anything", r.reason))
            for r in rows
        ),
    )


def _costs(groups: Sequence[Group]) -> Table:
    def row(group: Group, setting: Setting) -> tuple[str, tuple[str, ...]]:
        size, seconds = cost_of_setting(setting)
        return setting.key, (setting.name, group.name, f"{size:.3f}", f"{seconds:.2f}")

    return Table(
        "costs",
        "What a setting costs: megabytes that crossed both ways, and seconds without attacks, as means over seeds.",
        ("setting", "where", "MB", "seconds"),
        tuple(row(group, setting) for group in groups for _, _, setting in drawn_settings(group)),
        frozenset({"MB", "seconds"}),
    )


def to_markdown(table: Table) -> str:
    """The table in Markdown, its caption first."""

    def line(words: Iterable[str]) -> str:
        return f"| {' | '.join(_in_markdown(word) for word in words)} |"

    rules = ("---:" if column in table.numbers else "---" for column in table.columns)
    ruled = f"| {' | '.join(rules)} |"
    lines = [line(table.columns), ruled, *(line(row) for row in table.rows)]
    return f"{_in_markdown(table.caption)}\n\n" + "\n".join(lines) + "\n"


def to_latex(table: Table) -> str:
    """The table in LaTeX, for the package booktabs."""

    def line(words: Iterable[str]) -> str:
        return f"    {' & '.join(map(_in_latex, words))} \\\\"

    places = "".join("r" if column in table.numbers else "l" for column in table.columns)
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            f"  \\caption{{{_in_latex(table.caption)}}}",
            f"  \\label{{tab:{table.name}}}",
            f"  \\begin{{tabular}}{{{places}}}",
            r"    \toprule",
            line(table.columns),
            r"    \midrule",
            *(line(row) for row in table.rows),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _in_markdown(word: str) -> str:
    """A word that stays in its column and is no markup."""
    for sign in ("\\", "|", "<", ">", "*", "_", "`", "[", "]"):
        word = word.replace(
            sign, f"\\{sign}" if sign not in "<>" else {"<": "&lt;", ">": "&gt;"}[sign]
        )
    return " ".join(word.split())


def _in_latex(word: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(word.split()))
