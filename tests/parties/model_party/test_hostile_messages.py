"""A data party that lies: whatever it sends, the model party names the error and serves the others."""

from __future__ import annotations

import attrs
import pytest
import torch

from vflair_core.communication.message import Crossing
from vflair_core.errors import ProtocolError


def test_a_message_of_an_unknown_session_is_refused(victim):
    victim.refused(
        victim.forged("forward", session="nobody"),
        "no session 'nobody': send 'open' first",
    )


def test_a_message_of_another_step_is_refused(mallory):
    message = attrs.evolve(mallory.forged("forward"), step=4)
    mallory.refused(message, "at step 4, the model party at 0")


def test_a_closed_session_is_closed(mallory):
    mallory.model_party.handle(attrs.evolve(mallory.forged("open"), kind="close"))
    mallory.refused(mallory.forged("forward"), "no session 'mallory'")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fingerprint": "0" * 16}, "not hold two halves of the same model"),
        ({"fingerprint": None}, "not hold two halves"),
        ({"optimizer": {"name": "eval"}}, "Optimizer 'eval' is not on the list: sgd"),
        ({"optimizer": {"lr": 0.1}}, None),
        ({"optimizer": 3}, None),
        ({"optimizer": {"name": ["sgd"]}}, None),
        ({"optimizer": {"name": "sgd", "lr": "fast"}}, None),
        ({"optimizer": {"name": "sgd", "closure": 1}}, "has no option closure"),
        ({"optimizer": {"name": "sgd", "params": []}}, "has no option params"),
        (
            {"counterparts": [{"kind": "conv", "options": {}}]},
            "Counterpart 'conv' is not on the list",
        ),
        ({"counterparts": [{}]}, None),
        ({"counterparts": 1}, None),
        (
            {
                "counterparts": [
                    {"kind": "linear", "options": {"in_features": 16, "out_features": 16}}
                ]
            },
            None,
        ),
        (
            {
                "counterparts": [
                    {"kind": "linear", "options": {"in_features": 2**31, "out_features": 2**31}}
                ]
            },
            None,
        ),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else None,
)
def test_an_opening_that_asks_for_too_much_is_refused_and_opens_nothing(victim, changes, words):
    victim.refused(victim.forged("open", **changes), words)
    assert "mallory" not in victim.model_party.sessions


def test_a_program_that_was_not_registered_is_refused(mallory):
    mallory.refused(
        mallory.forged("forward", id="x", drop=("program",)),
        "Program 'x' was not registered",
    )


def leaf(victim, change):
    first, *others = victim.said["forward"].tensors
    return [Crossing(first.name, first.role, change(first.tensor)), *others]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda victim: leaf(victim, torch.Tensor.double), "as float32 of rank 3.*torch.float64"),
        (lambda victim: leaf(victim, torch.Tensor.long), "came as torch.int64"),
        (lambda victim: leaf(victim, lambda t: t[0]), "came as torch.float32 of rank 2"),
        (lambda victim: victim.said["forward"].tensors[1:], "came"),
        (lambda victim: victim.said["forward"].tensors * 2, "came"),
        (lambda victim: victim.said["forward"].tensors[::-1], "The program takes 'hidden_states'"),
        (lambda victim: leaf(victim, lambda t: t[..., :5]), None),
        (lambda victim: leaf(victim, lambda t: t[:0]), None),
        (lambda victim: leaf(victim, lambda t: t[:, :3]), None),
    ],
)
def test_tensors_that_do_not_fit_the_program_are_refused(mallory, change, words):
    mallory.refused(mallory.forged("forward", tensors=change(mallory)), words)


