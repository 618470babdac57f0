"""Two data parties and a model party in NVFlare's simulator find what one process finds, and keep it where it belongs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("nvflare")

from safetensors.torch import load_file

from support import nvflare_parties as parties
from support.nvflare_project import SUPPORT, contents

pytestmark = pytest.mark.slow
CODE = SUPPORT / "nvflare_parties.py"
RUN = """
import sys
from vflair_nvflare import split_job
job = split_job(
    "simulated",
    model={{"model": "nvflare_parties:model_party"}},
    data={{"alice": "nvflare_parties:data_party", "bob": "nvflare_parties:data_party"}},
    model_code=[{code!r}], data_code=[{code!r}], options={options!r}, encrypt={encrypt},
)
sys.exit(job.simulator_run({workspace!r}))
"""


def simulate(folder, *, encrypt=False, **options):
    environment = {**os.environ, "HOME": str(folder), "PYTHONWARNINGS": "ignore"}
    run = RUN.format(
        code=str(CODE), options=options, encrypt=encrypt, workspace=str(folder / "workspace")
    )
    script = folder / "job.py"
    script.write_text(run)
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    return done.stdout + done.stderr, folder / "workspace"


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulator")
    (folder / "met").mkdir()
    said, workspace = simulate(folder, meet=str(folder / "met"), parties=2)
    assert (workspace / "server/simulate_job/vflair.json").exists(), said[-6000:]
    return workspace


@pytest.fixture(scope="module")
def alone():
    return parties.together("alice", "bob")


def test_losses_are_those_of_one_process_bit_for_bit(simulated, alone):
    found, _ = alone
    for name in ("alice", "bob"):
        losses = simulated / name / "simulate_job/vflair/losses.json"
        assert json.loads(losses.read_text()) == found[name][0]
    result = json.loads((simulated / "server/simulate_job/vflair.json").read_text())
    assert result == {n: {"numbers": {"loss": found[n][0][-1]}} for n in ("alice", "bob")}


def test_each_half_lies_at_its_owner_and_nowhere_else(simulated, alone):
    found, model = alone
    files = {
        file.relative_to(simulated).parts[0]: file for file in simulated.rglob("*.safetensors")
    }
    assert sorted(files) == ["alice", "bob", "model"]
    own = {name: load_file(file) for name, file in files.items()}
    assert own["alice"].keys() == own["bob"].keys()
    assert not own["alice"].keys() & own["model"].keys()
    for name, weight in model.named_parameters():
        assert own["model"][name].equal(weight), name
    for site in ("alice", "bob"):
        for name, weight in found[site][1].named_parameters():
            assert own[site][name].equal(weight), name


def test_the_server_has_no_text_and_no_weight(simulated, alone):
    found, model = alone
    kept = b"\n".join(contents(simulated / "server"))
    assert b"vflair.json" in kept or b"SplitLearning" in kept  # it did look
    needles = [parties.text_of(name).encode() for name in ("alice", "bob")]
    halves = [model, *(found[name][1] for name in ("alice", "bob"))]
    for half in halves:
        needles += parties.windows(half).values()
    assert not [needle for needle in needles if needle in kept]
    at_alice = b"\n".join(contents(simulated / "alice"))
    assert needles[0] in at_alice  # and would be found


def test_what_is_to_be_encrypted_is_not_sent_without_certificates(tmp_path):
    _, workspace = simulate(tmp_path, encrypt=True)
    result = json.loads((workspace / "server/simulate_job/vflair.json").read_text())
    assert "this site has no certificates" in result["alice"]["failed"]
    assert "no certificates" in result["bob"]["failed"]
