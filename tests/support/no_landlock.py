"""Stands for `vflair_core.attacks.fence` on a Linux without Landlock."""

from __future__ import annotations

from vflair_core.attacks import fence


def main(module: str, folder: str) -> None:
    fence._version = lambda: 0
    fence.main(module, folder)
