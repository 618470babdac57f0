"""A tracker tells its logbook settings and numbers of a run, keeps seeds apart, and stops nothing."""

from __future__ import annotations

import json

import pytest

from support.paths import SAMPLE_PLUGIN, SECRET_WORDS
from support.secret_words import SECRET
from support.small_models import LLAMA
from vflair_core import Guarantee, PluginError, Tracker, VflairError, hookimpl, plugin_manager, run
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.figures import error_without_text, settings_of

BASE = {
    "task": {"name": "secret-words", "options": {"note": SECRET}},
    "model": {"config": LLAMA, "vocab_size": 300},
    "partition": {"head": 1, "tail": 1},
    "train": {"steps": 2, "batch_size": 4, "max_length": 16},
    "victims": {"count": 4, "max_length": 12, "bypass": 2, "queries": 2},
    "isolation": "inline",
}


def small(**changes):
    return experiment_from({**BASE, **changes})


class Book:
    """Keeps all that it is told; it can be made to fail."""

    def __init__(self):
        self.opened, self.written, self.closed, self.fails = [], [], [], ""

    def open(self, name, settings):
        if self.fails == "open":
            raise OSError("the disk is full")
        self.opened.append((name, settings))
        return self

    def write(self, series, figures, step):
        if self.fails == "write":
            raise OSError("the disk is full")
        self.written += [(series, name, step, value) for name, value in figures.items()]

    def close(self, status, error):
        self.closed.append((status, error))

    def of(self, series, name):
        return [(step, value) for s, n, step, value in self.written if (s, n) == (series, name)]


@pytest.fixture
def book():
    return Book()


@pytest.fixture
def pm(book):
    plugins = plugin_manager([SAMPLE_PLUGIN, SECRET_WORDS], entry_point_group="vflair.none")
    plugins.register(Tracker(book.open), "tracker")
    return plugins


def test_a_logbook_gets_what_the_result_holds_and_no_text_of_the_task(pm, book):
    attacks = [{"name": "first-row", "knowledge": "K4"}] * 2
    e = small(attacks=attacks, defenses=[{"name": "shift"}])
    result = run(e, plugins=pm, strict=True)
    assert SECRET in json.dumps(result.samples)
    assert [name for name, _ in book.opened] == [f"secret-words-{e.digest}"]
    assert book.closed == [("finished", "")]
    for arm in ("undefended", "defended"):
        numbers = result.numbers[arm]
        assert book.of(arm, "loss") == list(enumerate(numbers["losses"], start=1))
        performances = [grade["attack_performance"] for grade in numbers["attacks"]]
        told = book.of(arm, "first-row K4 tokens/attack_performance")
        assert told == list(enumerate(performances))
    assert SECRET not in repr((book.opened, book.written, book.closed))
    assert all(type(value) is float for *_, value in book.written)


def test_figures_of_the_whole_run_have_the_path_they_have_in_the_result(pm, book):
    result = run(small(defenses=[{"name": "shift"}]), plugins=pm, strict=True)
    whole = {"numbers": result.numbers, "cost": result.cost}
    told = [(name, value) for series, name, _, value in book.written if series == "result"]
    assert len(told) == len(dict(told)) > 20
    for path, value in told:
        place = whole
        for part in path.split("/"):
            place = place[int(part)] if isinstance(place, list) else place[part]
        assert place == value


def test_a_guarantee_is_told_by_its_numbers(pm, book):
    @hookimpl
    def vflair_defenses():
        from support.sample_plugin import Shift

        class Promising(Shift):
            def guarantee(self, releases, messages, gradients):
                return Guarantee(
                    "none", epsilon=2.5, epsilon_per_release=1.5, delta=1e-6, releases=7
                )

        return {"promising": Promising}

    plugin = type("Plugin", (), {"vflair_defenses": staticmethod(vflair_defenses)})
    pm.register(plugin(), "promises")
    run(small(defenses=[{"name": "promising"}]), plugins=pm, strict=True)
    promised = "numbers/defended/guarantees/0/"
    told = {name: value for _, name, _, value in book.written if name.startswith(promised)}
    assert told[f"{promised}epsilon"] == 2.5
    assert told[f"{promised}delta"] == 1e-6
    assert told[f"{promised}releases"] == 7.0


