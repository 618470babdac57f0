"""A checkpoint that is damaged, or of something else, is refused whole: both parties are as they were before."""

from __future__ import annotations

import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from vflair_core import Defense, FineTuning, Partition, Train, split
from vflair_core.errors import CheckpointError, VflairError
from vflair_core.partition.checkpoint import KEY, read_part, write_part
from vflair_core.testing import tiny_batch, tiny_model

BATCH = tiny_batch(tiny_model("gpt2"), labels="tokens")


class Counting(Defense):
    """Counts its steps, and scales by a weight that is trained."""

    def __init__(self):
        self.weight = torch.nn.Parameter(torch.ones(16))
        self.seen = torch.zeros(1)

    def on_smashed(self, smashed, exchange):
        return smashed * self.weight + 0.01 * torch.randn(
            smashed.shape, generator=exchange.generator
        )

    def after_step(self):
        self.seen = self.seen + 1

    def parameters(self):
        return [self.weight]

    def state(self):
        return {"seen": self.seen}

    def load_state(self, state):
        self.seen = state["seen"]


def start(folder, **how):
    data_party, model_party = split(
        tiny_model("gpt2"), Partition(1, 1), defenses=[Counting()], seed=3, wire=True
    )
    model_party.checkpoints = folder / "model"
    run = FineTuning(data_party, Train(steps=9, learning_rate=0.01, **how))
    run.model_party = model_party
    return run


@pytest.fixture
def saved(tmp_path):
    """A run that saved its second step, and what its third lost; and another process that will go on with it."""
    run = start(tmp_path)
    for _ in range(2):
        run.step(BATCH)
    run.save(tmp_path / "data")
    expected = run.step(BATCH)
    (data,) = (tmp_path / "data").glob("step-*/data_party.safetensors")
    (model,) = (tmp_path / "model").glob("run-*/step-*/model_party.safetensors")
    return SimpleNamespace(
        folder=tmp_path, data=data, model=model, expected=expected, again=start(tmp_path)
    )


def state_of(run):
    tensors = [*run.party.parameters(), *run.model_party.parameters(), torch.get_rng_state()]
    for defense in run.party.defenses.each:
        tensors += [
            defense.weight,
            defense.seen,
            run.party.defenses.generator_of(defense).get_state(),
        ]
    for optimizer in (run.optimizer, run.model_party.shared.optimizer):
        kept = optimizer.state_dict()["state"]
        tensors += [value for each in kept.values() for value in each.values()]
    facts = run.party.step, run.party.exchanges, run.party.connection.session
    return facts, dict(run.model_party.steps), [tensor.detach().clone() for tensor in tensors]


def refused(saved, words=None):
    """Going on is refused, and all of both parties is as it was."""
    before = state_of(saved.again)
    with pytest.raises(VflairError, match=words) as error:
        saved.again.load(saved.folder / "data")
    after = state_of(saved.again)
    assert after[:2] == before[:2]
    assert len(after[2]) == len(before[2])
    assert all(map(torch.equal, after[2], before[2]))
    return str(error.value)


def goes_on(saved):
    assert saved.again.load(saved.folder / "data") == 2
    assert saved.again.step(BATCH) == saved.expected


@pytest.mark.parametrize("side", ["data", "model"])
def test_damage_anywhere_is_refused_and_the_whole_one_is_taken_up_after_it(saved, side):
    path = getattr(saved, side)
    raw, chosen = path.read_bytes(), random.Random(side)
    header = 8 + int.from_bytes(raw[:8], "little")
    places = [chosen.randrange(header) for _ in range(20)]
    places += [chosen.randrange(header, len(raw)) for _ in range(20)]
    for place in places:
        damaged = bytearray(raw)
        damaged[place] ^= 1 << chosen.randrange(8)
        path.write_bytes(damaged)
        said = refused(saved)
        assert side == "data" or str(saved.folder) not in said
    for length in (0, 7, header - 1, header, len(raw) - 1):
        path.write_bytes(raw[:length])
        said = refused(saved, "cannot be read|is damaged|not a party's part")
        assert side == "data" or (
            str(saved.folder) not in said and "step-00000002/model_party.safetensors" in said
        )
    path.write_bytes(raw)
    goes_on(saved)


def test_parts_of_different_runs_in_each_others_place_are_refused(saved):
    other = start(saved.folder)
    for _ in range(2):
        other.step(BATCH)
    other.save(saved.folder / "other")
    (theirs,) = (
        p
        for p in (saved.folder / "model").glob("run-*/step-*/model_party.safetensors")
        if p != saved.model
    )
    mine = saved.model.read_bytes()
    saved.model.write_bytes(theirs.read_bytes())
    other.party.close()
    said = refused(saved, "of another run or step")
    assert str(saved.folder) not in said
    saved.model.write_bytes(mine)
    goes_on(saved)


def test_parts_of_different_steps_in_each_others_place_are_refused(saved):
    saved.model.parent.with_name("step-00000005").mkdir()
    shutil.copy(saved.model, saved.model.parent.with_name("step-00000005"))
    saved.data.parent.with_name("step-00000005").mkdir()
    shutil.copy(saved.data, saved.data.parent.with_name("step-00000005"))
    refused(saved, "is of step 2: the files are in each other's place")


