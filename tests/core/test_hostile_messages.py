"""A data party that lies: whatever it sends, the model party names the error and serves the others."""

from __future__ import annotations

import attrs
import pytest
import torch

from vflair_core import codec
from vflair_core.errors import ProtocolError
from vflair_core.message import Crossing
from vflair_core.program import Program
from vflair_core.testing import tiny_batch


@pytest.fixture
def victim(cut):
    """Two halves, the messages of one training step and one cached forward, and what they should give."""
    parties = cut("llama", wire=True)
    parties.batch = tiny_batch(parties.whole, labels="tokens")
    parties.expected = parties.whole(**parties.batch).logits
    parties.said = {}

    def watch(message, direction, _seconds):
        if direction == "sent":
            parties.said.setdefault(message.kind, message)

    with parties.data_party.channel.tap(watch):
        parties.data_party.open()
        parties.data_party.model(**parties.batch, use_cache=True).loss.backward()
    return parties


def forged(victim, kind, *, session="mallory", tensors=None, drop=(), **changes):
    """Repeat the victim's message of this kind in a session of one's own, changed."""
    message = victim.said[kind]
    meta = {key: value for key, value in (dict(message.meta) | changes).items() if key not in drop}
    tensors = message.tensors if tensors is None else tuple(tensors)
    message = attrs.evolve(message, session=session, meta=meta, tensors=tensors)
    return codec.decode(codec.encode(message))  # as the model party would get it


def refused(victim, message, words=None):
    with pytest.raises(ProtocolError, match=words):
        victim.model_party.handle(message)
    assert torch.equal(victim.data_party.model(**victim.batch).logits, victim.expected)
    victim.data_party.model(**victim.batch).loss.backward()


@pytest.fixture
def mallory(victim):
    victim.model_party.handle(forged(victim, "open"))
    return victim


def steps_of(victim, change):
    """The victim's program with its list of steps changed, and the id it has then."""
    steps, leaves, output = codec.decode(codec.encode(victim.said["forward"])).meta["program"]
    program = [change(steps), leaves, output]
    try:
        return {"program": program, "id": Program.from_wire(program).id}
    except (ProtocolError, TypeError, ValueError):
        return {"program": program, "id": "none"}


def test_the_forged_messages_are_answered_as_long_as_nothing_is_changed(mallory):
    ours = mallory.model_party.handle(forged(mallory, "forward")).tensors[0].tensor
    mallory.model_party.handle(forged(mallory, "backward"))
    harmless = after_the_first(op("mul", out(0), ["value", 1.0]))
    changed = forged(mallory, "forward", cache=None, **steps_of(mallory, harmless))
    assert torch.equal(mallory.model_party.handle(changed).tensors[0].tensor, ours)


def test_a_message_of_an_unknown_session_is_refused(victim):
    refused(
        victim,
        forged(victim, "forward", session="nobody"),
        "no session 'nobody': send 'open' first",
    )


def test_a_message_of_another_step_is_refused(mallory):
    message = attrs.evolve(forged(mallory, "forward"), step=4)
    refused(mallory, message, "at step 4, the model party at 0")


def test_a_closed_session_is_closed(mallory):
    mallory.model_party.handle(attrs.evolve(forged(mallory, "open"), kind="close"))
    refused(mallory, forged(mallory, "forward"), "no session 'mallory'")


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
        ({"optimizer": {"name": "sgd", "closure": 1}}, None),
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
    refused(victim, forged(victim, "open", **changes), words)
    assert "mallory" not in victim.model_party.sessions


def test_a_program_that_was_not_registered_is_refused(mallory):
    refused(
        mallory,
        forged(mallory, "forward", id="x", drop=("program",)),
        "Program x was not registered",
    )


def op(name, *args, **kwargs):
    return ["op", name, list(args), [list(pair) for pair in kwargs.items()]]


def out(step, *path):
    return ["out", step, *path]


