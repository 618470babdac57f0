"""What a run and a node may say, and what is said to them when they say something else."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr.serverapp", reason="Flower is not installed: nox -s flower")


from vflair_core import ExperimentError
from vflair_flower.options import read_node_options, read_run_options

RUN = {"model": "m"}
NODE = {"data": "d.jsonl", "folder": "f"}


def test_options_have_dashes_and_their_values_types():
    run = read_run_options({**RUN, "batch-size": 3, "learning-rate": 1, "average": True})
    assert (run.batch_size, run.learning_rate, run.average) == (3, 1.0, True)
    assert type(run.learning_rate) is float
    assert read_run_options({**RUN, "partition": "1, 3"}).cut().tail == 3
    assert read_node_options({**NODE, "share-adapters": True}).share_adapters
    assert not read_node_options(NODE).share_adapters


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "Give 'model' in the run config"),
        ({**RUN, "batch-sise": 3}, "no 'batch-sise' in a run config.*Did you mean.*batch-size"),
        ({**RUN, "steps": "ten"}, "steps = 'ten' .* must be a int"),
        ({**RUN, "steps": True}, "steps = True .* must be a int"),
        ({**RUN, "average": 1}, "average = 1 .* must be a bool"),
        ({**RUN, "steps": 0}, "'steps' must be >= 1"),
        ({**RUN, "sharing": "sum"}, "'sharing' must be in"),
        ({**RUN, "partition": "2"}, "partition = '2' is no cut"),
        ({**RUN, "tls-key": "key.pem"}, "tls-certificate, tls-key and tls-ca together"),
    ],
)
def test_a_wrong_run_config_is_refused_in_words(config, words):
    with pytest.raises(ExperimentError, match=words):
        read_run_options(config)


def test_a_wrong_node_config_is_refused_in_words():
    with pytest.raises(ExperimentError, match="Give 'folder' in the node config"):
        read_node_options({"data": "d.jsonl"})
    with pytest.raises(ExperimentError, match="There is no 'file' in a node config"):
        read_node_options({**NODE, "file": "d.jsonl"})


def test_all_rounds_are_one_run_of_the_trainer():
    run = read_run_options({**RUN, "rounds": 3, "steps": 5, "lora-r": 4})
    assert run.train().steps == 15
    assert run.train().lora == run.lora()
    assert run.lora().r == 4
