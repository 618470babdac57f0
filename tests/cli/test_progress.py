"""What is said while a run goes on: by the program off a terminal, and by the library, which says nothing."""

from __future__ import annotations

import io
import logging
import sys
import time

import pytest

from support.paths import SAMPLE_PLUGIN
from support.small_models import LLAMA
from vflair_core import experiment_from, plugin_manager, run
from vflair_core.cli.progress import lines
from vflair_core.cli.tables import table
from vflair_core.cli.terminal import _in_short

EXPERIMENT = {
    "task": {"name": "words"},
    "model": {"config": LLAMA, "vocab_size": 300},
    "partition": {"head": 1, "tail": 1},
    "train": {"steps": 2, "batch_size": 4, "max_length": 12},
    "victims": {"count": 3, "max_length": 12, "bypass": 1},
    "isolation": "inline",
}


def test_off_a_terminal_each_phase_is_a_line_and_what_goes_on_is_told_again(monkeypatch):
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    with lines(every=0.2) as report:
        time.sleep(0.3)
        report("reading", 0, 2)
        for step in range(1, 41):
            report(f"learning, loss {1 / step:.2f}", step, 40)
        time.sleep(0.3)
    said = [line.partition("] ")[2] for line in errors.getvalue().splitlines()]
    assert said[:3] == ["starting", "reading", "learning"]
    assert set(said[3:]) == {"learning, loss 0.03: 40 of 40"}
    assert 1 <= len(said[3:]) <= 3  # of forty reports none by itself
    assert errors.getvalue().startswith("[0:00:00] ")
    before = errors.getvalue()
    time.sleep(0.3)
    assert errors.getvalue() == before  # it has ended


def test_as_a_library_a_run_prints_nothing(capfd):
    run(
        experiment_from(EXPERIMENT),
        plugins=plugin_manager([SAMPLE_PLUGIN], entry_point_group="none"),
    )
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == ""


def test_who_listens_to_the_logger_hears_events_with_what_they_tell(caplog):
    plugins = plugin_manager([SAMPLE_PLUGIN], entry_point_group="none")
    with caplog.at_level(logging.DEBUG, logger="vflair_core"):
        result = run(experiment_from(EXPERIMENT), plugins=plugins)
    steps = [record for record in caplog.records if record.event == "step_finished"]
    assert [record.fields["step"] for record in steps] == [1, 2]
    assert [record.fields["loss"] for record in steps] == result.numbers["undefended"]["losses"]
    assert {record.levelno for record in steps} == {logging.DEBUG}
    assert {record.name.partition(".")[0] for record in steps} == {"vflair_core"}
    assert steps[0].getMessage().startswith("step_finished arm=undefended step=1 loss=")
    (held,) = [record for record in caplog.records if record.event == "parameters"]
    assert held.levelno == logging.INFO
    assert held.fields["data_party"] + held.fields["model_party"] == held.fields["total"]


def test_in_short_what_nobody_should_miss_is_named():
    remarks = [
        "defended, mid: positive control failed.",
        "defended, labels: NOT EVALUATED.",
        "mid: a promise.",
    ]
    said = _in_short(remarks, remarks[:2])
    assert said.startswith("3 remarks, 2 of them warnings (failed, NOT EVALUATED): --verbose")
    assert _in_short(remarks[2:], []).startswith("1 remarks, no warning")


@pytest.mark.parametrize("width", [80, 40])
def test_a_table_keeps_names_and_intervals_whole(monkeypatch, width):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "dumb")
    row = ("replacement-inversion, response", "K1+queries", "0.123 [0.10, 0.15]", "words " * 20)
    table(("attack", "knows", "AP defended", "verdict"), [row], whole=("AP defended",))
    said = out.getvalue()
    assert row[0] in said
    assert row[2] in said
    if width == 80:
        assert max(len(line.rstrip()) for line in said.splitlines()) <= 80
