"""What a message may cost is known and under the operator's limits before memory or time is taken."""

from __future__ import annotations

import resource

import attrs
import pytest
import torch

from vflair_core import Partition, split
from vflair_core.communication.message import Crossing
from vflair_core.communication.program import Program
from vflair_core.errors import ProtocolError
from vflair_core.parties.model_party.caps import Caps
from vflair_core.testing import tiny_batch, tiny_model

MEBIBYTE = 2**20


def op(name, *args, **kwargs):
    return ["op", name, list(args), [list(pair) for pair in kwargs.items()]]


def with_operations(victim, *operations, **changes):
    """The victim's forward with operations between its two modules; the second takes what the last one gives."""
    steps, leaves, store = victim.said["forward"].meta["program"]
    first, second = steps
    named = [
        [key, tree if tree[0] != "out" else ["out", len(operations)]] for key, tree in second[3]
    ]
    program = [[first, *operations, [*second[:3], named]], leaves, store]
    try:
        name = Program.from_wire(program).id
    except ProtocolError:
        name = "none"
    return victim.forged("forward", program=program, id=name, cache=None, **changes)


@pytest.fixture
def lean():
    """Fails a test in which the process grew by more than 64 MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024, f"{grown} KiB"


def test_a_cache_layer_has_the_options_that_the_model_has(mallory, lean):
    layers = [["LinearAttentionLayer", {"number_of_states": 2**31 - 1}]] * 4
    cache = {"id": "c", "deeds": [], "parts": [["DynamicCache", layers]]}
    mallory.refused(mallory.forged("forward", cache=cache), "number_of_states=2147483647 is none")
    layers = [["DynamicSlidingWindowLayer", {"sliding_window": 7}]] * 4
    cache = {"id": "c", "deeds": [], "parts": [["DynamicCache", layers]]}
    mallory.refused(
        mallory.forged("forward", cache=cache), "sliding_window=7 is none.*Possible: none"
    )


def test_a_cache_has_as_many_layers_as_those_of_the_model(mallory):
    layers = [["DynamicLayer", {}]] * 5
    cache = {"id": "c", "deeds": [], "parts": [["DynamicCache", layers]]}
    mallory.refused(mallory.forged("forward", cache=cache), "of 5 layers does not fit.*have 4")


@pytest.mark.parametrize(
    ("kind", "window"), [("mistral", {"sliding_window": 5}), ("gemma2", {"sliding_window": 4})]
)
def test_the_window_of_the_model_itself_is_taken(cut, kind, window):
    parties = cut(kind, model=tiny_model(kind, num_key_value_heads=1, **window))
    batch = tiny_batch(parties.whole)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    both = [m.generate(**batch, **options) for m in (parties.whole, parties.data_party.model)]
    assert torch.equal(*both)


@pytest.mark.parametrize(
    "options",
    [
        {"in_features": 2**15, "out_features": 2**15, "bias": False, "device": "cpu"},
        {"in_features": 2**15, "out_features": 2**15, "bias": False},
        {"in_features": 16, "out_features": 2**15, "bias": True},
        {"in_features": 16.0, "out_features": 16, "bias": False},
    ],
    ids=str,
)
def test_a_counterpart_is_of_the_weights_that_came(victim, options, lean):
    weights = [Crossing("0.weight", "counterpart", torch.zeros(16, 8))]
    counterparts = [{"kind": "linear", "options": options}]
    message = victim.forged("open", counterparts=counterparts, tensors=weights)
    victim.refused(message, "counterpart 'linear'|has the options")
    assert "mallory" not in victim.model_party.sessions


def test_rows_of_a_cache_are_counted_before_they_are_made(mallory, lean):
    mallory.model_party.handle(mallory.forged("forward", grad=False, wants=[]))
    spec = {"id": mallory.said["forward"].meta["cache"]["id"]}
    many = [[0, "repeat", 60]] * 4
    mallory.refused(
        mallory.forged("forward", grad=False, wants=[], cache=spec | {"deeds": many}),
        "would give this cache .* rows; a cache may have 4096",
    )
    copies = [[0, "select", [0] * 5000]]
    mallory.refused(
        mallory.forged("forward", grad=False, wants=[], cache=spec | {"deeds": copies}),
        "5000 rows",
    )
    deeds = [[0, "reorder", [0]]] * 1025
    mallory.refused(
        mallory.forged("forward", grad=False, wants=[], cache=spec | {"deeds": deeds}),
        "1025 deeds came",
    )


def test_the_bytes_of_all_caches_are_limited(mallory):
    mallory.model_party.handle(mallory.forged("forward", grad=False, wants=[]))
    session = mallory.model_party.sessions["mallory"]
    (cache,) = session.caches
    held = sum(
        layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None
    )
    assert session.caches.nbytes == held
    everything = sum(s.caches.nbytes for s in mallory.model_party.sessions.values())
    mallory.model_party.caps.cache_bytes = everything + 1
    other = {**mallory.said["forward"].meta["cache"], "id": "other"}
    message = mallory.forged("forward", grad=False, wants=[], cache=other)
    with pytest.raises(ProtocolError, match="cache_bytes"):
        mallory.model_party.handle(message)
    assert len(session.caches) == 1
    mallory.model_party.caps.cache_bytes = 2**30
    mallory.model_party.handle(message)


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        (op("getitem", ["out", 0], ["tuple", ["tuple", *[["value", 0]] * 1000]]), "holds no tuple"),
        (op("getitem", ["out", 0], ["tuple", ["ellipsis"], ["ellipsis"]]), "parts came"),
        (op("getitem", ["out", 0], ["tuple", *[["value", 0]] * 4]), "parts came"),
        (op("getitem", ["out", 0], ["tuple", ["value", True]]), "An index is"),
        (op("split", ["out", 0], ["value", 0]), "cannot be split"),
        (op("split", ["out", 0], ["value", 1], ["value", 9]), "cannot be split along"),
        (op("split", ["out", 0], ["tuple", *[["value", 0]] * 300]), "256 pieces at most"),
    ],
    ids=["nested", "two ellipses", "too many", "mask", "no pieces", "no dimension", "pieces"],
)  # fmt: skip
def test_an_operation_that_could_grow_what_it_takes_is_refused(mallory, operation, words):
    mallory.refused(with_operations(mallory, operation), words)


def test_positions_after_an_ellipsis_are_of_the_dimension_they_stand_for(mallory):
    """The leaf of positions is told apart from those of another dimension, which may be larger."""
    steps, leaves, store = mallory.said["forward"].meta["program"]
    hidden = mallory.said["forward"].tensors[0].tensor
    positions = Crossing("positions", "structure", torch.tensor([hidden.shape[-1] - 1]))
    index = ["tuple", ["ellipsis"], ["leaf", len(leaves)], ["slice", None, None, None]]
    program = [
        [[*steps[0]], op("getitem", ["out", 0], index), [*steps[1][:3], steps[1][3]]],
        [*leaves, ["positions", "int64", 1]],
        store,
    ]
    message = mallory.forged(
        "forward", program=program, id="none", cache=None,
        tensors=[*mallory.said["forward"].tensors, positions],
    )  # fmt: skip
    with pytest.raises(ProtocolError, match=r"Positions are picked|was not registered"):
        mallory.model_party.handle(message)


def test_outputs_are_let_go_of_after_their_last_use(mallory, lean):
    """A hundred copies of sixteen times the size, one after the other: only one is held at a time."""
    wide = op("to", ["out", 0], ["dtype", "complex128"])
    back = [op("to", ["out", n], ["dtype", "complex128"]) for n in range(1, 100)]
    message = with_operations(mallory, wide, *back, grad=False, wants=[])
    hidden = mallory.said["forward"].tensors[0].tensor
    mallory.model_party.caps.step_bytes = hidden.numel() * 16 * 3
    with pytest.raises(
        ProtocolError
    ) as refused:  # the block takes no complex numbers; all steps before it ran
        mallory.model_party.handle(message)
    assert "'to' of step" not in str(refused.value)
    mallory.model_party.caps.step_bytes = hidden.numel() * 16
    with pytest.raises(ProtocolError, match="step_bytes"):
        mallory.model_party.handle(message)


def test_a_view_holds_what_it_is_a_view_of(mallory):
    """Wide copies of which only views are used later are held all the same."""
    hidden = mallory.said["forward"].tensors[0].tensor
    mallory.model_party.caps.step_bytes = hidden.numel() * 8 * 5
    steps = []
    for _ in range(20):
        steps += [
            op("to", ["out", 0], ["dtype", "float64"]),
            op("transpose", ["out", len(steps) + 1], ["value", 0], ["value", 1]),
        ]
    sums = [op("add", ["out", 2], ["out", 4])]
    sums += [op("add", ["out", len(steps) + n], ["out", 4 + 2 * n]) for n in range(1, 19)]
    with pytest.raises(ProtocolError, match="step_bytes"):
        mallory.model_party.handle(with_operations(mallory, *steps, *sums, grad=False, wants=[]))


def test_operations_are_few_beside_the_calls_of_modules(mallory):
    many = [op("mul", ["out", n], ["value", 1.0]) for n in range(64 * 3 + 1)]
    mallory.refused(with_operations(mallory, *many), "193 operations came for 2 calls")


@pytest.mark.parametrize(
    ("limit", "value", "words"),
    [
        ("graphs", 1, "1 forwards wait"),
        ("graph_bytes", 1, "its limit graph_bytes"),
        ("positions", 2, "its limit positions"),
    ],
)
def test_forwards_are_limited(mallory, limit, value, words):
    mallory.model_party.handle(mallory.forged("forward"))
    mallory.model_party.caps.changed(limit, value)
    message = mallory.forged("forward")
    with pytest.raises(ProtocolError, match=words):
        mallory.model_party.handle(message)
    setattr(mallory.model_party.caps, limit, getattr(Caps(), limit))
    mallory.model_party.handle(message)


def test_sessions_and_their_names_are_limited(victim):
    victim.refused(victim.forged("open", session="x" * 129), "may have 128 characters, not 129")
    victim.model_party.caps.sessions = 2
    victim.model_party.handle(victim.forged("open", session="second"))
    victim.refused(victim.forged("open", session="third"), "has 2 sessions, as many as it allows")
    victim.model_party.handle(attrs.evolve(victim.forged("open", session="second"), kind="close"))
    victim.model_party.handle(victim.forged("open", session="third"))


def test_checkpoints_on_disk_are_limited(tmp_path):
    from vflair_core.training.fine_tuning import FineTuning, Train

    model = tiny_model("gpt2")
    batch = tiny_batch(model, labels="tokens")
    data_party, model_party = split(model, Partition(1, 1))
    model_party.checkpoints = tmp_path / "theirs"
    model_party.caps.saved_steps = 2
    tuning = FineTuning(data_party, Train(steps=3, optimizer="sgd"))
    for _ in range(2):
        tuning.step(batch)
        tuning.save(tmp_path / "ours")
    tuning.step(batch)
    with pytest.raises(ProtocolError, match="keeps 2 checkpoints of a run"):
        tuning.save(tmp_path / "ours")
    model_party.caps.saved_steps, model_party.caps.saved_bytes = 9, 1000
    with pytest.raises(ProtocolError, match="and 1000 are allowed"):
        tuning.save(tmp_path / "ours")
    model_party.caps.saved_bytes = 2**30
    tuning.save(tmp_path / "ours")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("sesions", 3, "no limit 'sesions'. Did you mean 'sessions'"), ("graphs", 0, "must be a whole number >= 1")],
)  # fmt: skip
def test_limits_are_checked_when_they_are_set(name, value, words):
    caps = Caps()
    with pytest.raises(ProtocolError, match=words):
        caps.changed(name, value)


def test_what_torch_says_stays_with_the_model_party(mallory, caplog):
    leaf, *others = mallory.said["forward"].tensors
    narrow = Crossing(leaf.name, leaf.role, leaf.tensor[..., :5].contiguous())
    with pytest.raises(ProtocolError) as refused:
        mallory.model_party.handle(mallory.forged("forward", tensors=[narrow, *others]))
    assert len(str(refused.value)) < 500
    assert "/" not in str(refused.value)
    assert "Traceback" in caplog.text
    assert "message_failed kind=forward" in caplog.text


def test_a_thousand_steps_are_checked_in_one_go(mallory):
    """Each step is looked at once: a program of 4,090 steps takes no longer than ten of 409."""
    first, second = mallory.said["forward"].meta["program"][0]
    chain = [op("mul", ["out", n], ["value", 1.0]) for n in range(4000)]
    message = with_operations(mallory, *chain)
    assert first[0] == second[0] == "module"
    mallory.refused(message, "operations came for 2 calls")


@pytest.mark.parametrize(("own", "limit"), [(64, 4096), (8192, 8192)])
def test_a_row_has_as_many_positions_as_the_model_knows(own, limit):
    _, model_party = split(tiny_model("llama", max_position_embeddings=own), Partition(1, 1))
    assert model_party.caps.positions == limit


def test_a_model_that_does_not_say_has_the_common_limit():
    assert Caps.fitted(torch.device("cpu")).positions == 2**17
