"""A program that is not the chain of held modules, or hides something costly, is not run."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from vflair_core import Partition, split
from vflair_core.communication import codec
from vflair_core.communication.cache_kinds import cache_argument
from vflair_core.communication.program import Program
from vflair_core.errors import ProtocolError
from vflair_core.testing import tiny_batch, tiny_model

CACHE = cache_argument(GPT2Block)


def steps_of(victim, change):
    """The victim's program with its list of steps changed, and the id it has then."""
    steps, leaves, store = codec.decode(codec.encode(victim.said["forward"])).meta["program"]
    program = [change(steps), leaves, store]
    try:
        return {"program": program, "id": Program.from_wire(program).id}
    except (ProtocolError, TypeError, ValueError):
        return {"program": program, "id": "none"}


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


def test_the_forged_messages_are_answered_as_long_as_nothing_is_changed(mallory):
    ours = mallory.model_party.handle(mallory.forged("forward")).tensors[0].tensor
    mallory.model_party.handle(mallory.forged("backward"))
    harmless = after_the_first(op("mul", out(0), ["value", 1.0]))
    changed = mallory.forged("forward", cache=None, **steps_of(mallory, harmless))
    assert torch.equal(mallory.model_party.handle(changed).tensors[0].tensor, ours)


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
        (lambda steps: steps[:1], "all in order"),
        (lambda steps: [*steps, steps[-1]], "all in order"),
        (lambda steps: steps[::-1], "all in order"),
        (lambda steps: [["module", "lm_head", [], []], *steps], "all in order"),
        (
            lambda steps: [["module", "__class__", *step[2:]] for step in steps],
            "all in order",
        ),
        (lambda steps: [], "at least one step"),
        (lambda steps: steps * 3000, "<= 4096 steps"),
        (after_the_first(op("eval", out(0))), "'eval' is not on the list: getitem"),
        (after_the_first(op("__class__", out(0))), "'__class__' is not on the list"),
        (
            after_the_first(op("mul", ["leaf", 0], ["value", 2.0])),
            "does not use the output of a step before",
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
        (with_argument(CACHE, ["value", "text"]), None),
        (with_argument("nonsense", out(0)), None),
        (with_argument("nonsense", ["value", 1]), None),
        (with_argument("hidden_states", ["value", None]), None),
        (with_argument("hidden_states", ["cache"]), None),
    ],
)
def test_a_program_that_is_not_the_chain_is_refused(mallory, change, words):
    mallory.refused(mallory.forged("forward", **steps_of(mallory, change)), words)


def test_a_block_cannot_be_skipped_by_an_operation_that_reaches_back():
    data_party, model_party = split(tiny_model("llama", num_hidden_layers=5), Partition(1, 1))
    with data_party.channel.tap(lambda m, d, _: sent.append(m) if d == "sent" else None):
        sent = []
        data_party.model(**tiny_batch(data_party.model), use_cache=False)
    first, second, third = Program.from_wire(sent[0].meta["program"]).steps
    leaves = Program.from_wire(sent[0].meta["program"]).leaves
    back = ("op", "mul", (("out", 0), ("value", 1.0)), ())
    fed = tuple((key, ("out", 2) if tree[0] == "out" else tree) for key, tree in third[3])
    with pytest.raises(ProtocolError, match="does not use the output of the block before"):
        model_party.held[0].check(Program((first, second, back, (*third[:3], fed)), leaves))
    through = ("op", "mul", (("out", 1), ("value", 1.0)), ())
    model_party.held[0].check(Program((first, second, through, (*third[:3], fed)), leaves))


@pytest.mark.parametrize(
    "program", [None, 3, "steps", [], [1, 2, 3], [[], [], []], [[None], [], False], {}]
)
def test_what_is_no_program_is_refused(mallory, program):
    mallory.refused(mallory.forged("forward", program=program))


HALF = ["value", 0.5]


def test_a_sum_of_a_value_and_itself_is_run(mallory):
    """Adding twice one half of a value to nothing else gives the value: the same answer as without."""
    ours = mallory.model_party.handle(mallory.forged("forward")).tensors[0].tensor
    halves = after_the_first(op("mul", out(0), HALF), op("add", out(1), out(1)))
    changed = mallory.forged("forward", cache=None, **steps_of(mallory, halves))
    assert torch.equal(mallory.model_party.handle(changed).tensors[0].tensor, ours)


def row_by_column(name):
    """A column of the hidden states, and a row of them, whose sum or product is a square."""
    column, row = op("getitem", out(0), ["value", 0]), op("getitem", out(0), ["value", 0])
    column = [
        *column[:2],
        [out(0), ["tuple", ["value", 0], ["slice", None, None, None], ["slice", 0, 1, None]]],
        [],
    ]
    row = [
        *row[:2],
        [out(0), ["tuple", ["value", 0], ["slice", 0, 1, None], ["slice", None, None, None]]],
        [],
    ]
    return after_the_first(column, row, op(name, out(1), out(2)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (row_by_column("mul"), "takes a second tensor that fits the first"),
        (row_by_column("add"), "takes a second tensor that fits the first"),
        (after_the_first(op("add", ["leaf", 0], ["leaf", 0])), "does not use the output"),
        (after_the_first(op("add", out(0), out(0), out(0))), "one tensor, then numbers"),
        (after_the_first(op("div", out(0), out(0))), "one tensor, then numbers"),
        (after_the_first(op("add", out(0), out(0), alpha=out(0))), "one tensor, then numbers"),
        (after_the_first(op("add", out(0), out(0), out=out(0))), "one tensor, then numbers"),
        (after_the_first(op("add", out(0), ["cache"])), "one tensor, then numbers"),
    ],
)
def test_two_tensors_that_do_not_fit_or_more_of_them_are_refused(mallory, change, words):
    mallory.refused(mallory.forged("forward", **steps_of(mallory, change)), words)
