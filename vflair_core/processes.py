"""What processes of attackers are given of this one."""

from __future__ import annotations

import os
import sys

KEPT = (
    "PATH",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "HOME",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "HF_HUB_OFFLINE",
    "CUDA_VISIBLE_DEVICES",  # a device has the same number here and there
    "CUDA_DEVICE_ORDER",
)


def environment() -> dict[str, str]:
    """What such a process needs of this one's environment, and nothing else of it."""
    here = os.pathsep.join(path for path in sys.path if path)
    return {name: os.environ[name] for name in KEPT if name in os.environ} | {"PYTHONPATH": here}
