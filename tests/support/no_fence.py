"""Stands for `vflair_core.attacks.fence` on a system that has none: runs the module as it is."""

from __future__ import annotations

import runpy
import sys

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
