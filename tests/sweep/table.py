"""What a sweep found, as counts, as a page of the documentation, and against what is committed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cases import GENERATES, TASKS

HERE = Path(__file__).parent
COUNTS = HERE / "counts.json"
PAGE = HERE.parent.parent / "docs" / "models.md"
COLUMNS = (
    "types",
    "runnable",
    "exact HBT",
    "exact HT",
    "disclosing HBT",
    "disclosing HT",
    "generate exact",
    "refused",
    "error",
    "wrong",
)
TokenRow = dict[str, Any]


def verdict(row: TokenRow, tail: int, what: str = "train") -> str:
    """Sum up the cells of one kind of cut: exact if one with head 1 is and none of the pair is wrong."""
    cells = [cell for cell in row["cells"] if (cell["tail"] > 0) == (tail > 0)]
    outcomes = [cell[what] for cell in cells if cell["head"] == 1 and what in cell]
    if any(cell.get(what) == "wrong" for cell in row["cells"]):
        return "wrong"
    for outcome in ("exact", "disclosed", "error", "unsplit", "idle", "refused"):
        if outcome in outcomes:
            return outcome
    return "refused"


def counts(rows: list[TokenRow]) -> dict[str, dict[str, int]]:
    """Count pairs per task; ``error`` and ``wrong`` count those with any such cell."""
    found = {}
    for task in TASKS:
        ours = [row for row in rows if row["task"] == task]
        ran = [row for row in ours if row["runnable"]]
        makes = task in GENERATES
        numbers = (
            len(ours),
            len(ran),
            sum(verdict(row, 1) == "exact" for row in ran),
            sum(verdict(row, 0) == "exact" for row in ran),
            sum(verdict(row, 1) == "disclosed" for row in ran),
            sum(verdict(row, 0) == "disclosed" for row in ran),
            sum(_generates(row) for row in ran) if makes else 0,
            sum({verdict(row, 0), verdict(row, 1)} == {"refused"} for row in ran),
            sum("error" in _outcomes(row) for row in ran),
            sum("wrong" in _outcomes(row) for row in ran),
        )
        found[task] = dict(zip(COLUMNS, numbers, strict=True))
    found["all"] = {name: sum(found[task][name] for task in TASKS) for name in COLUMNS}
    return found


def _generates(row: TokenRow) -> bool:
    return "exact" in (verdict(row, 1, "generate"), verdict(row, 0, "generate"))


def _outcomes(row: TokenRow) -> set[str]:
    return {cell[what] for cell in row["cells"] for what in ("train", "generate") if what in cell}


def summary(rows: list[TokenRow]) -> str:
    """Return the counts as a table."""
    lines = ["| task | " + " | ".join(COLUMNS) + " |", "|---|" + "--:|" * len(COLUMNS)]
    for task, numbers in counts(rows).items():
        lines.append(f"| {task} | " + " | ".join(str(numbers[name]) for name in COLUMNS) + " |")
    return "\n".join(lines)


def said(row: TokenRow) -> str:
    """Return one line on a pair."""
    if not row["runnable"]:
        return f"not runnable: {row['reason'][:120]}"
    text = f"HBT {verdict(row, 1)}, HT {verdict(row, 0)}"
    if row["task"] in GENERATES:
        text += f", generate {verdict(row, 1, 'generate')} {verdict(row, 0, 'generate')}"
    return f"{text}  {row['seconds']:.1f} s"


def write(rows: list[TokenRow], mode: str) -> None:
    """Renew the page of the documentation and the committed counts."""
    PAGE.write_text(page(rows, mode))
    known = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
    COUNTS.write_text(json.dumps(known | {mode: counts(rows)}, indent=2) + "\n")


def fallen(rows: list[TokenRow], mode: str) -> list[str]:
    """Say which counts are worse than the committed ones."""
    if not COUNTS.exists():
        return [f"There is no {COUNTS}: run with --write first."]
    known = json.loads(COUNTS.read_text()).get(mode)
    if known is None:
        return [f"{COUNTS} has no counts of a {mode} sweep: run with --write first."]
    now = counts(rows)
    better = {"runnable", "exact HBT", "exact HT", "generate exact"}
    worse = {"error", "wrong"}
    return [
        f"{task}: {name} was {before}, is {now[task][name]}."
        for task in known
        for name, before in known[task].items()
        if (name in better and now[task][name] < before)
        or (name in worse and now[task][name] > before)
    ]


def page(rows: list[TokenRow], mode: str) -> str:
    """Return docs/models.md."""
    import torch
    import transformers

    parts = [
        "# Models\n",
        "<!-- Written by tests/sweep/sweep.py --write; do not edit. -->\n",
        (
            f"Every model type that transformers {transformers.__version__} maps to one of the tasks below, as a "
            "small random model (5 blocks, every kind of block it has), is split and compared with the same model "
            f"unsplit (torch {torch.__version__}, CPU, float32). *Exact* means: loss and logits of a training "
            "step equal bit for bit, every gradient within 1e-5 of its largest entry or 1e-6 of the model's, and for "
            "*generate* the tokens and logits of six greedily generated tokens, with a cache, equal bit for bit. "
            "*Disclosing* means exact if a tensor that tells something of the text may cross, which "
            "`Partition(disclose=...)` must name: without that it is refused; the text itself is never named here. "
            "*Refused* means that vflair says it cannot cut this type. *Not runnable* types do not run unsplit in "
            "this test.\n"
        ),
        {
            "quick": "These are the figures of the quick sweep: one block at the head, padded and unpadded.\n",
            "full": (
                "These are the figures of the full sweep: 0, 1 and 2 blocks at the head, padded and unpadded, "
                "eager and sdpa attention.\n"
            ),
        }[mode],
        summary(rows) + "\n",
    ]
    for task in TASKS:
        parts.append(f"## {task}\n")
        parts += _lists([row for row in rows if row["task"] == task])
    return "\n".join(parts).rstrip() + "\n"


def _lists(rows: Iterable[TokenRow]) -> list[str]:
    groups: dict[str, list[str]] = defaultdict(list)
    reasons: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if not row["runnable"]:
            reasons["Not runnable"][_short(row["reason"])].append(row["type"])
            continue
        both = verdict(row, 1), verdict(row, 0)
        if "wrong" in both:
            reasons["Wrong"][_detail(row, "wrong")].append(row["type"])
        elif both == ("exact", "exact"):
            partly = row["task"] in GENERATES and not _generates(row)
            groups["Exact, but not when generating" if partly else "Exact"].append(row["type"])
        elif "disclosed" in both:
            kinds = {"exact": "exact", "disclosed": "disclosing"}
            how = ", ".join(
                f"{kind} {kinds.get(outcome, 'refused')}"
                for kind, outcome in zip(("HBT", "HT"), both, strict=True)
            )
            reasons["Exact, disclosing a tensor"][f"{_detail(row, 'disclosed')} ({how})"].append(
                row["type"]
            )
        elif "exact" in both:
            kind = "HBT" if both[0] == "exact" else "HT"
            other = both[1] if kind == "HBT" else both[0]
            reasons[f"Exact as {kind} only"][_detail(row, other)].append(row["type"])
        else:
            worst = "error" if "error" in both else both[0]
            reasons[worst.capitalize()][_detail(row, worst)].append(row["type"])
    parts = [f"**{name}** ({len(types)}): {', '.join(types)}\n" for name, types in groups.items()]
    for name, by_reason in reasons.items():
        parts.append(f"**{name}** ({sum(map(len, by_reason.values()))}):\n")
        parts += [f"- {', '.join(types)}: {reason}" for reason, types in by_reason.items()]
        parts[-1] += "\n"
    return parts


def _detail(row: TokenRow, outcome: str) -> str:
    for cell in row["cells"]:
        for what in ("train", "generate"):
            if cell.get(what) == outcome:
                return _short(cell.get(f"{what}_detail", ""))
    return outcome


def _short(reason: str) -> str:
    """Return the first sentence of a reason, safe in markdown."""
    first = reason.split(". ", maxsplit=1)[0][:160].rstrip(".")
    return "`" + first.replace("`", "'") + "`"
