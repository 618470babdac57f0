"""Where the files are that tests hand to plugin managers, programs and other processes."""

from __future__ import annotations

from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
EXAMPLES, DOCS = ROOT / "examples", ROOT / "docs"
SWEEP = ROOT / "tests" / "sweep"

SAMPLE_PLUGIN = SUPPORT / "sample_plugin.py"
TASK_KINDS = SUPPORT / "task_kinds.py"
WORD_SWAPS = SUPPORT / "word_swaps.py"
SECRET_WORDS = SUPPORT / "secret_words.py"
TRACKED_RUNS = SUPPORT / "tracked_runs.py"
TRACKERS = EXAMPLES / "trackers"
CHEATING_ATTACKS = SUPPORT / "cheating_attacks.py"
ACTIVE_ADVERSARIES = SUPPORT / "active_adversaries.py"
KILLED_RUN = SUPPORT / "killed_run.py"
KILLED_TRAINER = SUPPORT / "killed_trainer.py"
