"""What a line of the log looks like, for people and for programs."""

from __future__ import annotations

import contextlib
import json
import logging

import pytest

from vflair_core.cli.app import JsonLines, Words
from vflair_core.cli.main import main
from vflair_core.events import events


def logged(act, caplog):
    with caplog.at_level(logging.INFO, "vflair_core"):
        act(events("vflair_core.somewhere"))
    (record,) = caplog.records
    return Words().format(record), json.loads(JsonLines().format(record))


def test_an_event_is_told_in_words_and_as_an_object(caplog):
    words, facts = logged(lambda log: log.info("stream_opened", client="alice", rows=1234), caplog)
    assert words == "stream opened: client alice, rows 1,234"
    assert facts.pop("time").endswith("+00:00")
    assert facts == {
        "level": "info",
        "logger": "vflair_core.somewhere",
        "event": "stream_opened",
        "client": "alice",
        "rows": 1234,
    }


def test_a_fault_is_told_with_its_trace(caplog):
    def fail(log):
        try:
            {}["weights"]
        except KeyError:
            log.exception("message_failed", kind="forward")

    words, facts = logged(fail, caplog)
    assert words.startswith("message failed: kind forward\nTraceback")
    assert "KeyError: 'weights'" in facts["trace"]
    assert facts["level"] == "error"


def test_a_line_of_somebody_else_is_an_object_too(caplog):
    with caplog.at_level(logging.INFO):
        logging.getLogger("other").warning("about %s", "this")
    assert json.loads(JsonLines().format(caplog.records[-1]))["event"] == "about this"
    assert Words().format(caplog.records[-1]) == "about this"


@pytest.mark.parametrize("words", [["plugins"], ["explain", "nowhere.toml"]])
def test_the_program_called_as_a_function_leaves_logging_as_it_was(words, capsys):
    log = logging.getLogger("vflair_core")
    before = log.handlers[:], log.level
    with contextlib.suppress(SystemExit):  # the second one ends with an error
        main(words)
    assert capsys.readouterr() != ("", "")
    assert (log.handlers, log.level) == before
