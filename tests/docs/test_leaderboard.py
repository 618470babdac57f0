"""The leaderboard is what its files say."""

from __future__ import annotations

from support.paths import DOCS
from vflair_core.experiments.studies.leaderboard import leaderboard


def test_the_page_is_made_of_the_files():
    assert (DOCS / "leaderboard.md").read_text() == leaderboard(DOCS / "leaderboard")
