"""What an arm cost: counted to the byte, the message and the token, and measured without changing a number."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch

from support.paths import SAMPLE_PLUGIN, TASK_KINDS
from support.small_models import BERT, LLAMA
from vflair_core import hookimpl, plugin_manager, run
from vflair_core.communication.channel import LocalChannel
from vflair_core.communication.message import Message, reply
from vflair_core.experiments import arm as arms
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.costs import Spent, convergence, metered, peak_memory, tokens_in
from vflair_core.testing import tiny_batch
from vflair_core.training.fine_tuning import FineTuning, Train

BASE = {
    "task": {"name": "words"},
    "model": {"config": LLAMA, "vocab_size": 300},
    "partition": {"head": 1, "tail": 1},
    "train": {"steps": 6, "batch_size": 4, "max_length": 16, "learning_rate": 0.01},
    "victims": {"count": 4, "max_length": 12, "bypass": 2, "companions": 0},
    "isolation": "inline",
}


@pytest.fixture
def pm():
    return plugin_manager([SAMPLE_PLUGIN, TASK_KINDS], entry_point_group="vflair.none")


def cost_of(pm, **changes):
    return run(experiment_from({**BASE, **changes}), plugins=pm).cost["undefended"]


def test_a_run_counts_its_messages_as_by_hand(pm):
    cost = cost_of(pm)
    # Six steps, two evaluations of one batch, four victims in training rounds that are skipped.
    by_kind = {"open": 2, "forward": 6 + 2 + 4, "backward": 6 + 4, "norms": 6, "commit": 6 + 4}
    assert cost["messages_by_kind"] == by_kind
    assert cost["messages"] == sum(by_kind.values())
    carried = {role: n for role, n in cost["messages_by_role"].items() if "structure" not in role}
    assert carried == {
        "smashed sent": 12,
        "returned received": 12,
        "hidden_grad sent": 10,
        "smashed_grad received": 10,
        "norms received": 6,
    }


def test_bytes_messages_and_tokens_of_one_step_are_those_of_its_shapes(cut):
    parties = cut("gpt2", 1, 1)
    rounds = FineTuning(parties.data_party, Train(steps=1))
    channel, before = parties.data_party.channel, Counter(parties.data_party.channel.by_kind)
    with metered(parties.data_party, parties.model_party) as meter:
        batch = tiny_batch(parties.whole, rows=3, length=7, padding="right", labels="tokens")
        with meter("steps"):
            rounds.step(batch)
        assert meter.phases["steps"].tokens == 7 + 6 + 5  # each row is shorter by one
        held = meter.held
    states = 3 * 7 * 16 * 4  # B T D, four bytes each
    for role in (("smashed", "sent"), ("returned", "received")):
        assert channel.traffic[role].bytes == states
    assert channel.traffic["hidden_grad", "sent"].bytes == states
    assert channel.traffic["smashed_grad", "received"].bytes == states
    assert channel.by_kind - before == {"forward": 1, "backward": 1, "norms": 1, "commit": 1}
    whole = sum(p.numel() for p in parties.whole.parameters())
    assert held["data_party"] + held["model_party"] == whole


def test_tokens_of_a_generation_are_those_that_are_read_anew(cut):
    parties = cut("gpt2", 1, 1)
    prompt = tiny_batch(parties.whole, rows=2, length=5, padding="left")
    with metered(parties.data_party, parties.model_party) as meter:
        parties.data_party.model.generate(
            **prompt, do_sample=False, max_new_tokens=4, min_new_tokens=4
        )
    # Five and four of the prompts; then three of the four new ones, the last of which is not read.
    assert meter.tokens == 5 + 4 + 2 * 3
    parties.data_party.model(input_ids=prompt["input_ids"])
    assert meter.tokens == 5 + 4 + 2 * 3  # nothing is counted afterwards


def test_tokens_are_counted_without_a_mask_and_where_only_an_answer_is_read():
    ids = torch.ones(2, 3, dtype=torch.long)
    assert tokens_in({"input_ids": ids}) == 6
    assert tokens_in({"decoder_input_ids": ids[:, :1], "attention_mask": torch.ones(2, 3)}) == 2
    assert tokens_in({"inputs_embeds": torch.ones(2, 3, 4)}) == 0


def test_seconds_are_told_apart_by_party(cut, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    parties = cut("gpt2", 1, 1)

    def handle(message):
        now[0] += 5.0
        return reply(message)

    class Slow(LocalChannel):
        def deliver(self, message):
            now[0] += 2.0
            return super().deliver(message)

    parties.data_party.channel = Slow(handle)
    with metered(parties.data_party, parties.model_party) as meter, meter("victims"):
        now[0] += 1.0
        parties.data_party.channel.request(Message("facts", "s", 0, 0, 1))
    assert meter.phases["victims"] == Spent(seconds=8.0, waited=7.0, handled=5.0)
    assert meter.phases["victims"].by_party == {
        "data_party": 1.0,
        "channel": 2.0,
        "model_party": 5.0,
    }


def test_of_a_model_party_elsewhere_only_the_waiting_is_known():
    spent = Spent(seconds=8.0, waited=7.0, handled=None) + Spent()
    assert spent.by_party == {"data_party": 1.0, "channel": 7.0, "model_party": None}


def test_measuring_changes_no_number_and_no_message_that_is_told(pm, monkeypatch):
    heard = Counter()

    class Listening:
        @hookimpl
        def vflair_message_sent(self, arm, role):
            heard[arm, role] += 1

    pm.register(Listening())
    dropout = {**LLAMA, "attention_dropout": 0.3}
    table = {
        **BASE,
        "model": {"config": dropout, "vocab_size": 300},
        "defenses": [{"name": "shift"}],
        "attacks": [{"name": "first-row", "knowledge": "K1"}],
    }
    e, before = experiment_from(table), torch.get_rng_state()
    measured, once = run(e, plugins=pm), Counter(heard)
    assert measured.cost["defended"]["first_token"]["of"] == "generation"
    heard.clear()
    monkeypatch.setattr(arms, "first_token", lambda *_: None)
    bare = run(e, plugins=pm)
    assert measured.numbers_hash == bare.numbers_hash
    assert once == heard
    assert torch.equal(torch.get_rng_state(), before)
    for arm in ("undefended", "defended"):
        for count in ("messages", "bytes", "rows", "tokens"):
            assert measured.cost[arm][count] == bare.cost[arm][count]


def test_a_run_says_how_fast_how_large_and_when_it_had_converged(pm):
    cost = cost_of(pm, train={**BASE["train"], "steps": 4, "evaluate_every": 1})
    assert set(cost["party_seconds"]) == {"preparing", "fine-tuning", "steps", "victims"}
    assert set(cost["seconds"]) == {"preparing", "fine-tuning", "victims", "attacks"}
    for name, parts in cost["party_seconds"].items():
        assert all(part >= 0 for part in parts.values())
        if name in cost["seconds"]:
            assert sum(parts.values()) == pytest.approx(cost["seconds"][name])
    assert cost["first_token"]["prompt_tokens"] == 8  # half of train.max_length
    for phase in ("fine-tuning", "victims"):
        assert cost["tokens_per_second"][phase] > 0
    # Words of six tokens and more are cut to 12; four victims of full length cross once.
    assert cost["tokens"]["victims"] <= 4 * 12
    held = cost["parameters"]
    assert held["data_party"]["held"] >= held["data_party"]["trained"] > 0
    assert held["defenses"] == {"trained": 0}
    assert cost["peak_memory"]["cpu"] > 2**20


def test_of_a_model_that_writes_nothing_a_forward_is_timed(pm):
    table = {"task": {"name": "two-words"}, "model": {"config": BERT, "vocab_size": 300}}
    found = cost_of(pm, **table)["first_token"]
    assert found["of"] == "forward"
    assert "no model that writes" in found["why"]


def evaluations(*losses):
    return [{"step": 2 * n, "metrics": {"loss": loss}} for n, loss in enumerate(losses)]


def test_it_converged_at_the_first_evaluation_that_is_nearly_the_best():
    found = convergence(
        [3.0] * 6, evaluations(4.0, 2.01, 2.5, 2.0), [1.0] * 6, 4, evaluated=True, within=0.01
    )
    assert found == {"step": 2, "epoch": 0.5, "seconds": 2.0, "of": "held-out loss", "within": 0.01}
    stricter = convergence(
        [3.0] * 6, evaluations(4.0, 2.01, 2.5, 2.0), [1.0] * 6, 4, evaluated=True, within=0.001
    )
    assert stricter is None  # the best is the last: it was still going down


def test_without_evaluations_it_converged_when_the_mean_of_an_epoch_is_nearly_the_best():
    losses = [4.0, 4.0, 2.0, 2.0, 2.0, 2.0]  # means of two steps: 4, 3, 2, 2, 2
    found = convergence(losses, evaluations(4.0, 2.0), [0.5] * 6, 2, evaluated=False)
    assert found["step"] == 4
    assert found["epoch"] == 2.0
    assert found["seconds"] == 2.0
    assert convergence(losses, [], [0.5] * 6, 7, evaluated=False) is None  # no whole epoch
    assert convergence([], [], [], 7, evaluated=False) is None


def test_peak_memory_names_each_cuda_device(monkeypatch):
    assert set(peak_memory()) == {"cpu"}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10 + device)
    found = peak_memory()
    assert (found["cuda:0"], found["cuda:1"]) == (10, 11)


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_loss_that_is_not_finite_never_converged(evaluated):
    losses = [3.0, float("nan"), float("nan")]
    rows = evaluations(*losses)
    assert convergence(losses, rows, [1.0] * 3, 1, evaluated=evaluated) is None
