"""A run that was stopped goes on as if it had not been, and only from what fits."""

from __future__ import annotations

import importlib.util
import random
import shutil
import subprocess
import sys
import time

import pytest
import torch

from support.paths import KILLED_RUN
from vflair_core import Defense, Partition, split
from vflair_core.errors import CheckpointError, ProtocolError
from vflair_core.testing import tiny_batch, tiny_model
from vflair_core.training.fine_tuning import FineTuning, Train, train_unsplit


@pytest.fixture(scope="module")
def killed():
    spec = importlib.util.spec_from_file_location("killed", KILLED_RUN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Learned(Defense):
    """Adds noise of its own stream through a weight that is trained with the model."""

    def __init__(self):
        self.weight = torch.nn.Parameter(torch.ones(16))
        self.seen = torch.zeros(1)

    def on_smashed(self, smashed, exchange):
        noise = torch.randn(smashed.shape, generator=exchange.generator)
        return smashed * self.weight + 0.1 * noise * (1 + self.seen)

    def after_step(self):
        self.seen = self.seen + 0.1

    def parameters(self):
        return [self.weight]

    def state(self):
        return {"seen": self.seen}

    def load_state(self, state):
        self.seen = state["seen"]


@pytest.fixture
def start(tmp_path):
    """A factory of runs that keep checkpoints in one place: start(seed=..., ...) → FineTuning."""

    def make(
        kind="gpt2",
        partition=None,
        *,
        seed=0,
        optimizer="adamw",
        noise=None,
        folder=tmp_path,
        **how,
    ):
        data_party, model_party = split(
            tiny_model(kind, seed=seed), partition or Partition(1, 1), seed=noise, **how
        )
        model_party.checkpoints = folder / "model"
        made = FineTuning(data_party, Train(steps=9, learning_rate=0.01, optimizer=optimizer))
        made.model_party = model_party
        return made

    return make


def batch(number):
    return tiny_batch(tiny_model("gpt2"), labels="tokens", seed=number)


def test_a_run_killed_at_any_moment_goes_on_to_the_losses_of_one_that_was_not(killed, tmp_path):
    chosen = random.Random(time.time_ns())
    losses, kills = {}, 0
    while len(losses) < killed.STEPS:
        run = subprocess.Popen(
            [sys.executable, KILLED_RUN, tmp_path], stdout=subprocess.PIPE, text=True
        )
        patience = chosen.randint(1, 6) if kills < 2 else killed.STEPS
        for line in run.stdout:
            step, loss = line.split()
            assert losses.setdefault(int(step), loss) == loss, "a step was repeated otherwise"
            patience -= 1
            if not patience:
                time.sleep(chosen.uniform(0, 0.02))
                run.kill()
                kills += 1
        run.wait()
        run.stdout.close()
    whole = killed.model()
    torch.manual_seed(4)
    expected = train_unsplit(whole, killed.batches(), killed.OPTIONS)
    assert [float.fromhex(losses[step]) for step in range(killed.STEPS)] == expected
    assert kills >= 2


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("tail", [1, 0], ids=["HBT", "HT"])
def test_losses_after_a_restart_equal_those_without_one(start, tmp_path, optimizer, tail):
    how = {"partition": Partition(1, tail), "optimizer": optimizer, "wire": True}
    torch.manual_seed(1)
    run = start(**how)
    expected = [run.step(batch(n)) for n in range(3)]
    run.save(tmp_path / "data")
    expected += [run.step(batch(n)) for n in range(3, 6)]
    torch.manual_seed(99)
    again = start(**how)
    assert again.load(tmp_path / "data") == again.party.step == 3
    assert [again.step(batch(n)) for n in range(3, 6)] == expected[3:]
    assert len(set(expected)) == 6


def test_noise_and_what_a_defense_learned_go_on_too(start, tmp_path):
    run = start(defenses=[Learned()], noise=5)
    for n in range(3):
        run.step(batch(n))
    run.save(tmp_path / "data")
    expected = [run.step(batch(n)) for n in range(3, 6)]
    defense = Learned()
    again = start(defenses=[defense], noise=77)
    again.load(tmp_path / "data")
    assert [again.step(batch(n)) for n in range(3, 6)] == expected
    assert defense.seen.item() == pytest.approx(0.6)


def test_the_last_step_that_both_parties_hold_counts(start, tmp_path):
    run = start()
    losses = []
    for n in range(4):
        losses.append(run.step(batch(n)))
        run.save(tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "step-00000004")  # killed before the data party wrote
    (stored,) = (tmp_path / "model").iterdir()
    shutil.rmtree(stored / "step-00000003")  # lost by the model party
    unfinished = tmp_path / "data" / "step-00000009" / "data_party.part"
    unfinished.parent.mkdir()
    unfinished.write_bytes(b"half of one")
    again = start()
    assert again.load(tmp_path / "data") == 2
    assert [again.step(batch(n)) for n in (2, 3)] == losses[2:]


def test_going_back_in_the_same_process_repeats_the_same_steps(start, tmp_path):
    run = start()
    run.step(batch(0))
    run.save(tmp_path / "data")
    expected = [run.step(batch(n)) for n in (1, 2)]
    assert run.load(tmp_path / "data") == 1
    assert [run.step(batch(n)) for n in (1, 2)] == expected
    assert len(run.model_party.sessions) == 1


def test_each_part_holds_its_owners_weights_only(start, tmp_path):
    from safetensors import safe_open

    run = start()
    run.step(batch(0))
    run.save(tmp_path / "data")
    owners = {"data_party": run.party, "model_party": run.model_party}
    for name, owner in owners.items():
        (path,) = tmp_path.rglob(f"{name}.safetensors")
        with safe_open(path, "pt") as file:
            weights = {key for key in file.keys() if "/" not in key}  # noqa: SIM118
        assert weights == dict(owner.named_parameters()).keys()


def test_a_folder_without_checkpoints_is_refused(start, tmp_path):
    with pytest.raises(CheckpointError, match=r"There is no checkpoint in .*FineTuning\.save"):
        start().load(tmp_path / "nothing")


def test_steps_that_only_one_party_holds_are_listed(start, tmp_path):
    run = start()
    run.step(batch(0))
    run.save(tmp_path / "data")
    shutil.rmtree(tmp_path / "model")
    again = start()
    with pytest.raises(ProtocolError, match="data party has 1, the model party none"):
        again.load(tmp_path / "data")
    assert again.step(batch(0)) > 0  # the session it had goes on


def test_a_model_party_without_a_folder_says_who_can_give_it_one(start, tmp_path):
    run = start()
    run.model_party.checkpoints = None
    with pytest.raises(ProtocolError, match=r"operator allows it: model_party\.checkpoints"):
        run.save(tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"seed": 1}, "weights=sample:.* against weights=sample:"),
        ({"partition": Partition(1, 2)}, "tail=1 against tail=2 now"),
        ({"optimizer": "sgd"}, "with the optimizer AdamW, and now it is SGD"),
    ],
    ids=["weights", "cut", "optimizer"],
)
def test_a_checkpoint_of_something_else_is_refused_by_name(start, tmp_path, other, words):
    run = start()
    run.step(batch(0))
    run.save(tmp_path / "data")
    again = start(**other)
    before = [p.clone() for p in [*again.party.parameters(), *again.model_party.parameters()]]
    with pytest.raises(CheckpointError, match=words):
        again.load(tmp_path / "data")
    now = [*again.party.parameters(), *again.model_party.parameters()]
    assert all(map(torch.equal, before, now))


def test_two_runs_do_not_share_a_folder(start, tmp_path):
    run = start()
    run.step(batch(0))
    run.save(tmp_path / "data")
    with pytest.raises(CheckpointError, match="holds checkpoints of another run"):
        start().save(tmp_path / "data")


def test_nobody_goes_back_while_another_data_party_trains(start, tmp_path):
    run = start()
    run.step(batch(0))
    run.save(tmp_path / "data")
    run.model_party.sessions["other"] = type(
        run.model_party.sessions[run.party.connection.session]
    )(run.model_party.caps, trains=True, step=3)
    with pytest.raises(ProtocolError, match="Another data party trains these weights"):
        run.load(tmp_path / "data")


def test_the_name_of_a_session_never_becomes_a_path(start, tmp_path):
    run = start()
    line = run.party.connection
    line.session = "../../outside"
    line.open(optimizer=run.options.optimizer_spec())
    line.request("save")
    assert [path.name[:4] for path in (tmp_path / "model").iterdir()] == ["run-"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
