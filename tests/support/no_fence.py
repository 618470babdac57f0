"""Stands for `vflair_core.attacks.fence` on a system that has none: runs the module as it is."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main(module: str, folder: str) -> None:
    sys.exit(importlib.import_module(module).main(Path(folder)))
