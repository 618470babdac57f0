"""Over gRPC with wire dtype float32 everything is, bit for bit, what it is in one process."""

from __future__ import annotations

import copy

import pytest
import torch

from vflair_core import FineTuning, Partition, Train, Transcript, connect, split
from vflair_core.testing import remote_model_party, tiny_batch, tiny_model

CUTS = [pytest.param(1, 1, id="HBT"), pytest.param(1, 0, id="HT")]
TRAIN = Train(steps=2, learning_rate=0.01, clip=0.5)


def remote(model, partition, serving, connected, **options):
    """A data party whose model party is behind a server in this process."""
    _, model_party = split(copy.deepcopy(model), partition)
    server = serving(model_party.handle)
    channel = connected(server.port, **options)
    data_party, _ = split(copy.deepcopy(model), partition, channel=channel)
    return data_party, model_party


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(("head", "tail"), CUTS)
def test_inference(kind, head, tail, serving, connected):
    model = tiny_model(kind)
    data_party, _ = remote(model, Partition(head, tail), serving, connected)
    batch = tiny_batch(model, padding="left")
    assert torch.equal(data_party.model(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(("head", "tail"), CUTS)
def test_generation_with_a_cache(head, tail, serving, connected):
    model = tiny_model("llama")
    data_party, _ = remote(model, Partition(head, tail), serving, connected)
    batch = tiny_batch(model, padding="left")
    how = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(data_party.model.generate(**batch, **how), model.generate(**batch, **how))


@pytest.mark.parametrize(("head", "tail"), CUTS)
def test_training_steps(head, tail, serving, connected):
    model = tiny_model("llama")  # without dropout, which each session draws for itself
    partition = Partition(head, tail)
    ours = remote(model, partition, serving, connected)
    theirs = split(copy.deepcopy(model), partition)
    batches = [tiny_batch(model, labels="tokens", seed=n) for n in range(2)]
    losses = []
    for data_party, _ in (ours, theirs):
        torch.manual_seed(3)
        rounds = FineTuning(data_party, TRAIN)
        losses.append([rounds.step(batch) for batch in batches])
    assert losses[0] == losses[1]
    for one, other in zip(ours, theirs, strict=True):
        expected = dict(other.named_parameters())
        assert all(torch.equal(weight, expected[name]) for name, weight in one.named_parameters())


@pytest.mark.parametrize(("head", "tail"), CUTS)
def test_with_the_model_party_in_a_process_of_its_own(head, tail):
    model = tiny_model("llama")  # without dropout
    partition = Partition(head, tail)
    here, _ = split(copy.deepcopy(model), partition)
    batches = [tiny_batch(model, labels="tokens", seed=n) for n in range(2)]
    prompt = tiny_batch(model, padding="left")
    how = {"max_new_tokens": 4, "do_sample": False}
    found = []
    with (
        remote_model_party(model, partition) as remote,
        connect(remote.url, timeout=60) as channel,
    ):
        there, _ = split(copy.deepcopy(model), partition, channel=channel)
        for data_party in (there, here):
            generated = data_party.model.generate(**prompt, **how)
            torch.manual_seed(3)
            rounds = FineTuning(data_party, TRAIN)
            found.append((generated.tolist(), [rounds.step(batch) for batch in batches]))
    assert found[0] == found[1]


def test_a_message_of_many_pieces_arrives_whole(serving, connected):
    from vflair_core.communication.message import Crossing, Message, reply

    large = torch.randn(3, 1000, 999)  # 12 MB, and no multiple of a piece
    server = serving(
        lambda m: reply(m, tuple(Crossing("back", "returned", c.tensor * 2) for c in m.tensors))
    )
    channel = connected(server.port)
    opened = channel.request(Message("open", "asked", 0, 0, 1))
    sent = (Crossing("a", "smashed", large), Crossing("b", "smashed", large[:1, :2]))
    answer = channel.request(Message("forward", opened.session, 0, 1, 2, tensors=sent))
    assert torch.equal(answer.tensors[0].tensor, large * 2)
    assert torch.equal(answer.tensors[1].tensor, large[:1, :2] * 2)


def test_two_clients_have_a_session_each(serving, connected):
    model = tiny_model("gpt2")
    _, model_party = split(copy.deepcopy(model), Partition(1, 1))
    server = serving(model_party.handle)
    parties = [
        split(copy.deepcopy(model), Partition(1, 1), channel=connected(server.port))[0]
        for _ in range(2)
    ]
    names = {party.connection.session for party in parties}
    assert len(names) == 2
    assert names < set(model_party.sessions)  # beside that of `split`
    assert server.streams == 2
    for number, party in enumerate(parties):
        batch = tiny_batch(model, seed=number)
        assert torch.equal(party.model(**batch).logits, model(**batch).logits)


def test_a_url_is_a_channel(serving):
    model = tiny_model("gpt2")
    _, model_party = split(copy.deepcopy(model), Partition(1, 1))
    url = f"grpc://127.0.0.1:{serving(model_party.handle).port}?plaintext=true&timeout=20"
    data_party, _ = split(copy.deepcopy(model), Partition(1, 1), channel=url)
    batch = tiny_batch(model)
    assert torch.equal(data_party.model(**batch).logits, model(**batch).logits)
    data_party.channel.close()


def test_a_transcript_and_the_counts_are_those_of_one_process(serving, connected):
    model = tiny_model("gpt2")
    ours, _ = remote(model, Partition(1, 1), serving, connected)
    theirs, _ = split(copy.deepcopy(model), Partition(1, 1))
    batch = tiny_batch(model, labels="tokens")
    seen = []
    for party in (ours, theirs):
        with party.channel.tap(Transcript()) as transcript:
            party.model(**batch).loss.backward()
        seen.append(transcript.messages)
    assert ours.channel.traffic == theirs.channel.traffic
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("wire_dtype", ["bfloat16", "int8"])
def test_a_wire_dtype_does_the_same_with_a_server_as_without(wire_dtype, serving, connected):
    from vflair_core import LocalChannel

    model = tiny_model("gpt2")
    ours, _ = remote(model, Partition(1, 1), serving, connected, wire_dtype=wire_dtype)
    _, model_party = split(copy.deepcopy(model), Partition(1, 1))
    channel = LocalChannel(model_party.handle, wire=True, wire_dtype=wire_dtype)
    theirs, _ = split(copy.deepcopy(model), Partition(1, 1), channel=channel)
    batch = tiny_batch(model, labels="tokens")
    for party in (ours, theirs):
        party.model(**batch).loss.backward()
    expected = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        assert torch.equal(weight.grad, expected[name].grad)
    assert ours.channel.traffic == theirs.channel.traffic
