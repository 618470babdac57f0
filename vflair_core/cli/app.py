"""The program `vflair` and the options that its commands share."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, TextIO

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


class Words(logging.Formatter):
    """An event of ours in words: ``parameters: data party 21,504, model party 9,216``."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", None)
        if fields is None:
            return super().format(record)
        told = ", ".join(
            f"{key.replace('_', ' ')} {_plain(value)}" for key, value in fields.items()
        )
        return f"{str(getattr(record, 'event', '')).replace('_', ' ')}: {told}"


def _plain(value: object) -> str:
    return f"{value:,}" if type(value) is int else str(value)


class StandardError(logging.StreamHandler[TextIO]):
    """Writes to what standard error is at the time: bars are drawn there, and lines go above them."""

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """Where the next line goes."""
        return sys.stderr

    @stream.setter
    def stream(self, _stream: TextIO) -> None:
        pass


def configure_logging(*, verbose: bool, level: int = logging.WARNING) -> None:
    """Show events of this level on standard error; `verbose` shows all."""
    log = logging.getLogger("vflair_core")
    if not any(isinstance(handler, StandardError) for handler in log.handlers):
        handler = StandardError()
        handler.setFormatter(Words())
        log.addHandler(handler)
    log.setLevel(logging.DEBUG if verbose else level)
