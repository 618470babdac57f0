"""The quickstart on a real language model does what it says, with fewer tokens and steps."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from support.paths import EXAMPLES
from support.real_model import REAL

pytestmark = REAL


@pytest.fixture
def quickstart(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("quickstart", EXAMPLES / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quickstart", module)
    spec.loader.exec_module(module)
    shorter = {
        "ANSWER": 4,
        "STEPS": 4,
        "STRENGTHS": {"strong": 0.2},
        "TASK": {"train_examples": 16, "test_examples": 4, "public_characters": 30_000},
        "OUT": tmp_path,
    }
    for name, value in shorter.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_a_real_model_answers_leaks_learns_and_is_defended(quickstart, tmp_path, capsys):
    quickstart.main()
    found = json.loads((tmp_path / "result.json").read_text())
    plain, tuned, strong = found["undefended"], found["fine-tuning"], found["strong"]
    assert plain["answer_equals_unsplit"]
    assert plain["read"] == 1.0
    assert "blue-harbour-71" in plain["read_as"]
    assert tuned["loss_after"] < tuned["loss_before"]
    assert tuned["losses_equal_unsplit"]
    assert strong["read"] < 0.5
    assert strong["perplexity"] > 1.5 * plain["perplexity"]
    assert strong["epsilon"] > 0
    said = capsys.readouterr().out
    assert f"read        {1:.0%} of the tokens" in said
    assert len(quickstart.summary(found)) <= 12
