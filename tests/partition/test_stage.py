"""What may be asked of a stage at a time: compared with every run that its words allow."""

from __future__ import annotations

from itertools import chain, combinations, product

import pytest

from vflair_core.errors import PartitionError
from vflair_core.partition.stages import Stage, stage_of

STAGE = Stage(("a", "b", "c", "d"), ("norm", "head"), frozenset({"b", "d"}))
SHARED = Stage(("a", "a", "a"), ("head",))


def runs_of(stage):
    """Every legal run: the blocks without some optional ones, then a beginning of the rest; or a piece of the rest."""
    subsets = chain.from_iterable(
        combinations(sorted(stage.optional), size) for size in range(len(stage.optional) + 1)
    )
    kept = [tuple(name for name in stage.blocks if name not in out) for out in subsets]
    size = len(stage.rest)
    whole = {blocks + stage.rest[:n] for blocks in kept for n in range(size + 1)}
    pieces = {stage.rest[n:m] for n in range(size) for m in range(n + 1, size + 1)}
    return whole | pieces


@pytest.mark.parametrize("stage", [STAGE, SHARED])
def test_exactly_the_legal_runs_are_allowed(stage):
    words = [*dict.fromkeys(stage.names), "other"]
    tried = {run for size in range(len(stage.names) + 2) for run in product(words, repeat=size)}
    assert {run for run in tried if stage.allows(run)} == runs_of(stage)


@pytest.mark.parametrize("stage", [STAGE, SHARED])
def test_a_run_is_over_when_nothing_can_follow(stage):
    legal = runs_of(stage)
    last = {run for run in legal if not any(other[:-1] == run for other in legal)}
    assert {run for run in legal if stage.ends_with(run)} == last


def test_a_stage_goes_on_until_its_last_block_that_cannot_be_left_out():
    assert STAGE.goes_on_after(("a",))
    assert STAGE.goes_on_after(("a", "b"))
    assert not STAGE.goes_on_after(("a", "b", "c"))
    assert not STAGE.goes_on_after(())
    assert not STAGE.goes_on_after(("b",))


def test_a_run_ends_at_a_pause_where_it_may_end():
    stage = Stage(("a", "b"), ("norm", "head"), pauses=frozenset({"b", "norm"}))
    assert [stage.ends_with(run) for run in [("a",), ("a", "b"), ("norm",), ("head",)]] == [
        False,
        True,
        True,
        True,
    ]
    assert not stage.ends_with(("b",))


def test_no_stage_gives_a_value_from_among_its_blocks():
    assert stage_of(("a", "c"), [SHARED, STAGE]) is STAGE
    with pytest.raises(
        PartitionError, match="needs a value after b, and the model party gives none"
    ):
        stage_of(("a", "b"), [STAGE])