def after_the_first(*steps):
    """Put operations between the first module (step 0) and the second, which takes the last one's output."""

    def change(program):
        first, second = program
        named = [[key, tree if tree[0] != "out" else out(len(steps))] for key, tree in second[3]]
        return [first, *steps, [*second[:3], named]]

    return change


def with_argument(key, tree):
    return lambda program: [[*program[0][:3], [*program[0][3], [key, tree]]], *program[1:]]


def bomb(program):
    """Outer products of a value with itself: a few steps turn 10 KB into more than can be addressed."""
    grown = [op("getitem", out(0), ["list", *[["value", 0]] * 24])]  # 24 rows out of 3
    for n in (1, 4):
        column, row = ([["value", size] for size in shape] for shape in ([-1, 1], [1, -1]))
        grown += [op("reshape", out(n), *column), op("reshape", out(n + 1), *row)]
        grown += [op("mul", out(n + 2), out(n + 1))]
    return after_the_first(*grown)(program)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda steps: steps[:1], "once each, in order"),
        (lambda steps: [*steps, steps[-1]], "once each, in order"),
        (lambda steps: steps[::-1], "once each, in order"),
        (lambda steps: [["module", "lm_head", [], []], *steps], "once each, in order"),
        (
            lambda steps: [["module", "__class__", *step[2:]] for step in steps],
            "once each, in order",
        ),
        (lambda steps: [], "at least one step"),
        (lambda steps: steps * 3000, "<= 4096 steps"),
        (after_the_first(op("eval", out(0))), "'eval' is not on the list: getitem"),
        (after_the_first(op("__class__", out(0))), "'__class__' is not on the list"),
        (
            after_the_first(op("mul", ["leaf", 0], ["value", 2.0])),
            "does not use the output of the step before",
        ),
        (after_the_first(op("mul", out(0), ["leaf", 99])), None),
        (after_the_first(op("mul", out(0), ["leaf", -1])), "not an argument"),
        (after_the_first(op("mul", out(0), out(7))), None),
        (after_the_first(op("mul", out(0), ["value", "text"])), None),
        (after_the_first(op("mul", out(0))), None),
        (after_the_first(op("mul", out(0), ["object", 1])), "not an argument a program may hold"),
        (after_the_first(op("mul", out(0), nonsense=["value", 1])), None),
        (after_the_first(op("view", out(0), ["value", 7])), None),
        (after_the_first(op("to", out(0), ["value", "meta"])), None),
        (after_the_first(op("getitem", out(0), ["value", 1000])), None),
        (after_the_first(op("getitem", out(0, "key"), ["value", 0])), None),
        (after_the_first(["op", "mul", 3, []]), "A step must be"),
        (after_the_first(["op", "mul", [], [["only-key"]]]), None),
        (after_the_first(["op", "mul", [], [3]]), None),
        (after_the_first(op("mul", out(0), ["dict", ["only-key"]])), None),
        (after_the_first(op("mul", out(0), ["dict", 3])), None),
        (bomb, None),
        (after_the_first(op("getitem", out(0), ["list", *[["value", 0]] * 10**5])), None),
        (with_argument("past_key_values", ["value", "text"]), None),
        (with_argument("nonsense", out(0)), None),
        (with_argument("nonsense", ["value", 1]), None),
        (with_argument("hidden_states", ["value", None]), None),
        (with_argument("hidden_states", ["cache"]), None),
    ],
)
def test_a_program_that_is_not_the_chain_is_refused(mallory, change, words):
    refused(mallory, forged(mallory, "forward", **steps_of(mallory, change)), words)


@pytest.mark.parametrize(
    "program", [None, 3, "steps", [], [1, 2, 3], [[], [], []], [[None], [], []], {}]
)
def test_what_is_no_program_is_refused(mallory, program):
    refused(mallory, forged(mallory, "forward", program=program))


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
    refused(mallory, forged(mallory, "forward", tensors=change(mallory)), words)


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
        {"cache": {"id": "c", "deeds": [], "layers": [["DynamicLayer", None]] * 100_000}},
        {"released_graphs": 3},
        {"released_caches": 3},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_a_forward_with_facts_of_the_wrong_sort_is_refused(mallory, changes):
    refused(mallory, forged(mallory, "forward", **changes))
    session = mallory.model_party.sessions["mallory"]
    assert not session.graphs
    assert not session.caches


