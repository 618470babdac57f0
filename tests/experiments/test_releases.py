"""Guarantees count what crossed: the count is held against the messages themselves."""

from __future__ import annotations

import math

import attrs
import pytest
import torch

import vflair_attacks
import vflair_defenses
from support.paths import SAMPLE_PLUGIN, TASK_KINDS
from support.small_models import OF_KINDS, ZAMBA2
from vflair_core import Partition, Train, plugin_manager, run, split
from vflair_core.communication.transcript import Transcript
from vflair_core.defenses.defense import Defense
from vflair_core.experiments.base_model import prepare_model
from vflair_core.experiments.config import experiment_from
from vflair_core.offers import find
from vflair_core.tasks.task import Example, Task
from vflair_core.testing import tiny_batch, tiny_model, tiny_tokenizer
from vflair_core.training.evaluation import evaluate_party
from vflair_core.training.fine_tuning import FineTuning
from vflair_defenses.gaussian_noise import GaussianNoise
from vflair_defenses.label_randomised_response import LabelRandomisedResponse

HT, HBT = {"head": 1, "tail": 0}, {"head": 1, "tail": 1}


@pytest.fixture
def pm():
    manager = plugin_manager([SAMPLE_PLUGIN, TASK_KINDS], entry_point_group="vflair.none")
    manager.register(vflair_attacks)
    manager.register(vflair_defenses)
    return manager


def counted(transcript):
    """(rows, messages, gradients) that a transcript shows, a message of several rows of the batch being one of each."""
    sent = [r for r in transcript.messages if r.direction == "sent"]
    smashed = [r.tensor for r in sent if r.role == "smashed"]
    rows = sum(tensor.numel() // tensor.shape[-1] for tensor in smashed)
    batches = [len(tensor) for tensor in smashed]
    return rows, sum(batches), [len(r.tensor) for r in sent if r.role == "hidden_grad"]


def of_one_example(task):
    return attrs.evolve(task, train=list(task.train[:1]), test=list(task.train[:1]))


@pytest.mark.parametrize("cut", [HT, HBT], ids=["HT", "HBT"])
@pytest.mark.parametrize("name", OF_KINDS)
def test_all_that_crosses_of_one_example_is_counted_for_it(pm, name, cut):
    """Training and evaluation of every kind of task, where there is one example only: all that crossed is its."""
    table = {
        "task": {"name": name},
        "model": {"config": OF_KINDS[name], "vocab_size": 320},
        "partition": cut,
    }
    task = of_one_example(find(pm, "tasks", name).load()())
    model, tokenizer, processor = prepare_model(experiment_from(table), task, lambda *_: None)
    party, _ = split(model, Partition(**cut), tokenizer=tokenizer)
    party.take_up(task, processor=processor)
    with party.channel.tap(Transcript()) as transcript:
        rounds = FineTuning(party, Train(steps=2, learning_rate=1e-6))
        for _ in range(2):
            rounds.step(party.preprocessor(24).batch(task.train).batch)
        evaluate_party(party, task, batch_size=2, max_length=40)
    rows, messages, gradients = counted(transcript)
    found = party.releases
    assert found.rows == rows
    assert found.messages == messages
    assert found.gradients == sum(gradients) > 0


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}]
)
@pytest.mark.parametrize("kind", ["llama", "zamba2", "t5"])
def test_every_token_beam_and_tensor_of_a_generation_is_counted(kind, options):
    sizes = {"zamba2": ZAMBA2, "t5": {"num_decoder_layers": 4}}.get(kind, {})
    model = tiny_model(kind, "seq2seq" if kind == "t5" else "causal-lm", **sizes)
    party, _ = split(model, Partition(1, 1))
    with party.channel.tap(Transcript()) as transcript:
        party.model.generate(
            **tiny_batch(model, rows=1), max_new_tokens=4, min_new_tokens=4, **options
        )
    rows, messages, _ = counted(transcript)
    assert (party.releases.rows, party.releases.messages) == (rows, messages)


def test_each_of_several_tensors_of_one_exchange_is_a_release(tmp_path):
    """Zamba 2 sends what the embeddings gave beside the hidden states: twice the rows, and a larger ε."""
    party, _ = split(tiny_model("zamba2", **ZAMBA2), Partition(1, 1))
    batch = tiny_batch(party.model, rows=1, labels="tokens")
    party.model(**batch, use_cache=False)
    width = batch["input_ids"].shape[1]
    assert (party.releases.rows, party.releases.messages) == (2 * width, 2)


