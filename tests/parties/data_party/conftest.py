"""What tests of the data party share: models of any type."""

from __future__ import annotations

import sys

import pytest

from support.paths import SWEEP


@pytest.fixture(scope="module")
def build():
    """Make a small model of any type, as the sweep does."""
    folder = str(SWEEP)
    sys.path.insert(0, folder)
    try:
        import cases
    finally:
        sys.path.remove(folder)
    return cases.build
