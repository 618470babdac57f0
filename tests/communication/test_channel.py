"""What crosses is a copy, is counted, and can be watched without changing anything."""

from __future__ import annotations

import gc

import attrs
import pytest
import torch

from vflair_core.communication.channel import LocalChannel, Traffic
from vflair_core.communication.message import Crossing, Message, reply
from vflair_core.communication.transcript import Transcript
from vflair_core.errors import ProtocolError
from vflair_core.testing import tiny_batch


def message(tensor):
    return Message("forward", "s", 0, 1, 1, "eval", (Crossing("hidden_states", "smashed", tensor),))


def reachable_parameters(node):
    """All leaves that the autograd graph above `node` accumulates gradients into."""
    found, seen, todo = [], set(), [node]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo.extend(parent for parent, _ in node.next_functions)
    return found


def hand_count(messages):
    counted = {}
    for record in messages:
        entry = counted.setdefault((record.role, record.direction), Traffic())
        entry.tensors += 1
        entry.bytes += record.tensor.numel() * record.tensor.element_size()
        entry.rows += record.tensor.numel() // record.tensor.shape[-1] if record.tensor.dim() else 1
    return counted


def test_a_reply_has_all_facts_of_its_message_but_tensors_and_meta():
    asked = Message("backward", "s", 3, 5, 7, "train", (), {"keep": True})
    answer = reply(asked, (Crossing("returned", "returned", torch.ones(1)),), {"live": []})
    same = attrs.evolve(asked, tensors=answer.tensors, meta={"live": []})
    assert attrs.asdict(answer, recurse=False) == attrs.asdict(same, recurse=False)


@pytest.mark.parametrize("wire", [False, True], ids=["clones", "wire"])
@pytest.mark.parametrize("tail", [1, 0])
def test_the_graph_of_the_loss_ends_at_the_cut(cut, tail, wire):
    parties = cut("gpt2", 1, tail, wire=wire)
    loss = parties.data_party.model(**tiny_batch(parties.whole, labels="tokens")).loss
    reached = {id(p) for p in reachable_parameters(loss.grad_fn)}
    local = {name: id(p) for name, p in parties.data_party.named_parameters()}
    assert local["transformer.h.0.attn.c_attn.weight"] in reached
    assert not reached & {id(p) for p in parties.model_party.parameters()}


def test_no_reference_leads_from_one_party_to_the_others_tensors_of_an_exchange(cut):
    parties = cut("gpt2", 1, 1)
    out = parties.data_party.model(**tiny_batch(parties.whole, labels="tokens"))
    session = parties.model_party.sessions[parties.data_party.connection.session]
    (graph,) = session.graphs.values()
    saved = [t for end in graph.ends for t in reachable_tensors(end.edge.node)]
    theirs = {tensor.untyped_storage().data_ptr() for tensor in (*graph.inputs, *saved)}
    gc.collect()
    tensors = [t for t in reachable_tensors(out.loss.grad_fn) if t.numel()]
    assert tensors
    assert not theirs & {tensor.untyped_storage().data_ptr() for tensor in tensors}


def reachable_tensors(node):
    """All tensors that the autograd graph above `node` has saved."""
    found, seen, todo = [], set(), [node]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        saved = (getattr(node, name) for name in dir(node) if name.startswith("_saved_"))
        found += [value for value in saved if isinstance(value, torch.Tensor)]
        todo.extend(parent for parent, _ in node.next_functions)
    return found


def test_what_a_tap_sees_and_what_the_model_party_gets_carry_no_graph(cut):
    parties = cut("gpt2", 1, 1)
    handled = []
    handle = parties.data_party.channel._handle
    parties.data_party.channel._handle = lambda m: (handled.append(attrs.evolve(m)), handle(m))[1]
    with parties.data_party.channel.tap(Transcript()) as transcript:
        parties.data_party.model(**tiny_batch(parties.whole, labels="tokens")).loss.backward()
    assert {record.kind for record in transcript.messages} == {"forward", "backward"}
    for tensor in (record.tensor for record in transcript.messages):
        assert not tensor.requires_grad
        assert tensor.grad_fn is None
    # The model party marks its own copies as inputs of its own graph; no history comes with them.
    assert all(crossing.tensor.grad_fn is None for m in handled for crossing in m.tensors)


@pytest.mark.parametrize("wire", [False, True], ids=["clones", "wire"])
def test_writing_in_place_on_one_side_never_shows_on_the_other(wire):
    kept = []

    def handle(request):
        kept.append(request.tensors[0].tensor)
        request.tensors[0].tensor.add_(100)
        answer = torch.ones(2, 3)
        kept.append(answer)
        return message(answer)

    sent = torch.zeros(2, 3)
    reply = LocalChannel(handle, wire=wire).request(message(sent))
    assert torch.equal(sent, torch.zeros(2, 3))
    sent.fill_(7)
    assert torch.equal(kept[0], torch.full((2, 3), 100.0))
    kept[1].fill_(8)
    assert torch.equal(reply.tensors[0].tensor, torch.ones(2, 3))
    reply.tensors[0].tensor.fill_(9)
    assert torch.equal(kept[1], torch.full((2, 3), 8.0))


def test_a_tap_that_zeroes_what_it_sees_changes_nothing(cut):
    def vandal(seen, _direction, _seconds):
        for crossing in seen.tensors:
            crossing.tensor.zero_()

    parties = cut("gpt2", 1, 1)
    batch = tiny_batch(parties.whole, labels="tokens")
    expected = parties.whole(**batch)
    expected.loss.backward()
    with (
        parties.data_party.channel.tap(vandal),
        parties.data_party.channel.tap(Transcript()) as transcript,
    ):
        ours = parties.data_party.model(**batch)
        ours.loss.backward()
    assert torch.equal(ours.logits, expected.logits)
    weights = dict(parties.whole.named_parameters())
    for name, weight in (
        *parties.data_party.named_parameters(),
        *parties.model_party.named_parameters(),
    ):
        assert torch.equal(weight.grad, weights[name].grad)
    assert any(record.tensor.count_nonzero() for record in transcript.messages)


