"""By what something could leak in one arm, what of it crossed, which defense covers it, and which attack read it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vflair_core.attacks.knowledge import shown
from vflair_core.attacks.reading import LENGTHS, SAVED, of_stack

if TYPE_CHECKING:
    from vflair_core.experiments.grading.grades import Grade

READ = "read"
UNREAD = "not read by any attack of this run"
ASSUMED = "did not cross, and was granted"
ABSENT = "did not cross"
TEXT, ANSWER = ("prompt", "response"), ("labels", "gradients")
BY_STACK = {  # each stack has one of each; with what a defense must cover to stand there
    "smashed": TEXT,
    "returned": TEXT,  # made of what was sent, by who knows all else
    "hidden_grad": ANSWER,
    "smashed_grad": ANSWER,  # made of the hidden gradient in the same way
    "caches": TEXT,  # of what was sent, kept over a generation
}


def seams(
    crossed: Mapping[tuple[str, int], int],
    stacks: int,
    covers: Sequence[tuple[str, Collection[str]]],
    grades: Sequence[Grade],
    *,
    updates: int,
    saved: int,
) -> list[dict[str, Any]]:
    """Return a row for each seam: what crossed, what covers it, who read it, and what that comes to.

    Args:
        crossed: What crossed of private text, by role and stack (`DataParty.crossed_by_stack`).
        stacks: Of the model; each has seams of its own.
        covers: Of each defense its name and what it covers.
        grades: Of the attacks, with what each read.
        updates: How many raw gradients of the data party's weights were shared.
        saved: How many checkpoints of the data party were written.
    """

    def of_role(role: str) -> int:
        return sum(count for (name, _), count in crossed.items() if name == role)

    counts: dict[str, int] = {}
    for stack in range(stacks):
        for seam in BY_STACK:
            role = "cache" if seam == "caches" else seam
            counts[of_stack(seam, stack)] = crossed.get((role, stack), 0)
    counts |= {
        "disclosed": of_role("disclosed"),
        "updates": of_role("weight") + of_role("counterpart") + updates,
        SAVED: saved,
        LENGTHS: of_role("exchange"),
        "timing": of_role("exchange"),
    }
    rows = []
    for seam, count in counts.items():
        places = BY_STACK.get(seam.split(" ")[0], ())
        standing = [(name, sorted(set(places) & set(each))) for name, each in covers]
        row: dict[str, Any] = {"seam": seam, "crossed": count}
        row["covered_by"] = [{"defense": name, "covers": each} for name, each in standing if each]
        rows.append(row)
    return with_readers(rows, grades)


def with_readers(
    rows: Sequence[Mapping[str, Any]], grades: Sequence[Grade]
) -> list[dict[str, Any]]:
    """The rows of an arm with who read each seam, and what that comes to, by these grades."""
    each = [(row, _readers(row["seam"], grades)) for row in rows]
    return [
        {**row, "read_by": read, "verdict": _verdict(row["crossed"], read=bool(read))}
        for row, read in each
    ]


def _verdict(crossed: int, *, read: bool) -> str:
    if crossed:
        return READ if read else UNREAD
    return ASSUMED if read else ABSENT


def _readers(seam: str, grades: Sequence[Grade]) -> list[dict[str, str]]:
    """The attacks that read a seam, each once, though its prompts and responses are graded apart."""
    found: dict[tuple[str, str], str] = {}
    for grade in grades:
        if seam in grade.read:
            key = grade.attack, shown(grade.knowledge)
            found[key] = "ok" if found.get(key) == "ok" else grade.verdict
    return [
        {"attack": attack, "knowledge": knowledge, "verdict": verdict}
        for (attack, knowledge), verdict in found.items()
    ]


def unread(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the seams by which something crossed that no attack of the run read."""
    return [row["seam"] for row in rows if row["verdict"] == UNREAD]


def uncovered(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the seams by which something crossed that no defense of the run covers."""
    return [row["seam"] for row in rows if row["crossed"] and not row["covered_by"]]
