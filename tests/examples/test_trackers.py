"""The example trackers write what the result says into stores on this machine, which their own readers read again."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from support.paths import SAMPLE_PLUGIN, TRACKED_RUNS, TRACKERS
from support.secret_words import SECRET
from support.tracker_stores import READERS
from vflair_core import PluginError, plugin_manager

ARMS = ("undefended", "defended")
# What the readers import warns of is not ours to mend.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module", params=READERS)
def tracked(request, tmp_path_factory):
    """Two runs in a process that may call whom it likes: one finished, and one that failed after three steps."""
    name = request.param
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"not installed: {name} (nox -s trackers has it)")
    folder = tmp_path_factory.mktemp(name)
    quiet = ("CI", "PYTEST_CURRENT_TEST", "HF_HUB_OFFLINE", "MLFLOW_DISABLE_TELEMETRY")
    env = {key: value for key, value in os.environ.items() if key not in quiet}
    env |= {"HF_TOKEN": "hf_of_nobody", "PYTHONPATH": os.pathsep.join(sys.path)}
    env["TRACKIO_DIR"] = str(folder / "trackio")
    command = [sys.executable, str(TRACKED_RUNS), str(TRACKERS / f"to_{name}.py"), "out"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "out" / "result.json").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", env["TRACKIO_DIR"])
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")  # of the reader; a plugin sees to its own
        finished, failed = READERS[name](folder)
    said = json.loads(done.stdout)
    return SimpleNamespace(folder=folder, result=result, finished=finished, failed=failed, **said)


def near(points):
    """The same points, as far as 32 bits hold them."""
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in points]


@pytest.mark.parametrize("arm", ARMS)
def test_the_store_holds_each_steps_loss_and_each_evaluation(tracked, arm):
    numbers, figures = tracked.result["numbers"][arm], tracked.finished.figures
    assert figures[f"{arm}/loss"] == near(enumerate(numbers["losses"], start=1))
    rows = numbers["evaluations"]
    assert [row["step"] for row in rows] == [0, 2, 4]
    for metric in rows[0]["metrics"]:
        each = [(row["step"], row["metrics"][metric]) for row in rows]
        assert figures[f"{arm}/test/{metric}"] == near(each)


@pytest.mark.parametrize("arm", ARMS)
def test_the_store_holds_each_grade_with_floor_interval_and_controls(tracked, arm):
    grades = tracked.result["numbers"][arm]["attacks"]
    assert [grade["knowledge"] for grade in grades] == ["K1", "K4"]
    for place, grade in enumerate(grades):
        title = f"{arm}/first-row {grade['knowledge']} {grade['target']}"
        low, high = grade["interval"]
        told = {
            "attack_performance": grade["attack_performance"],
            "floor": grade["floor"],
            "interval/0": low,
            "interval/1": high,
            "negative_control": grade["negative_control"],
            "verdict_ok": float(grade["verdict"] == "ok"),
        }
        for name, value in told.items():
            assert tracked.finished.figures[f"{title}/{name}"] == near([(place, value)])


def test_the_store_holds_what_the_run_says_as_a_whole(tracked):
    result, figures = tracked.result, tracked.finished.figures
    dcs, cost = result["numbers"]["dcs"], result["cost"]
    told = {"numbers/dcs/per_attack/1/dcs": dcs["per_attack"][1]["dcs"]}
    for arm in ARMS:
        told[f"numbers/{arm}/main_performance"] = result["numbers"][arm]["main_performance"]
        told[f"cost/{arm}/total_bytes"] = cost[arm]["total_bytes"]
        for way, nbytes in cost[arm]["bytes"].items():
            told[f"cost/{arm}/bytes/{way}"] = nbytes
    assert "cost/defended/bytes/smashed sent" in told
    for path, value in told.items():
        ((_, found),) = figures[f"result/{path}"]
        assert found == pytest.approx(value, rel=1e-6)


def test_the_store_holds_the_settings_and_how_the_run_ended(tracked):
    settings = tracked.finished.settings
    assert settings["train.steps"] == "4"
    assert settings["defenses.0.name"] == "shift"
    assert settings["defenses.0.options.by"] == "2.0"
    assert settings["attacks.1.knowledge"] == "K4"
    assert settings["task.options.examples"] == "20"
    assert settings["config_hash"] == tracked.result["config_hash"]
    assert tracked.finished.ended == "finished"


def test_of_a_run_that_failed_the_store_holds_what_was_done_and_the_kind_of_error(tracked):
    assert SECRET in tracked.error
    assert tracked.failed.ended == "failed ValueError in vflair_plugin_secret_words"
    assert tracked.failed.settings["task.options.broken"] == "3"
    assert [step for step, _ in tracked.failed.figures["undefended/test/loss"]] == [0]
    assert not [name for name in tracked.failed.figures if name.startswith("result/")]


def test_no_private_text_gets_into_the_store(tracked):
    found = {
        path.relative_to(tracked.folder).parts[0]
        for path in tracked.folder.rglob("*")
        if path.is_file() and SECRET.encode() in path.read_bytes()
    }
    assert found == {"out"}  # where the samples of the result say it


def test_nobody_is_called(tracked):
    assert tracked.called == []


@pytest.mark.parametrize("variable", ["TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"])
def test_trackio_writes_no_run_where_it_would_send_it_elsewhere(variable, monkeypatch):
    pytest.importorskip("trackio", reason="not installed: trackio (nox -s trackers has it)")
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    plugins = plugin_manager([TRACKERS / "to_trackio.py"], entry_point_group="vflair.none")
    with pytest.raises(RuntimeError, match=f"as {variable} says, and this plugin writes on this"):
        plugins.get_plugin("to_trackio").open_logbook("a run", {})


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("tensorboard", r"pip install 'vflair-core\[tensorboard\]'"),
        ("mlflow", "pip install mlflow"),
        ("trackio", "pip install trackio"),
    ],
)
def test_a_tracker_that_is_not_installed_says_how_it_gets_there(name, command, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == name else find(n, *a)
    )
    with pytest.raises(PluginError, match=rf"is not installed: {command}"):
        plugin_manager([TRACKERS / f"to_{name}.py", SAMPLE_PLUGIN], entry_point_group="vflair.none")