def test_rows_of_others_are_not_counted_and_padding_is():
    task = Task(
        "t",
        "causal-lm",
        train=[Example("one"), Example("one two three four")],
        test=[Example("one")],
        public=[],
    )
    tokenizer = tiny_tokenizer(64)
    party, _ = split(tiny_model("llama"), Partition(1, 1), tokenizer=tokenizer)
    batch = party.preprocessor(16).batch(task.train).batch
    party.model(**batch, use_cache=False)
    assert party.releases.rows == batch["input_ids"].shape[1]
    party.model(**party.preprocessor(16).batch(task.train[:1]).batch, use_cache=False)
    alone = len(tokenizer("one")["input_ids"])
    assert party.releases.rows == batch["input_ids"].shape[1] + alone
    assert party.releases.messages == 2


def test_what_is_public_or_bypassed_is_not_counted():
    party, _ = split(
        tiny_model("llama"), Partition(1, 1), defenses=[GaussianNoise(epsilon=8.0, clip=1.0)]
    )
    batch = tiny_batch(party.model, labels="tokens")
    with party.public_text():
        party.model(**batch)
    with party.defenses.bypassing():
        party.model(**batch)
    assert party.releases.rows == 0
    party.model(**batch)
    assert party.releases.rows == batch["input_ids"].shape[1]


class NewWords(Defense):
    """Puts a new word for every word, each time another, as santext does."""

    covers = frozenset({"prompt"})

    def __init__(self):
        self.drawn = 0

    def on_text(self, fields):
        self.drawn += 1
        return dict.fromkeys(fields, f"word{self.drawn} {self.drawn % 7}")


@pytest.mark.parametrize("lengths", [(16, 16), (16, 4), (3, 16)])
def test_an_example_has_one_answer_whatever_is_sent_of_it(pm, lengths):
    """Sixty epochs would name its label otherwise: the identity is the example's, from before any defense."""
    answers = LabelRandomisedResponse(epsilon=0.5)
    tokenizer = tiny_tokenizer(64)
    model = tiny_model("bert", "classification")
    party, _ = split(
        model, Partition(1, 1), tokenizer=tokenizer, defenses=[NewWords(), answers], seed=1
    )
    examples = [Example(f"text number {n}", label=n % 2) for n in range(8)]
    party.take_up(
        Task("t", "classification", train=examples, test=examples, public=[], labels=("a", "b"))
    )
    answers.prepare([], party)
    party.model.train()
    seen = []
    for length in (*lengths, 5):
        for _ in range(3):
            batch = party.preprocessor(length).batch(examples).batch
            party.model(**batch).loss.backward()
            seen.append(tuple(answers._answers.values()))
    assert len(answers._answers) == len(examples)
    assert len(set(seen)) == 1


def test_a_run_states_its_guarantees_for_what_crossed(pm):
    """In the result of an experiment: ε of dp-forward for messages, of gaussian-noise for rows."""
    table = {
        "task": {"name": "words"},
        "model": {"vocab_size": 300, "config": OF_KINDS["colours"]},
        "partition": HBT,
        "train": {"steps": 6, "batch_size": 4, "max_length": 12},
        "victims": {"count": 2, "bypass": 1},
        "isolation": "inline",
        "defenses": [
            {"name": "gaussian-noise", "options": {"noise_multiplier": 5.0, "clip": 1.0}},
            {"name": "dp-forward", "options": {"epsilon": 5.0, "clip": 1.0}},
        ],
        "attacks": [],
    }
    arm = run(experiment_from(table), plugins=pm).numbers["defended"]
    rows, messages = arm["releases_per_example"], arm["messages_per_example"]
    assert rows > messages > 0
    noise, forward = arm["guarantees"]
    assert (noise["releases"], forward["releases"]) == (rows, messages)
    assert math.isfinite(noise["epsilon"])
    assert arm["crossed"]["bypassed"] >= 1
    assert arm["crossed"]["smashed"] > arm["crossed"]["bypassed"]
    assert set(arm["crossed"]) <= {"smashed", "structure", "weight", "disclosed", "bypassed"}


@pytest.mark.filterwarnings("ignore:The model party.s weights are not those:UserWarning")
def test_what_crossed_before_is_still_counted_after_a_resume(tmp_path):
    party, model_party = split(tiny_model("llama"), Partition(1, 1), seed=1)
    model_party.checkpoints = tmp_path / "theirs"
    batch = tiny_batch(party.model, labels="tokens")
    rounds = FineTuning(party, Train(steps=4))
    rounds.step(batch)
    rounds.save(tmp_path / "ours")
    again, _ = split(tiny_model("llama"), Partition(1, 1), channel=party.channel, seed=1)
    later = FineTuning(again, Train(steps=4))
    later.load(tmp_path / "ours")
    later.step(batch)
    assert again.releases == party.releases + party.releases
    assert torch.is_tensor(batch["input_ids"])