def test_a_tap_sees_nothing_before_or_after_its_block(cut):
    parties = cut()
    batch = tiny_batch(parties.whole)
    parties.data_party.model(**batch)
    with parties.data_party.channel.tap(Transcript()) as transcript:
        pass
    parties.data_party.model(**batch)
    assert transcript.messages == []


def test_a_tap_that_raises_leaves_the_channel_as_it_was(cut):
    parties = cut()
    with pytest.raises(ZeroDivisionError), parties.data_party.channel.tap(lambda *_: 1 / 0):
        parties.data_party.model(**tiny_batch(parties.whole))
    batch = tiny_batch(parties.whole)
    assert torch.equal(parties.data_party.model(**batch).logits, parties.whole(**batch).logits)


def test_a_transcript_says_of_each_tensor_what_it_was(cut):
    parties = cut("gpt2", 1, 1)
    batch = tiny_batch(parties.whole, padding="left", labels="tokens")
    parties.data_party.model.train()
    with parties.data_party.channel.tap(Transcript()) as transcript:
        parties.data_party.model(**batch, use_cache=False).loss.backward()
        parties.data_party.model.eval()
        prompt = {key: batch[key] for key in ("input_ids", "attention_mask")}
        parties.data_party.model.generate(
            **prompt, max_new_tokens=2, min_new_tokens=2, do_sample=False
        )
    facts = [(r.kind, r.direction, r.role, r.name, r.phase, r.step) for r in transcript.messages]
    about = [
        ("sent", "smashed", "hidden_states"),
        ("sent", "structure", "attention_mask"),
        ("received", "returned", "returned"),
    ]
    training = [("forward", *what, "train", 0) for what in about] + [
        ("backward", "sent", "hidden_grad", "hidden_grad", "train", 0),
        ("backward", "received", "smashed_grad", "smashed_grad", "train", 0),
    ]
    prefill, decode = (
        [("forward", *what, phase, 0) for what in about] for phase in ("prefill", "decode")
    )
    assert [fact for fact in facts if fact[3] != "position_ids"] == training + prefill + decode
    exchanges = [record.exchange for record in transcript.messages]
    assert exchanges == sorted(exchanges)
    assert len(set(exchanges)) == 3


def test_a_transcript_is_read_back_as_it_was_saved(cut, tmp_path):
    parties = cut()
    with parties.data_party.channel.tap(Transcript()) as transcript:
        batch = tiny_batch(parties.whole, padding="left", labels="tokens")
        parties.data_party.model(**batch).loss.backward()
    transcript.save(tmp_path / "t.safetensors")
    read = Transcript.load(tmp_path / "t.safetensors")
    assert len(read.messages) == len(transcript.messages) > 0
    for ours, expected in zip(read.messages, transcript.messages, strict=True):
        for name in ("kind", "direction", "role", "name", "phase", "step", "exchange"):
            assert getattr(ours, name) == getattr(expected, name)
        assert ours.tensor.dtype == expected.tensor.dtype
        assert torch.equal(ours.tensor, expected.tensor)


def test_another_safetensors_file_is_refused_as_transcript(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ProtocolError, match="is not a transcript"):
        Transcript.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("wire", [False, True], ids=["clones", "wire"])
def test_traffic_equals_a_count_by_hand(cut, wire):
    parties = cut("gpt2", 1, 1, wire=wire)
    channel = parties.data_party.channel
    before = channel.messages
    with channel.tap(Transcript()) as transcript:
        batch = tiny_batch(parties.whole, rows=3, length=7, labels="tokens")
        parties.data_party.model(**batch, use_cache=False).loss.backward()
    assert channel.messages - before == 2
    one_way = Traffic(tensors=1, bytes=3 * 7 * 16 * 4, rows=3 * 7)  # (B, T, D) float32
    found = {role: traffic for role, traffic in channel.traffic.items() if role[0] != "structure"}
    assert found == {
        ("smashed", "sent"): one_way,
        ("returned", "received"): one_way,
        ("hidden_grad", "sent"): one_way,
        ("smashed_grad", "received"): one_way,
    }
    assert channel.traffic == hand_count(transcript.messages)
    assert channel.seconds > 0


@pytest.mark.parametrize(
    ("compute", "changes_hands"),
    [
        pytest.param(lambda x, w: x * w, True, id="held by nobody else"),
        pytest.param(lambda x, w: torch.tanh(x * w), False, id="saved for the backward"),
        pytest.param(lambda x, w: (x * w)[:, -1:], False, id="a part of something larger"),
        pytest.param(lambda _, w: w, False, id="a weight"),
    ],
)
def test_what_the_model_party_returns_changes_hands_only_if_nobody_else_holds_it(
    compute, changes_hands
):
    weight, where, graph = torch.randn(2, 3, requires_grad=True), [], []

    def handle(request):
        out = compute(request.tensors[0].tensor, weight)
        where.append(out.data_ptr())
        graph.append(out.grad_fn)
        return attrs.evolve(
            request, tensors=(Crossing("returned", "returned", out.detach(), let_go=True),)
        )

    (returned,) = LocalChannel(handle).deliver(message(torch.randn(2, 3))).tensors
    assert (returned.tensor.data_ptr() == where[0]) == changes_hands
