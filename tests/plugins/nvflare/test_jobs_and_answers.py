"""What a job says, what the sites tell NVFlare's server, and what they keep to themselves."""

from __future__ import annotations

import json
import math
import stat

import pytest

pytest.importorskip("nvflare")

from nvflare.apis.fl_constant import ReturnCode

from vflair_core import BusyError, ChannelError, ProtocolError
from vflair_nvflare import Site, split_job
from vflair_nvflare.allow import allow, main
from vflair_nvflare.site import function_of
from vflair_nvflare.tasks import REASON, failed, numbers_of, reason_of, reported

SECRET = "patient 4096 of the harbour"


def make(**options):
    sites = {"model": {"model": "m:party"}, "data": {"alice": "d:work", "bob": "d:work"}}
    return split_job("job", **{**sites, **options})


# -- what goes to the server -----------------------------------------------------------------------------


def test_a_few_named_numbers_are_told():
    assert numbers_of({"loss": 0.5, "steps": 3, "done": True}) == {
        "loss": 0.5,
        "steps": 3.0,
        "done": 1.0,
    }
    assert numbers_of(None) == {}


@pytest.mark.parametrize(
    "found",
    [
        SECRET,
        [1.0],
        {"text": SECRET},
        {"tokens": [1, 2, 3]},
        {SECRET: 1.0},
        {"loss": math.nan},
        {1: 1.0},
        {f"n{n}": 1.0 for n in range(65)},
    ],
)
def test_anything_else_is_refused_and_not_quoted(found):
    with pytest.raises(ProtocolError, match="names to finite numbers") as caught:
        numbers_of(found)
    assert SECRET not in str(caught.value)


def test_of_an_error_of_the_parties_the_words_are_told():
    for error in (ChannelError("gone."), ProtocolError("no."), BusyError("later.")):
        reply = failed(error)
        assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
        assert reason_of(reply) == f"{type(error).__name__}: {error}"


def test_of_any_other_error_only_the_kind_is_told_and_the_rest_stays(tmp_path):
    error = KeyError(SECRET)
    site = Site("alice", tmp_path, {})
    assert SECRET not in str(dict(failed(error)))
    assert reason_of(failed(error)).startswith("KeyError (")
    logged = reported(error, site, "vflair_work")
    assert SECRET not in logged
    assert "KeyError" in logged
    report = tmp_path / "error.txt"
    assert SECRET in report.read_text()
    assert stat.S_IMODE(report.stat().st_mode) == 0o600
    assert reported(error, None, "vflair_serve") == "vflair_serve failed: KeyError"


def test_a_site_that_said_nothing_is_lost():
    assert reason_of(None) == "it was lost"
    reply = failed(ChannelError("x"))
    del reply[REASON]
    assert reason_of(reply) == "NVFlare reports EXECUTION_EXCEPTION"


# -- jobs ------------------------------------------------------------------------------------------------


def test_a_job_names_functions_and_brings_code_only_where_it_is_asked_to(tmp_path):
    code = tmp_path / "d.py"
    code.write_text("def work(site, channel): pass\n")
    make(data_code=[code], options={"steps": 3}, timeout=7.0, wire_dtype="int8").export_job(
        str(tmp_path)
    )
    job = tmp_path / "job"
    meta = json.loads((job / "meta.json").read_text())
    assert (meta["min_clients"], meta["mandatory_clients"]) == (2, ["model"])
    assert sorted(path.name for path in job.rglob("*.py")) == ["d.py", "d.py"]
    assert {path.parents[1].name for path in job.rglob("d.py")} == {"app_alice", "app_bob"}
    (alice,) = json.loads((job / "app_alice/config/config_fed_client.json").read_text())[
        "executors"
    ]
    assert alice["executor"]["path"] == "vflair_nvflare.data_site.DataSite"
    args = alice["executor"]["args"]
    assert args["function"] == "d:work"
    assert args["options"] == {"steps": 3}
    assert (args["timeout"], args["wire_dtype"]) == (7.0, "int8")
    assert args.get("encrypt", True) is True
    (model,) = json.loads((job / "app_model/config/config_fed_client.json").read_text())[
        "executors"
    ]
    assert model["executor"]["args"]["wire_dtype"] == "int8"


@pytest.mark.parametrize(
    "sites",
    [
        {"data": {}},
        {"model": {}},
        {"model": {"a": "m:p", "b": "m:p"}},
        {"data": {"model": "d:work"}},
    ],
)
def test_a_job_has_one_model_party_and_data_parties_elsewhere(sites):
    with pytest.raises(ProtocolError, match="one model party and at least one data party"):
        make(**sites)


def test_a_function_is_found_or_the_error_says_where_it_was_looked_for():
    assert function_of("json:dumps") is json.dumps
    with pytest.raises(ProtocolError, match=r"has no function 'dump_s'\. Did you mean 'dumps'"):
        function_of("json:dump_s")
    with pytest.raises(
        ProtocolError, match=r"no module 'nowhere'\. Install it here, or give its file"
    ):
        function_of("nowhere:work")
    with pytest.raises(ProtocolError, match="'module:function'"):
        function_of("json.dumps")


# -- letting jobs in -------------------------------------------------------------------------------------


def kit(tmp_path, content='{"class_allow_list": ["nvflare.x."], "other": 1}'):
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "resources.json.default").write_text(content)
    return tmp_path


def test_a_site_lets_jobs_of_vflair_in(tmp_path, capsys):
    main([str(kit(tmp_path))])
    own = tmp_path / "local" / "resources.json"
    expected = {"class_allow_list": ["nvflare.x.", "vflair_nvflare."], "other": 1}
    assert json.loads(own.read_text()) == expected
    assert "resources.json allows vflair_nvflare." in capsys.readouterr().out
    allow(tmp_path)
    assert json.loads(own.read_text()) == expected  # once
    assert "vflair" not in (tmp_path / "local" / "resources.json.default").read_text()


def test_a_folder_that_is_no_startup_kit_is_named(tmp_path):
    with pytest.raises(SystemExit, match="give the folder of a site"):
        main([str(tmp_path)])
    with pytest.raises(ProtocolError, match="is no JSON"):
        allow(kit(tmp_path, "{"))
    with pytest.raises(SystemExit, match="python -m"):
        main([])
