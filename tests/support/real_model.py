"""What tests of the real language model are marked with."""

from __future__ import annotations

import pytest

from vflair_core.testing.real_model import REAL_MODEL as PACKAGE
from vflair_core.testing.real_model import missing

MISSING = missing()

REAL = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
__all__ = ["MISSING", "PACKAGE", "REAL"]
