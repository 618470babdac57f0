"""What happens, as events for Python's own logging: nobody hears of them who does not ask.

They go to loggers below ``vflair_core``, with the levels of `logging`. A handler finds the line in the message, and in
`record.fields` what was told.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any


def events(name: str) -> Any:
    """Return the logger of a module: ``events(__name__).info("step_finished", step=3)``."""
    import structlog  # only now: it brings rich along, where that is installed

    return structlog.wrap_logger(
        logging.getLogger(name),
        processors=[structlog.stdlib.filter_by_level, _as_line],
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def _as_line(
    _logger: Any, _level: str, told: MutableMapping[str, Any]
) -> tuple[tuple[str], dict[str, Any]]:
    """What `logging` is called with: the event and what it tells in one line, and apart."""
    event, trace = told.pop("event"), told.pop("exc_info", None)
    line = " ".join([event, *(f"{key}={value}" for key, value in told.items())])
    return (line,), {"extra": {"event": event, "fields": dict(told)}, "exc_info": trace}
