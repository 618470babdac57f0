"""The search for the strongest setting that keeps enough utility, against what trying all settings finds."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.studies.tuning import Knob, Search, target_of


def searched(performance, trials, target=0.5):
    search = Search(target, trials)
    while (strength := search.following) is not None:
        search = attrs.evolve(search, tried=(*search.tried, (strength, performance(strength))))
    return search


@given(limit=st.floats(0.0, 0.999), trials=st.integers(3, 12))
def test_the_strongest_setting_is_found_to_within_the_last_halving(limit, trials):
    search = searched(lambda strength: 1.0 if strength <= limit else 0.0, trials)
    assert len(search.tried) == trials
    assert search.best <= limit < search.best + 0.5 ** (trials - 2)


def test_ends_come_first_and_end_the_search_when_they_tell_all():
    assert searched(lambda _: 0.0, 6).tried == ((0.0, 0.0),)
    assert searched(lambda _: 0.0, 6).best is None
    everything = searched(lambda _: 1.0, 6)
    assert [strength for strength, _ in everything.tried] == [0.0, 1.0]
    assert everything.best == 1.0


def test_where_utility_does_not_fall_evenly_what_was_found_did_keep_enough():
    """Between two settings that keep enough one may not: the best is one that was tried and reaches the target."""
    bumpy = {0.0: 1.0, 1.0: 0.0, 0.5: 0.2, 0.25: 0.9, 0.375: 0.6, 0.4375: 0.1}
    search = searched(bumpy.__getitem__, 6)
    assert search.best == 0.375
    assert dict(search.tried)[search.best] >= search.target


@pytest.mark.parametrize(
    ("scale", "weak", "strong", "middle"),
    [("log", 1e4, 1, 100.0), ("linear", 0, 10, 5.0), ("log of the rest", 0.9, 0.999, 0.99)],
)
def test_a_knob_goes_in_even_steps_of_its_scale(scale, weak, strong, middle):
    knob = Knob("k", weak, strong, scale)
    assert knob.value(0.0) == pytest.approx(weak)
    assert knob.value(1.0) == pytest.approx(strong)
    assert knob.value(0.5) == pytest.approx(middle)
    assert type(attrs.evolve(knob, whole=True).value(0.5)) is int


def test_the_option_is_set_in_the_defense_that_has_it():
    e = experiment_from(
        {
            "task": {"name": "words"},
            "model": {"name": "m"},
            "defenses": [{"name": "a"}, {"name": "b", "options": {"x": 1, "y": 2}}],
        }
    )
    tuned = Knob("y", 1, 100, defense=1).apply(e, 0.5)
    assert tuned.defenses[0] == e.defenses[0]
    assert tuned.defenses[1].options == {"x": 1, "y": pytest.approx(10)}


def test_what_is_kept_is_a_share_of_what_is_above_chance():
    assert target_of({"chance": 0.2, "main_performance": 0.7}, 0.9) == pytest.approx(0.65)
