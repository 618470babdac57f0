"""Every type of `vflair list models` against the unsplit model: both cuts, padded or not, training and generation."""

from __future__ import annotations

import sys

import pytest

from support.paths import SWEEP
from vflair_core.parties.verified_models import VERIFIED


@pytest.fixture(scope="module")
def examine():
    """The sweep's comparison of one type."""
    sys.path.insert(0, str(SWEEP))
    try:
        import cells
    finally:
        sys.path.remove(str(SWEEP))
    return cells.examine


@pytest.mark.filterwarnings("default")  # transformers' own, of odd small models
@pytest.mark.parametrize("line", VERIFIED)
def test_a_listed_type_is_exact(line, examine):
    kind, task = line.split(" · ")
    result = examine(kind, task, quick=True)
    assert result["runnable"], result
    for cell in result["cells"]:
        assert cell["train"] == "exact", cell
        assert cell.get("generate", "exact") == "exact", cell
    cuts = {"HBT" if cell["tail"] else "HT" for cell in result["cells"]}
    assert cuts == set(VERIFIED[line])
    pictures = [cell for cell in result["cells"] if cell["inputs"] == "image"]
    assert bool(pictures) == (task == "image-text")
