"""Watch runs in TensorBoard.

    pip install 'vflair-core[tensorboard]'
    vflair run experiment.toml --plugin examples/trackers/to_tensorboard.py
    tensorboard --logdir runs

A run gets a folder of its own in `runs`, or in the folder that VFLAIR_TENSORBOARD names. In it each arm has one, so
that their curves lie over each other.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import define, field

from vflair_core import Tracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

if importlib.util.find_spec("tensorboard") is None:
    raise ImportError("TensorBoard is not installed: pip install 'vflair-core[tensorboard]'.")


@define
class Folder:
    """The folder of one run."""

    path: Path
    settings: Mapping[str, str | float]
    writers: dict[str, SummaryWriter] = field(factory=dict)

    def write(self, series: str, figures: Mapping[str, float], step: int) -> None:
        """Write an arm's figures into its folder; those of the whole run beside its settings, for the tab HPARAMS."""
        if series == "result":
            self.writer("").add_hparams(dict(self.settings), dict(figures), run_name=".")
            return
        for name, value in figures.items():
            self.writer(series).add_scalar(name, value, step)

    def close(self, status: str, error: str) -> None:
        """Write how the run ended."""
        self.writer("").add_text("status", f"{status} {error}".strip())
        for writer in self.writers.values():
            writer.close()

    def writer(self, series: str) -> SummaryWriter:
        """Return what writes into the folder of an arm, or of the run."""
        if series not in self.writers:
            from torch.utils.tensorboard import SummaryWriter

            self.writers[series] = SummaryWriter(str(self.path / series))
        return self.writers[series]


def open_folder(name: str, settings: Mapping[str, str | float]) -> Folder:
    """Begin a folder that no other run writes into."""
    runs = Path(os.environ.get("VFLAIR_TENSORBOARD", "runs"))
    runs.mkdir(parents=True, exist_ok=True)
    begun = time.strftime("%Y%m%d-%H%M%S")
    folder = Folder(_made(runs, f"{name}-{begun}"), settings)
    rows = [f"| {path} | {value} |" for path, value in settings.items()]
    folder.writer("").add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]))
    return folder


def _made(runs: Path, name: str) -> Path:
    number = 1
    while True:
        path = runs / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


plugin = Tracker(open_folder)