@pytest.mark.parametrize(
    "changes",
    [
        {"wants": [99]},
        {"wants": [-1]},
        {"wants": ["0"]},
        {"wants": 3},
        {"training": "yes"},
        {"training": None},
        {"autocast": "eval"},
        {"autocast": 3},
        {"id": ["x"]},
        {"cache": {}},
        {"cache": 3},
        {"cache": {"id": "c", "deeds": []}},
        {"cache": {"id": ["c"], "deeds": [], "layers": []}},
        {"cache": {"id": "c", "deeds": 3, "layers": [["DynamicLayer", None]] * 4}},
        {"cache": {"id": "c", "deeds": [["eval", 1]], "layers": [["DynamicLayer", None]] * 4}},
        {"cache": {"id": "c", "deeds": [], "layers": [["StaticLayer", None]] * 4}},
        {"cache": {"id": "c", "deeds": [], "layers": []}},
        {"cache": {"id": "c", "deeds": [], "layers": [["DynamicLayer", None]] * 10_000}},
        {"released_graphs": 3},
        {"released_caches": 3},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_a_forward_with_facts_of_the_wrong_sort_is_refused(mallory, changes):
    mallory.refused(mallory.forged("forward", **changes))
    session = mallory.model_party.sessions["mallory"]
    assert not session.graphs
    assert not len(session.caches)


@pytest.mark.parametrize("missing", ["id", "grad", "wants", "training"])
def test_a_forward_that_leaves_out_a_fact_is_refused(mallory, missing):
    drop = (missing, "program") if missing == "id" else (missing,)
    mallory.refused(mallory.forged("forward", drop=drop))


@pytest.mark.parametrize(
    "deed",
    [["reorder", [99]], ["reorder", ["a"]], ["repeat", 10**12], ["repeat", -1], ["select", [0] * 10**5],
     ["crop", 3], ["crop"], [], 3],
    ids=lambda deed: str(deed)[:40],
)  # fmt: skip
def test_a_deed_that_a_cache_cannot_bear_is_refused_and_leaves_it_as_it_was(mallory, deed):
    mallory.model_party.handle(mallory.forged("forward", grad=False, wants=[]))
    (cache,) = mallory.model_party.sessions["mallory"].caches
    before = [layer.keys.clone() for layer in cache.layers if layer.is_initialized]
    spec = {"id": mallory.said["forward"].meta["cache"]["id"], "deeds": [deed]}
    mallory.refused(mallory.forged("forward", grad=False, wants=[], cache=spec))
    after = [layer.keys for layer in cache.layers if layer.is_initialized]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("changes", "tensors", "words"),
    [
        ({"outputs": [1]}, None, None),
        ({"outputs": [-2]}, None, None),
        ({"outputs": ["0"]}, None, None),
        ({"outputs": 3}, None, None),
        ({"outputs": []}, None, None),
        ({"outputs": [0, 0]}, None, None),
        ({}, lambda t: t[:1], "A gradient of shape"),
        ({}, torch.Tensor.double, None),
        ({}, torch.Tensor.long, None),
    ],
)
def test_a_gradient_that_does_not_fit_is_refused_and_can_be_sent_again(
    mallory, changes, tensors, words
):
    mallory.model_party.handle(mallory.forged("forward"))
    (crossing,) = mallory.said["backward"].tensors
    crossing = Crossing(
        "hidden_grad", "hidden_grad", tensors(crossing.tensor) if tensors else crossing.tensor
    )
    before = {name: p.grad.clone() for name, p in mallory.model_party.named_parameters()}
    with pytest.raises(ProtocolError, match=words):
        mallory.model_party.handle(mallory.forged("backward", tensors=[crossing], **changes))
    for name, weight in mallory.model_party.named_parameters():
        assert torch.equal(weight.grad, before[name]), name
    reply = mallory.model_party.handle(mallory.forged("backward"))
    assert [c.role for c in reply.tensors] == ["smashed_grad"]


@pytest.mark.parametrize("missing", ["outputs", "keep", "accumulate"])
def test_a_backward_that_leaves_out_a_fact_is_refused(mallory, missing):
    mallory.model_party.handle(mallory.forged("forward"))
    mallory.refused(mallory.forged("backward", drop=(missing,)))


def test_a_backward_without_its_forward_is_refused(mallory):
    mallory.refused(mallory.forged("backward"), "has no graph to go back through")


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"skip": False, "scale": "x", "lr": 0.1},
        {"skip": False, "scale": 1.0, "lr": "x"},
        {"skip": False, "scale": 1.0},
        {"skip": 0, "scale": 1.0, "lr": 0.1},
        {"skip": False, "scale": 1.0, "lr": float("nan")},
        {"skip": False, "scale": float("inf"), "lr": 0.1},
        {"skip": False, "scale": -1.0, "lr": 0.1},
    ],
    ids=str,
)
def test_a_commit_without_its_facts_is_refused_and_changes_no_weight(victim, facts):
    optimizer = {"name": "sgd", "lr": 0.1}
    victim.model_party.handle(victim.forged("open", optimizer=optimizer))
    before = [p.clone() for p in victim.model_party.parameters()]
    commit = attrs.evolve(victim.forged("open"), kind="commit", meta=facts)
    with pytest.raises(ProtocolError):
        victim.model_party.handle(commit)
    assert all(
        torch.equal(*pair) for pair in zip(before, victim.model_party.parameters(), strict=True)
    )
    assert victim.model_party.sessions["mallory"].step == 0


def test_another_sessions_gradients_are_neither_shown_nor_used(mallory):
    """Mallory trains; what the victim's backward left on the weights is not hers to report or to step with."""
    mallory.data_party.model(**mallory.batch).loss.backward()
    optimizer = {"name": "sgd", "lr": 0.1}
    mallory.model_party.handle(mallory.forged("open", optimizer=optimizer, nonce="again"))
    norms = attrs.evolve(mallory.forged("open"), kind="norms", meta={}, tensors=())
    assert mallory.model_party.handle(norms).meta["names"] == []
    before = [p.clone() for p in mallory.model_party.parameters()]
    facts = {"skip": False, "scale": None, "lr": 0.1}
    mallory.model_party.handle(attrs.evolve(norms, kind="commit", meta=facts, seq=norms.seq + 1))
    assert all(map(torch.equal, before, mallory.model_party.parameters()))
    mine = mallory.model_party.sessions[mallory.data_party.connection.session]
    mallory.model_party.shared.show(mine)
    assert all(p.grad is not None for p in mallory.model_party.parameters())


def test_one_sessions_numbers_reach_no_graph_of_another(mallory):
    loss = mallory.data_party.model(**mallory.batch).loss
    (mine,) = mallory.model_party.sessions[mallory.data_party.connection.session].graphs
    theft = attrs.evolve(mallory.forged("backward"), exchange=mine)
    with pytest.raises(ProtocolError, match="has no graph"):
        mallory.model_party.handle(theft)
    release = attrs.evolve(mallory.forged("open"), kind="release", meta={"released_graphs": [mine]})
    mallory.model_party.handle(release)
    loss.backward()
