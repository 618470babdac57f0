"""The tables of the study say what its results say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "choosing-a-defense.md").read_text()
RESULTS = ROOT / "benchmarks" / "results" / "real"
CUTS = [folder.name for folder in sorted(RESULTS.iterdir())]


def rows_of(cut):
    """Each defense and keep of a cut as the page shows it: what is before the colon, and the cells."""
    table = PAGE.partition(f"<!-- {cut} -->")[2].partition("<!-- end -->")[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {first.partition(":")[0]: cells for first, *cells in lines[1:]}


def results_of(cut):
    """What each defense and keep found, by the seeds that all defenses at 90 % were run with."""
    found = {}
    for path in sorted((RESULTS / cut).glob("*.json")):
        one = json.loads(path.read_text())
        percent = "" if one["keep"] == 1 else f", {one['keep']:.0%}".replace("%", " %")
        found.setdefault(one["defense"] + percent, []).append(one)
    seeds = [{one["seed"] for one in of} for of in found.values() if of[0]["keep"] >= 0.9]
    shared = set.intersection(*seeds)
    found = {name: [one for one in of if one["seed"] in shared] for name, of in found.items()}
    return {name: of for name, of in found.items() if of}


@pytest.mark.parametrize("cut", CUTS)
def test_every_result_has_its_row_with_its_share_of_tokens(cut):
    rows, results = rows_of(cut), results_of(cut)
    assert set(rows) == set(results)
    for name, cells in rows.items():
        grades = [grade for one in results[name] for grade in one["grades"]]
        asked = [
            hit for grade in grades if grade["knowledge"] == "K1+queries" for hit in grade["hits"]
        ]
        if not asked:  # not even the weakest keeps that much
            assert cells[0].startswith("not even")
            continue
        rate = sum(right for right, _ in asked) / sum(of for _, of in asked)
        assert cells[2].split()[0] == f"{rate:.2f}".removeprefix("0")
        best = max(grade["attack_performance"] for grade in grades)
        assert float(cells[4].split()[0]) <= round(best, 2)


def test_every_prompt_that_is_graded_is_one_cluster():
    for cut in CUTS:
        for cells in results_of(cut).values():
            for grade in (grade for one in cells for grade in one["grades"]):
                assert len(grade["hits"]) == 32
                right, of = (sum(column) for column in zip(*grade["hits"], strict=True))
                assert grade["attack_performance"] == pytest.approx(right / of)
