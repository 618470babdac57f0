"""Where attacks compute: named before anything runs, used by the models of attackers, and said in the result."""

from __future__ import annotations

import attrs
import pytest
import torch

import vflair_defenses
from support.foreign_device import DEVICES, device_called, same_attention
from support.paths import SAMPLE_PLUGIN
from support.small_models import LLAMA
from vflair_attacks import vflair_attacks as offered
from vflair_core import hookimpl, plugin_manager, run
from vflair_core.attacks import isolation as devices
from vflair_core.attacks.attack import Guess
from vflair_core.attacks.guess_files import Progression, TimedGuess, read_guess, write_guess
from vflair_core.attacks.isolation import attack_device, hint_of
from vflair_core.errors import ExperimentError
from vflair_core.experiments.attack_phase import attack_again
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.experiment import AttackSpec

INFORMED = AttackSpec("vocabulary-search", {"beam": 2, "chunk": 300}, "K4")
HIJACKING = {
    "name": "feature-space-hijacking",
    "knowledge": "K2",
    "options": {"steps": 3, "batch": 4, "inverse_hidden": 8},
}


@pytest.fixture(scope="module")
def pm():
    class Attacks:
        @hookimpl
        def vflair_attacks(self):
            return offered()

    manager = plugin_manager([SAMPLE_PLUGIN], entry_point_group="vflair.none")
    manager.register(Attacks())
    manager.register(vflair_defenses)
    return manager


@pytest.fixture(params=DEVICES)
def there(request, monkeypatch):
    """A device on which attacks may compute while the test lasts."""
    with same_attention(), device_called(request.param) as device:
        if request.param == "foreign":
            monkeypatch.setattr(devices, "_count", lambda kind: int(kind in ("cpu", "cuda")))
        yield str(device)


def experiment(defense="mid", **changes):
    return experiment_from(
        {
            "seed": 3,
            "task": {"name": "words"},
            "model": {"config": LLAMA, "vocab_size": 300},
            "partition": {"head": 1, "tail": 1},
            "train": {"steps": 2, "batch_size": 4, "max_length": 16},
            "victims": {"count": 3, "max_length": 6, "bypass": 1},
            "defenses": [{"name": defense}],
            "isolation": "inline",
            "attack_device": "cpu",
            **changes,
        }
    )


@pytest.fixture(scope="module")
def kept(pm, tmp_path_factory):
    """The evidence of a run; every attack may ask for it later."""
    folder = tmp_path_factory.mktemp("run")
    attacks = [{"name": "nearest-embedding", "knowledge": "K1"}]
    result = run(experiment(attacks=attacks), plugins=pm, out=folder, keep_evidence=True)
    assert result.cost["defended"]["attack_device"] == "cpu"
    return folder


@pytest.mark.parametrize("asked", ["gpu", "cuda:99", "meta", "cpu:1"])
def test_a_device_that_is_not_there_is_told_before_anything_else(asked, pm, kept):
    e = attrs.evolve(experiment(), attack_device=asked, task=attrs.evolve(INFORMED, name="no-task"))
    with pytest.raises(ExperimentError, match=f"'{asked}'.*Possible here: auto, cpu.*--device"):
        run(e, plugins=pm)
    with pytest.raises(ExperimentError, match=f"'{asked}'"):
        attack_again(kept, [INFORMED], plugins=pm, device=asked)


def test_auto_is_cuda_where_it_is_there_and_else_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert attack_device("auto") == torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert attack_device("auto") == torch.device("cpu")
    assert attack_device("cpu") == torch.device("cpu")


def test_models_are_there_and_all_else_is_here(kept, pm, there):
    (grade,) = attack_again(
        kept, [AttackSpec("places", {}, "K4")], plugins=pm, isolation="inline", device=there
    )["undefended"]
    models = {name for name, here in grade.budget.items() if not here}
    assert models == {"head", "tail", "body", "model"}
    assert len(grade.budget) == 9


def test_informed_attacks_get_the_grades_there_that_they_get_here(kept, pm, there):
    """The defense's mechanism is a bottleneck that was learned, which the attacker loads."""
    options = {"plugins": pm, "isolation": "inline"}
    here = attack_again(kept, [INFORMED], device="cpu", **options)
    found = attack_again(kept, [INFORMED], device=there, **options)
    for arm in ("undefended", "defended"):
        (grade,), (wanted,) = found[arm], here[arm]
        assert grade.adaptive == wanted.adaptive == (arm == "defended")
        assert grade.attack_performance == pytest.approx(wanted.attack_performance, abs=0.05)


def test_an_adversary_computes_there_too_and_the_result_says_where(pm, there):
    options = {"attacks": [], "adversary": HIJACKING, "defenses": []}
    result = run(experiment(**options, attack_device=there), plugins=pm)
    arm = "active-undefended"
    assert result.cost[arm]["attack_device"] == there
    (grade,) = result.numbers[arm]["attacks"]
    assert grade["budget"]["false_gradients"] > 0


def test_guesses_are_written_from_wherever_they_are(there, tmp_path):
    tokens = torch.arange(6).view(2, 3)
    found = TimedGuess(Guess(tokens=tokens.to(there)), 1.0, Progression())
    write_guess(tmp_path / "guess", found)
    assert torch.equal(read_guess(tmp_path / "guess").guess.tokens, tokens)


def test_an_attack_that_fails_beside_a_device_is_told_what_to_do():
    error = "RuntimeError: Expected all tensors to be on the same device, but found cuda:0 and cpu!"
    assert 'set attack_device = "cpu"' in hint_of("cuda:0", error)
    assert hint_of("cpu", error) == hint_of("cuda:0", "ValueError: no text") == ""