@pytest.mark.parametrize("missing", ["id", "grad", "wants", "training"])
def test_a_forward_that_leaves_out_a_fact_is_refused(mallory, missing):
    drop = (missing, "program") if missing == "id" else (missing,)
    refused(mallory, forged(mallory, "forward", drop=drop))


@pytest.mark.parametrize(
    "deed",
    [["reorder", [99]], ["reorder", ["a"]], ["repeat", 10**12], ["repeat", -1], ["select", [0] * 10**5],
     ["crop", 3], ["crop"], [], 3],
    ids=lambda deed: str(deed)[:40],
)  # fmt: skip
def test_a_deed_that_a_cache_cannot_bear_is_refused_and_leaves_it_as_it_was(mallory, deed):
    mallory.model_party.handle(forged(mallory, "forward", grad=False, wants=[]))
    (cache,) = mallory.model_party.sessions["mallory"].caches.values()
    before = [layer.keys.clone() for layer in cache.layers if layer.is_initialized]
    spec = {"id": mallory.said["forward"].meta["cache"]["id"], "deeds": [deed]}
    refused(mallory, forged(mallory, "forward", grad=False, wants=[], cache=spec))
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
    mallory.model_party.handle(forged(mallory, "forward"))
    (crossing,) = mallory.said["backward"].tensors
    crossing = Crossing(
        "hidden_grad", "hidden_grad", tensors(crossing.tensor) if tensors else crossing.tensor
    )
    before = {name: p.grad.clone() for name, p in mallory.model_party.named_parameters()}
    with pytest.raises(ProtocolError, match=words):
        mallory.model_party.handle(forged(mallory, "backward", tensors=[crossing], **changes))
    for name, weight in mallory.model_party.named_parameters():
        assert torch.equal(weight.grad, before[name]), name
    reply = mallory.model_party.handle(forged(mallory, "backward"))
    assert [c.role for c in reply.tensors] == ["smashed_grad"]


@pytest.mark.parametrize("missing", ["outputs", "keep"])
def test_a_backward_that_leaves_out_a_fact_is_refused(mallory, missing):
    mallory.model_party.handle(forged(mallory, "forward"))
    refused(mallory, forged(mallory, "backward", drop=(missing,)))


def test_a_backward_without_its_forward_is_refused(mallory):
    refused(mallory, forged(mallory, "backward"), "has no graph to go back through")


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"skip": False, "scale": "x", "lr": 0.1},
        {"skip": False, "scale": 1.0, "lr": "x"},
        {"skip": False, "scale": 1.0},
    ],
    ids=str,
)
def test_a_commit_without_its_facts_is_refused_and_changes_no_weight(victim, facts):
    optimizer = {"name": "sgd", "lr": 0.1}
    victim.model_party.handle(forged(victim, "open", optimizer=optimizer))
    before = [p.clone() for p in victim.model_party.parameters()]
    commit = attrs.evolve(forged(victim, "open"), kind="commit", meta=facts)
    with pytest.raises(ProtocolError):
        victim.model_party.handle(commit)
    assert all(
        torch.equal(*pair) for pair in zip(before, victim.model_party.parameters(), strict=True)
    )
    assert victim.model_party.sessions["mallory"].step == 0


def test_one_sessions_numbers_reach_no_graph_of_another(mallory):
    loss = mallory.data_party.model(**mallory.batch).loss
    (mine,) = mallory.model_party.sessions[mallory.data_party.session].graphs
    theft = attrs.evolve(forged(mallory, "backward"), exchange=mine)
    with pytest.raises(ProtocolError, match="has no graph"):
        mallory.model_party.handle(theft)
    release = attrs.evolve(
        forged(mallory, "open"), kind="release", meta={"released_graphs": [mine]}
    )
    mallory.model_party.handle(release)
    loss.backward()