@pytest.mark.parametrize("side", ["data", "model"])
def test_the_parts_of_the_two_parties_in_each_others_place_are_refused(saved, side):
    source, target = (saved.model, saved.data) if side == "data" else (saved.data, saved.model)
    raw = target.read_bytes()
    target.write_bytes(source.read_bytes())
    refused(saved, "each other's place|several runs")
    target.write_bytes(raw)
    goes_on(saved)


def first(tensors, prefix):
    return next(name for name in tensors if name.startswith(prefix))


CHANGES = {
    "a weight of another type": lambda t: t.update({first(t, "tr"): t[first(t, "tr")].double()}),
    "a weight of another shape": lambda t: t.update({first(t, "tr"): torch.ones(2)}),
    "a weight more": lambda t: t.update({"more": torch.ones(2)}),
    "a weight less": lambda t: t.pop(first(t, "tr")),
    "moments of another shape": lambda t: t.update({"optimizer/0/exp_avg": torch.ones(2)}),
    "moments of no weight": lambda t: t.update({"optimizer/999/exp_avg": torch.ones(2)}),
    "moments without a number": lambda t: t.update({"optimizer/x/exp_avg": torch.ones(2)}),
    "moments that are missing": lambda t: t.pop("optimizer/0/exp_avg"),
    "moments of whole numbers": lambda t: t.update(
        {"optimizer/0/exp_avg": t["optimizer/0/exp_avg"].long()}
    ),
    "an unknown moment": lambda t: t.update({"optimizer/0/other": t["optimizer/0/exp_avg"]}),
    "a step of nothing": lambda t: t.update({"optimizer/0/step": torch.tensor(-1.0)}),
    "no random state": lambda t: t.pop("random/cpu"),
    "a random state of zeros": lambda t: t.update({"random/cpu": torch.zeros(16)}),
}
DATA_CHANGES = {
    "no state of a defense's noise": lambda t: t.pop("random/defense.0"),
    "a state of noise that is none": lambda t: t.update({"random/defense.0": torch.ones(3)}),
    "no state of a defense": lambda t: t.pop("defense/0/state/seen"),
    "no weight of a defense": lambda t: t.pop("defense/0/weight/0"),
    "a weight of a defense of another shape": lambda t: t.update(
        {"defense/0/weight/0": torch.ones(1, 16)}
    ),
    "counts that are none": lambda t: t.update({"releases/keys": torch.ones(3)}),
}
CASES = [(side, name, change) for side in ("data", "model") for name, change in CHANGES.items()]
CASES += [("data", name, change) for name, change in DATA_CHANGES.items()]


def test_a_part_that_is_whole_and_does_not_fit_is_refused_whatever_does_not(saved):
    for side, name, change in CASES:
        path = getattr(saved, side)
        raw = path.read_bytes()
        facts, tensors = read_part(path)
        change(tensors)
        write_part(path, tensors, facts)
        said = refused(saved, "safetensors")
        assert side == "data" or str(saved.folder) not in said, name
        path.write_bytes(raw)
    goes_on(saved)


@pytest.mark.parametrize(
    ("side", "changes", "words"),
    [
        ("data", {"exchanges": -1}, "exchanges -1"),
        ("data", {"session": 3}, "do not say whose part of which run"),
        ("data", {"party": None}, "do not say whose part of which run"),
        ("model", {"steps": 3}, "do not say whose part of which run"),
        ("model", {"steps": {"a": "b"}}, "do not say whose part of which run"),
        ("model", {"step": None}, "says step None: no whole number"),
        ("model", {"step": 5}, "of another run or step"),
        ("model", {"optimizer": "SGD"}, "saved with the optimizer SGD"),
        ("model", {"fingerprint": "x"}, "of another model or cut"),
    ],
)
def test_facts_that_do_not_fit_are_refused(saved, side, changes, words):
    path = getattr(saved, side)
    facts, tensors = read_part(path)
    write_part(path, tensors, {**facts, **changes})
    refused(saved, words)


def test_a_checkpoint_of_an_older_version_is_taken_up_with_a_warning(saved):
    from safetensors.torch import save_file

    for path in (saved.data, saved.model):
        facts, tensors = read_part(path)
        older = {key: value for key, value in facts.items() if key not in ("digest", "run")}
        save_file(tensors, path, metadata={KEY: json.dumps(older)})
        with safe_open(path, framework="pt") as file:
            assert set(file.metadata()) == {KEY}
    with pytest.warns(UserWarning, match="has no digest") as told:
        goes_on(saved)
    assert not any(
        str(saved.folder) in str(w.message) for w in told if "model_party" in str(w.message)
    )


def test_a_save_that_the_disk_refuses_leaves_the_step_before(saved, monkeypatch):
    run = saved.again
    run.load(saved.folder / "data")
    run.step(BATCH)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    before = sorted(p.relative_to(saved.folder) for p in saved.folder.rglob("*"))
    with monkeypatch.context() as patched:
        patched.setattr("vflair_core.partition.checkpoint.save_file", full)
        with pytest.raises(CheckpointError, match="No space left") as error:
            run.save(saved.folder / "data")
    assert str(saved.folder) not in str(error.value)  # the model party writes first
    assert sorted(p.relative_to(saved.folder) for p in saved.folder.rglob("*")) == before
    run.save(saved.folder / "data")
    later = start(saved.folder)
    assert later.load(saved.folder / "data") == 3
