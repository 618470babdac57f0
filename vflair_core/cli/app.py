"""The program `vflair` and the options that its commands share."""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TextIO

from cyclopts import App, Parameter

from vflair_core import __version__
from vflair_core.plugins import CHOICE

app = App(
    name="vflair",
    version=__version__,
    help="Split learning of large language models.",
    suppress_keyboard_interrupt=False,  # `main` says what is left of a run
)


Plugin = Annotated[
    list[Path] | None, Parameter(name="--plugin", help="A one-file plugin; repeatable.")
]


NoPlugin = Annotated[
    list[str] | None,
    Parameter(
        name="--no-plugin",
        help="An installed plugin to leave out; repeatable, or several with commas.",
    ),
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
        line = f"{str(getattr(record, 'event', '')).replace('_', ' ')}: {told}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonLines(logging.Formatter):
    """An event of ours, or a line of anybody's, as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        moment = dt.datetime.fromtimestamp(record.created, dt.UTC)
        facts = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": getattr(record, "event", None) or record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            facts["trace"] = self.formatException(record.exc_info)
        return json.dumps(facts, default=str)


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


def leave_out(plugins: list[str] | None) -> None:
    """Leave out installed plugins, here and in the processes that this one starts."""
    names = [name.strip() for each in plugins or () for name in each.split(",") if name.strip()]
    earlier = os.environ.get(CHOICE)
    words = [word.strip() for word in (earlier or "").split(",") if word.strip()]
    if names and (earlier is None or words):  # with none at all there is nothing to leave out
        os.environ[CHOICE] = ",".join([*words, *(f"-{name}" for name in names)])


@contextmanager
def own_choice() -> Iterator[None]:
    """The plugins that a command leaves out are left out for that command."""
    earlier = os.environ.get(CHOICE)
    try:
        yield
    finally:
        if earlier is None:
            os.environ.pop(CHOICE, None)
        else:
            os.environ[CHOICE] = earlier


@contextmanager
def own_logging() -> Iterator[None]:
    """What a command shows of events ends with it: whoever called the program as a function finds logging as it was."""
    log = logging.getLogger("vflair_core")
    handlers, level = log.handlers[:], log.level
    try:
        yield
    finally:
        log.handlers[:] = handlers
        log.setLevel(level)


def configure_logging(
    *, verbose: bool, level: int = logging.WARNING, as_json: bool = False
) -> None:
    """Show events of this level on standard error; `verbose` shows all, `as_json` for programs that read them."""
    log = logging.getLogger("vflair_core")
    if not any(isinstance(handler, StandardError) for handler in log.handlers):
        log.addHandler(StandardError())
    for handler in log.handlers:
        if isinstance(handler, StandardError):
            handler.setFormatter(JsonLines() if as_json else Words())
    log.setLevel(logging.DEBUG if verbose else level)
