"""An experiment whose model party is in another process, and what it refuses then."""

from __future__ import annotations

import pytest

from support.paths import SAMPLE_PLUGIN
from vflair_core import Adversary, Guess, Partition, hookimpl, plugin_manager, run
from vflair_core.errors import ExperimentError, ProtocolError
from vflair_core.experiments.config import experiment_from
from vflair_core.tasks.tokenizer_training import train_tokenizer
from vflair_core.testing import remote_model_party, tiny_model


class Idle:
    """An active attack that does nothing."""

    def __call__(self, smashed, adversary_state) -> Guess:
        return Guess(tokens=smashed[..., 0].long())

    def adversary(self, partition) -> Adversary:
        return Adversary()


class Offer:
    @hookimpl
    def vflair_attacks(self):
        return {"idles": Idle}


BASE = {
    "task": {"name": "words"},
    "partition": {"head": 1, "tail": 1},
    "train": {"steps": 3, "batch_size": 4, "max_length": 16, "learning_rate": 0.01},
    "victims": {"count": 4, "max_length": 12, "bypass": 2, "queries": 2},
    "isolation": "inline",
}
HEAD_AND_TAIL = {**BASE["train"], "trainable": ["data_party"]}
ATTACK = {"name": "which-weights", "knowledge": "K4"}


@pytest.fixture
def pm():
    manager = plugin_manager([SAMPLE_PLUGIN], entry_point_group="vflair.none")
    manager.register(Offer(), "offer")
    return manager


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with its tokenizer, of a model without dropout."""
    where = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer(["river stone lamp paper cloud engine winter garden"] * 4, 300)
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")
    }
    tiny_model("llama", vocab_size=len(tokenizer), **special).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def frozen(folder):
    """The URL of a model party that trains nothing."""
    with remote_model_party(folder, Partition(1, 1), trains=False) as remote:
        yield remote.url


def small(folder, channel, **changes):
    return experiment_from({**BASE, "model": {"name": str(folder)}, "channel": channel, **changes})


def test_both_arms_find_the_same_as_in_one_process(folder, frozen, pm):
    changes = {"train": HEAD_AND_TAIL, "defenses": [{"name": "shift"}], "attacks": [ATTACK]}
    there = run(small(folder, frozen, check_unsplit=True, **changes), plugins=pm)
    here = run(small(folder, "local:", check_unsplit=True, **changes), plugins=pm)
    assert there.numbers == here.numbers
    assert there.numbers["undefended"]["unsplit_losses_equal"] is True
    for arm in ("undefended", "defended"):
        assert there.numbers[arm]["losses"]
        assert there.cost[arm]["bytes"] == here.cost[arm]["bytes"]


def test_a_wire_dtype_is_in_the_result_and_does_the_same_elsewhere(folder, frozen, pm):
    changes = {"train": HEAD_AND_TAIL, "wire_dtype": "int8"}
    there = run(small(folder, frozen, **changes), plugins=pm).numbers
    here = run(small(folder, "local:", wire=True, **changes), plugins=pm).numbers
    exact = run(small(folder, "local:", train=HEAD_AND_TAIL), plugins=pm).numbers
    assert there == here
    assert there["undefended"]["wire_dtype"] == "int8"
    assert exact["undefended"]["wire_dtype"] == "float32"
    assert there["undefended"]["losses"] != exact["undefended"]["losses"]


def test_a_wire_dtype_without_the_codec_is_refused(folder, pm):
    with pytest.raises(ProtocolError, match="set wire=True"):
        run(small(folder, "local:", wire_dtype="int8"), plugins=pm)


def test_one_arm_may_train_the_model_party_too(folder, pm):
    with remote_model_party(folder, Partition(1, 1)) as remote:
        there = run(small(folder, remote.url, check_unsplit=True), plugins=pm).numbers
        again = "has been trained since it was loaded"
        warned = pytest.warns(UserWarning, match="are not those that were loaded")
        with warned, pytest.raises(ExperimentError, match=again):
            run(small(folder, remote.url), plugins=pm)
    assert there["undefended"]["unsplit_losses_equal"] is True


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"defenses": [{"name": "shift"}]}, "and defenses need more than one arm"),
        ({"attacks": [ATTACK]}, "needs its weights afterwards"),
        ({"save": True}, "save = true would write its half"),
    ],
)
def test_what_needs_the_weights_of_a_model_party_that_is_trained_is_refused(
    folder, pm, changes, words, tmp_path
):
    with (
        remote_model_party(folder, Partition(1, 1)) as remote,
        pytest.raises(ExperimentError, match=words),
    ):
        run(small(folder, remote.url, **changes), plugins=pm, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adversary": {"name": "idles"}}, "takes the model party's place"),
        ({"seeds": [1, 2, 3, 4, 5]}, "each seed needs one that is as it was loaded"),
        ({"devices": ["cpu"]}, "was placed by its operator"),
        ({"pretrain": {"steps": 2}}, "has its weights already"),
    ],
)
def test_what_only_a_model_party_in_this_process_can_do_is_refused(folder, pm, changes, words):
    with pytest.raises(ExperimentError, match=words):
        run(small(folder, "grpc://127.0.0.1:1?plaintext=true", **changes), plugins=pm)


def test_a_model_party_that_trains_others_than_the_experiment_says_is_refused(folder, frozen, pm):
    with pytest.raises(
        ExperimentError, match=r"trains 0 weights, and train.trainable and train.lora say"
    ):
        run(small(folder, frozen), plugins=pm)


def test_a_model_party_with_another_cut_is_refused(folder, frozen, pm):
    cut = {"head": 2, "tail": 1}
    with pytest.raises(ProtocolError, match="head=2 against head=1"):
        run(small(folder, frozen, partition=cut, train=HEAD_AND_TAIL), plugins=pm)