def test_arms_of_several_seeds_are_kept_apart(pm, book):
    attacks = [{"name": "first-row", "knowledge": "K1"}]
    result = run(small(seeds=[3, 4, 5, 6, 7], attacks=attacks), plugins=pm, strict=True)
    assert book.of("seed-3/undefended", "loss") == list(
        enumerate(result.numbers["undefended"]["losses"], start=1)
    )
    assert book.of("undefended", "loss") == []
    grades = [book.of(f"seed-{s}/undefended", "first-row K1 tokens/attack_performance") for s in range(3, 8)]  # fmt: skip
    assert [step for ((step, _),) in grades] == [0] * 5
    (mean,) = (row["undefended"] for row in result.numbers["over_seeds"]["attacks"])
    assert sum(value for ((_, value),) in grades) / 5 == pytest.approx(mean)
    told = book.of("result", "numbers/over_seeds/attacks/0/undefended")
    assert told == [(0, mean)]


def test_of_a_failed_run_the_kind_of_error_is_told_and_not_its_words(pm, book):
    with pytest.raises(ValueError, match=SECRET):
        run(small(task={"name": "secret-words", "options": {"broken": 3}}), plugins=pm)
    assert book.closed == [("failed", "ValueError in vflair_plugin_secret_words")]
    assert error_without_text(KeyboardInterrupt()) == "KeyboardInterrupt"


@pytest.mark.parametrize("where", ["open", "write"])
def test_a_logbook_that_fails_is_named_and_stops_only_a_strict_run(pm, book, where, caplog):
    book.fails = where
    assert run(small(), plugins=pm).finished
    said = [record.getMessage() for record in caplog.records]
    failed = "observer_failed plugin=tracker hook=vflair_"
    assert all(line.startswith(failed) and "the disk is full" in line for line in said)
    if where == "open":
        assert len(said) == 1
        assert book.closed == []
    else:
        assert len(said) == 5  # two steps, two evaluations, and the run as a whole
        assert book.closed == [("finished", "")]
    with pytest.raises(PluginError, match=r"tracker failed in vflair_.*the disk is full"):
        run(small(), plugins=pm, strict=True)


def test_a_run_that_another_observer_stopped_is_closed_before_the_next_begins(pm, book):
    class Loud:
        @hookimpl
        def vflair_run_started(self, experiment):
            raise VflairError("no")

    pm.register(Loud(), "loud")
    with pytest.raises(PluginError, match="loud failed in vflair_run_started"):
        run(small(), plugins=pm, strict=True)
    run(small(), plugins=pm)
    assert len(book.opened) == 2
    assert book.closed == [("failed", "not ended"), ("finished", "")]


def test_settings_are_told_by_path_but_no_text_of_a_tasks_options_and_no_address():
    e = small(
        task={"name": "own", "options": {"files": ["smith.csv"], "prompt": SECRET, "seed": 5}},
        channel="grpc://host:1",
        defenses=[{"name": "shift", "options": {"by": 2.5}}],
    )
    settings = settings_of(e)
    assert settings["task.options.seed"] == 5
    assert settings["defenses.0.options.by"] == 2.5
    assert settings["channel"] == "grpc"
    assert settings["config_hash"] == e.digest
    assert not {"smith.csv", SECRET, "grpc://host:1"} & set(settings.values())


def test_a_file_may_say_which_object_is_the_plugin(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from vflair_core import hookimpl\n"
        "class Counts:\n"
        "    @hookimpl\n"
        "    def vflair_step_finished(self, step): self.step = step\n"
        "plugin = Counts()\n"
    )
    plugins = plugin_manager([tmp_path / "mine.py"], entry_point_group="vflair.none")
    (info,) = plugins.about()
    assert (info.name, info.hooks) == ("mine", ("vflair_step_finished",))
    plugins.hook.vflair_step_finished(arm="undefended", step=3, loss=0.1)
    assert plugins.get_plugin("mine").step == 3
