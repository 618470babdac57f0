"""Tasks for split learning of language models: the table of contents, cheap to import."""

from __future__ import annotations

from collections.abc import Mapping

from vflair_core import hookimpl


@hookimpl
def vflair_tasks() -> Mapping[str, str]:
    """Offer the tasks by name; each is imported on first use."""
    return {
        "python-manual": "vflair_tasks.offline:python_manual",
        "manual-chapters": "vflair_tasks.offline:manual_chapters",
        "planted-records": "vflair_tasks.offline:planted_records",
    }
