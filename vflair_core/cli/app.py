"""The program `vflair` and the options that its commands share."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from vflair_core import __version__

app = App(
    name="vflair",
    version=__version__,
    help="Split learning of large language models.",
    suppress_keyboard_interrupt=False,  # `main` says what is left of a run
)


Plugin = Annotated[
    list[Path] | None, Parameter(name="--plugin", help="A one-file plugin; repeatable.")
]


Json = Annotated[bool, Parameter(name="--json", help="Print JSON.")]


Overrides = Annotated[
    list[str] | None, Parameter(name=["--override", "-o"], help="key=value in TOML; repeatable.")
]


def configure_logging(*, verbose: bool, level: int = logging.WARNING) -> None:
    """Show events of this level, with colours on a terminal; `verbose` shows all."""
    import structlog

    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if verbose else level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
