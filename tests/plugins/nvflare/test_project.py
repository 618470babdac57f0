"""Split learning in a provisioned project: what its server is sent and holds, and what comes of sites that die."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("nvflare")

import torch
from safetensors.torch import load_file

from support import nvflare_parties as parties
from support.nvflare_project import Project, contents
from support.real_model import MISSING
from vflair_core import LocalChannel
from vflair_nvflare import split_job

pytestmark = pytest.mark.slow
BOTH = ("alice", "bob")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    with Project(tmp_path_factory.mktemp("project")) as running:
        yield running


@pytest.fixture(scope="module")
def alone():
    return parties.together(*BOTH)


def job(name, sites=BOTH, work="data_party", party="model_party", **options):
    ways = {k: options.pop(k) for k in ("encrypt", "timeout") if k in options}
    return split_job(
        name,
        model={"model": f"nvflare_parties:{party}"},
        data=dict.fromkeys(sites, f"nvflare_parties:{work}"),
        options=options,
        **ways,
    )


def meeting(tmp_path):
    return {"meet": str(tmp_path), "parties": 2}


def private(found, model):
    """Windows of 64 bytes of each text and each weight, which nobody but their owners may hold."""
    needles = {f"text of {name}": parties.text_of(name).encode() for name in BOTH}
    halves = {"model": model, **{name: found[name][1] for name in BOTH}}
    for owner, half in halves.items():
        needles |= {f"{owner} {n}": window for n, window in parties.windows(half).items()}
    assert len(needles) > 20
    return needles


def test_nvflares_server_passes_on_what_it_cannot_read(project, alone, tmp_path):
    found, model = alone
    status, result, folders = project.run(job("encrypted", **meeting(tmp_path)))
    assert status == "FINISHED:COMPLETED"
    assert result == {n: {"numbers": {"loss": found[n][0][-1]}} for n in BOTH}
    received, kept = project.received(), project.kept()
    for name in BOTH:
        assert json.loads((folders[name] / "losses.json").read_text()) == found[name][0]
        sent = (folders[name] / "sent.bin").read_bytes()
        assert sent == found[name][2]  # hidden states crossed, as in one process,
        assert (
            sent[:64] not in received
        )  # and the server, through which they went, cannot read them
        assert name.encode() in received  # though it knows who speaks
    held = [what for what, needle in private(found, model).items() if needle in received + kept]
    assert held == []
    assert len(received) > 100_000
    files = {site: load_file(next(folders[site].glob("*.safetensors"))) for site in folders}
    assert not files["alice"].keys() & files["model"].keys()
    assert all(files["model"][name].equal(w) for name, w in model.named_parameters())
    at_alice = b"\n".join(contents(folders["alice"]))
    assert parties.text_of("alice").encode() in at_alice
    assert parties.text_of("bob").encode() not in at_alice


def test_without_encryption_the_server_can_read_hidden_states_and_still_nothing_else(
    project, alone, tmp_path
):
    found, model = alone
    status, _, folders = project.run(job("plain", encrypt=False, **meeting(tmp_path)))
    assert status == "FINISHED:COMPLETED"
    received, kept = project.received(), project.kept()
    for name in BOTH:
        assert json.loads((folders[name] / "losses.json").read_text()) == found[name][0]
        assert (folders[name] / "sent.bin").read_bytes()[:64] in received
    held = [what for what, needle in private(found, model).items() if needle in received + kept]
    assert held == []


def test_the_text_of_an_error_stays_at_its_site(project):
    status, result, folders = project.run(job("fails", sites=["alice"], fails="alice"))
    assert status == "FINISHED:EXECUTION_EXCEPTION"
    assert result["alice"]["failed"].startswith("KeyError (")
    secret = parties.text_of("alice")
    assert secret in (folders["alice"] / "error.txt").read_text()
    assert secret.encode() not in project.received() + project.kept()


def test_a_process_of_the_job_that_dies_at_one_site_ends_the_job_and_nobody_waits(
    project, tmp_path
):
    status, result, folders = project.run(job("dies", dies="alice", **meeting(tmp_path)))
    assert status == "FINISHED:EXECUTION_EXCEPTION"
    assert not [site for site in result if "numbers" in result[site]]
    assert "cannot be reached: the job was stopped" in (folders["bob"] / "error.txt").read_text()
    assert not (folders["alice"] / "losses.json").exists()


def test_a_site_that_is_lost_is_named_and_the_others_go_on(project, tmp_path):
    lost = job("lost", dies="alice", whole=True, **meeting(tmp_path))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(project.run, lost)
        while not (dying := tmp_path / "dying").exists() or not dying.read_text():
            assert not running.done(), running.result()
            time.sleep(0.1)
        project.kill("alice", int(dying.read_text()))
        status, result, folders = running.result()
    project.start_again("alice")
    assert status == "FINISHED:EXECUTION_EXCEPTION"
    assert result["alice"] == {"failed": "it was lost"}
    losses = json.loads((folders["bob"] / "losses.json").read_text())
    assert len(losses) == parties.STEPS
    assert result["bob"] == {"numbers": {"loss": losses[-1]}}
    assert (folders["model"] / "model_party.safetensors").exists()
    assert not (folders["alice"] / "losses.json").exists()


def test_a_model_party_that_dies_ends_the_job_and_nobody_waits(project, tmp_path):
    status, _, folders = project.run(job("body-dies", dies="model", **meeting(tmp_path)), 200)
    assert status.startswith("FINISHED:")
    assert status != "FINISHED:COMPLETED"
    for name in BOTH:
        assert not (folders[name] / "losses.json").exists()
    said = [folders[name] / "error.txt" for name in BOTH]
    words = "".join(file.read_text() for file in said if file.exists())
    assert "The model party at site 'model' cannot be reached" in words


@pytest.mark.real
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
# peft asks transformers for something old.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_real_model_is_fine_tuned_by_lora_as_in_one_process(project):
    status, result, folders = project.run(
        job("real", sites=["alice"], work="real_data_party", party="real_model_party"), 500
    )
    assert status == "FINISHED:COMPLETED"
    site = type("Here", (), {"options": {}})
    model = parties.real_model_party(site)
    losses, tokens, party = parties.real_training(LocalChannel(model.handle))
    assert json.loads((folders["alice"] / "losses.json").read_text()) == [losses, tokens]
    assert result == {"alice": {"numbers": {"loss": losses[-1]}}}
    own = load_file(next(folders["alice"].rglob("*.safetensors")))
    adapters = {n: w for n, w in party.named_parameters() if "lora" in n}
    assert adapters
    assert all(torch.equal(own[name], weight) for name, weight in adapters.items())
    party.close()
    needles = [w.detach().numpy().tobytes()[-64:] for n, w in adapters.items() if w.abs().sum() > 0]
    needles.append(parties.text_of("alice").encode())
    assert not [needle for needle in needles if needle in project.received()]
