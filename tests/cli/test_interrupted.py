"""Ctrl-C, as a person gives it, and a disk that takes no more."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from support.paths import SAMPLE_PLUGIN

PLUGIN = """
import os, resource, signal
from vflair_core import hookimpl

@hookimpl
def vflair_step_finished(arm, step, loss):
    if arm == "defended":
        ACTION
"""
FULL = "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
EXPERIMENT = """
isolation = "inline"
defenses = [{ name = "shift" }]
attacks = [{ name = "first-row", knowledge = "K1" }]
task = { name = "words" }
partition = { head = 1, tail = 0 }
train = { steps = 2, batch_size = 4, max_length = 16 }
victims = { count = 4, max_length = 12, bypass = 2 }
[model]
vocab_size = 300
config = { model_type = "llama", hidden_size = 16, intermediate_size = 32, num_hidden_layers = 3, \
num_attention_heads = 2, num_key_value_heads = 2, max_position_embeddings = 64 }
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize(
    ("action", "code", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGINT)", 130, r"vflair: interrupted\. "),
        (FULL, 1, r"vflair: .*(too large|Too large).* "),
    ],
    ids=["Ctrl-C", "a full disk"],
)
def test_it_ends_in_one_line_that_says_what_is_left(tmp_path, action, code, said):
    (tmp_path / "stop.py").write_text(PLUGIN.replace("ACTION", action))
    (tmp_path / "small.toml").write_text(EXPERIMENT)
    temporary, out = tmp_path / "temporary", tmp_path / "out"
    temporary.mkdir()
    command = [
        *(sys.executable, "-m", "vflair_core.cli.main", "run", tmp_path / "small.toml"),
        *("--plugin", SAMPLE_PLUGIN, "--plugin", tmp_path / "stop.py", "--out", out),
    ]
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert done.returncode == code, done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.match(said + rf"What was finished is in {out}: undefended\.", last), done.stderr
    assert "Traceback" not in done.stderr
    table = json.loads((out / "result.json").read_text())
    assert table["finished"] is False
    assert set(table["numbers"]) == {"undefended"}
    assert not list(temporary.glob("vflair-*"))
    assert not list(out.glob("*.part"))
