"""The strongest attack per preset, defenses that nothing adaptive attacked, and several seeds."""

from __future__ import annotations

import pytest

import vflair_defenses
from support.paths import SAMPLE_PLUGIN
from support.small_models import LLAMA
from vflair_attacks import vflair_attacks as offered
from vflair_core import AttackError, hookimpl, plugin_manager, run
from vflair_core.cli.terminal import show_result
from vflair_core.errors import ExperimentError
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.grading.pooling import paired_over_cells
from vflair_core.experiments.grading.ranking import evaluated, strongest


def grade(attack, knowledge, performance, *, development=None, **facts) -> Grade:
    rest = {"interval": (0.0, 1.0), "floor": 0.1, "floors": {}, "details": {}, **facts}
    made = Grade(attack, knowledge, "tokens", performance, **rest)
    made.development = development
    return made


def best(grades):
    return {row["knowledge"]: row["attack"] for row in strongest(grades)}


def test_a_stronger_attacker_can_do_all_that_a_weaker_one_can():
    grades = [grade("a", "K1", 0.6), grade("b", "K3", 0.5), grade("c", "K4", 0.9)]
    assert best(grades) == {"K1": "a", "K2": "a", "K3": "a", "K4": "c"}


def test_the_choice_is_made_on_development_victims_and_the_number_is_of_the_others():
    grades = [
        grade("lucky", "K1", 0.9, development=0.2),
        grade("steady", "K1", 0.5, development=0.6),
    ]
    row = strongest(grades)[0]
    assert (row["attack"], row["attack_performance"]) == ("steady", 0.5)
    assert row["chosen_on"] == "development"


def test_a_number_that_a_lower_preset_reached_is_not_said_to_be_chosen_on_development_victims():
    grades = [
        grade("early", "K1", 0.9, development=0.5),
        grade("late", "K3", 0.4, development=0.8),
    ]
    rows = {row["knowledge"]: row for row in strongest(grades)}
    assert (rows["K3"]["attack"], rows["K3"]["chosen_on"]) == ("early", "reported")
    assert rows["K2"]["chosen_on"] == "development"


def test_who_knows_the_defense_and_not_the_current_weights_has_rows_of_their_own():
    grades = [
        grade("blind", "K2", 0.3),
        grade("told", ("K2", "mechanism"), 0.6),
        grade("insider", "K4", 0.9),
    ]
    assert best(grades) == {
        "K2": "blind",
        "K3": "blind",
        "K4": "insider",
        "K2 + mechanism": "told",
        "K3 + mechanism": "told",
    }
    assert best(grades[1:2]) == {"K4": "told", "K2 + mechanism": "told", "K3 + mechanism": "told"}


def test_an_attack_whose_control_failed_is_never_the_strongest():
    broken = grade("broken", "K1", 0.9, verdict="positive control failed: …")
    assert best([broken, grade("sound", "K1", 0.3)])["K1"] == "sound"


def test_what_no_preset_grants_makes_rows_of_its_own():
    grades = [
        grade("plain", "K1", 0.5),
        grade("asking", ("K1", "queries"), 0.8),
        grade("strong", "K3", 0.9),
    ]
    assert best(grades) == {
        "K1": "plain",
        "K2": "plain",
        "K3": "strong",
        "K4": "strong",
        "K1 + queries": "asking",
        "K2 + queries": "asking",
        "K3 + queries": "strong",
        "K4 + queries": "strong",
    }


def test_an_attack_on_updates_never_stands_for_what_messages_alone_give_away():
    grades = [grade("on-messages", "K2", 0.3), grade("on-updates", ("K2", "updates"), 1.0)]
    assert best(grades) == {
        "K2": "on-messages",
        "K3": "on-messages",
        "K4": "on-messages",
        "K2 + updates": "on-updates",
        "K3 + updates": "on-updates",
        "K4 + updates": "on-updates",
    }


def test_only_an_adaptive_attack_that_passed_evaluates_a_defense():
    blind, knowing = grade("blind", "K3", 0.9), grade("knowing", "K4", 0.2, adaptive=True)
    told = ({"prompt"}, "causal-lm")
    assert evaluated([blind], *told) == {"tokens": False}
    assert evaluated([blind, knowing], *told) == {"tokens": True}
    knowing.verdict = "positive control failed: …"
    assert evaluated([blind, knowing], *told) == {"tokens": False}


def test_an_attack_on_labels_does_not_evaluate_a_defense_of_tokens():
    knowing = grade("knowing", "K4", 0.2, adaptive=True)
    knowing.target = "labels"
    assert evaluated([knowing], {"prompt"}, "classification") == {"labels": True, "tokens": False}
    assert evaluated([], {"labels"}, "classification") == {"labels": False}
    assert evaluated([], {"gradients"}, "causal-lm") == {"tokens": False}  # labels are the text


@pytest.fixture
def pm():
    class Attacks:
        @hookimpl
        def vflair_attacks(self):
            return offered()

    manager = plugin_manager([SAMPLE_PLUGIN], entry_point_group="vflair.none")
    manager.register(Attacks())
    manager.register(vflair_defenses)
    return manager


def small(**changes):
    table = {
        "task": {"name": "words"},
        "model": {"config": LLAMA, "vocab_size": 300},
        "partition": {"head": 1, "tail": 1},
        "train": {"steps": 2, "batch_size": 4, "max_length": 16},
        "victims": {"count": 6, "max_length": 12, "bypass": 2},
        "defenses": [{"name": "gaussian-noise", "options": {"noise_multiplier": 0.01}}],
        "isolation": "inline",
        **changes,
    }
    return experiment_from(table)


def test_a_defense_without_an_adaptive_attack_is_printed_as_not_evaluated(pm, tmp_path, capsys):
    blind = [{"name": "greedy-search", "knowledge": "K3"}]
    result = run(small(attacks=blind), plugins=pm)
    assert result.numbers["defended"]["evaluated"] == {"tokens": False}
    show_result(result, tmp_path, verbose=True)
    assert "NOT EVALUATED" in capsys.readouterr().out
    adaptive = [*blind, {"name": "vocabulary-search", "knowledge": "K4"}]
    result = run(small(attacks=adaptive), plugins=pm)
    assert result.numbers["defended"]["evaluated"] == {"tokens": True}
    show_result(result, tmp_path, verbose=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "NOT EVALUATED" not in said
    first = result.numbers["defended"]["strongest"][0]
    assert f"from {first['knowledge']}: strongest is {first['attack']} with AP" in said


def test_reading_a_sanitised_text_whole_is_not_recovering_the_private_one(pm):
    """The embedding layer alone crosses, so all that was sent is read; of six words, five were replaced or more."""
    result = run(
        small(
            attacks=[{"name": "nearest-embedding", "knowledge": "K1"}],
            defenses=[{"name": "santext", "options": {"epsilon": 0.001}}],
            partition={"head": 0, "tail": 1},
            train={"steps": 0, "batch_size": 4, "max_length": 16},
            victims={"count": 6, "max_length": 12, "bypass": 2, "phase": "inference"},
        ),
        plugins=pm,
    )
    before, after = (result.numbers[arm]["attacks"][0] for arm in ("undefended", "defended"))
    assert before["attack_performance"] == after["details"]["sent_tokens"] == 1.0
    assert after["positive_control"] == 1.0
    assert after["attack_performance"] < 0.5
    assert "sent_tokens" not in before["details"]


def test_behind_dual_guard_the_published_head_reads_little_and_the_current_one_all(pm):
    attacks = [
        {"name": "vocabulary-search", "knowledge": knowledge, "options": {"prior": 0.0}}
        for knowledge in ("K2", "K3")
    ]
    guarded = small(
        attacks=attacks,
        defenses=[{"name": "dual-guard", "options": {"steps": 60, "rate": 0.01}}],
        victims={"count": 6, "max_length": 12, "bypass": 2, "phase": "inference"},
    )
    numbers = run(guarded, plugins=pm).numbers
    before, after = (
        [row["attack_performance"] for row in numbers[arm]["attacks"]]
        for arm in ("undefended", "defended")
    )
    assert before == [1.0, 1.0]
    assert after[0] < 0.3
    assert after[1] == 1.0


def test_the_bottleneck_of_dual_bottleneck_is_told_to_an_adaptive_attack_which_reads_through_it(pm):
    attacks = [{"name": "vocabulary-search", "knowledge": "K4", "options": {"prior": 0.0}}]
    options = {"steps": 20, "rate": 0.01, "start": 0.001, "weight": 0.0}
    told = small(
        attacks=attacks, defenses=[{"name": "dual-bottleneck", "options": options}],
        victims={"count": 6, "max_length": 12, "bypass": 2, "phase": "inference"},
    )  # fmt: skip
    arm = run(told, plugins=pm).numbers["defended"]
    (row,) = arm["attacks"]
    assert row["adaptive"]
    assert row["attack_performance"] == row["positive_control"] == 1.0
    assert arm["findings"][0]["nats per token"] > 0


def test_what_a_defense_measured_of_itself_is_in_the_result(pm, tmp_path, capsys):
    attacks = [{"name": "nearest-embedding", "knowledge": "K1"}]
    defenses = [{"name": "adversarial-training"}, {"name": "gaussian-noise"}]
    result = run(small(attacks=attacks, defenses=defenses), plugins=pm)
    (found,) = result.numbers["defended"]["findings"]
    assert found["defense"] == "adversarial-training"
    assert 0 <= found["adversary"] <= 1
    assert found["fresh adversary"] >= found["most frequent token"] > 0
    assert result.numbers["undefended"]["findings"] == []
    show_result(result, tmp_path, verbose=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "adversarial-training measured of itself: adversary 0." in said


def test_victims_set_aside_are_not_in_the_reported_number(pm):
    """AP of the first four of six equals that of a run that has no others, when nothing is trained."""
    attacks = [{"name": "nearest-embedding", "knowledge": "K1"}]
    still = {"steps": 0, "batch_size": 4, "max_length": 16}
    sizes = {"max_length": 12, "bypass": 2, "phase": "inference"}
    of_six = small(
        attacks=attacks, train=still, defenses=[], victims={"count": 6, "development": 2, **sizes}
    )
    of_four = small(attacks=attacks, train=still, defenses=[], victims={"count": 4, **sizes})
    six, four = (run(e, plugins=pm).numbers["undefended"]["attacks"][0] for e in (of_six, of_four))
    assert six["attack_performance"] == four["attack_performance"]
    assert six["interval"] == four["interval"]
    assert (six["development"], four["development"]) != (None, None)
    assert four["development"] is None


def test_who_knows_a_shipped_defense_beats_her_blind_twin_with_an_interval_above_zero(
    pm, tmp_path, capsys
):
    """MID's code is a linear map of the hidden states: unknown, nothing fits; known, it is searched through."""
    twins = [
        {"name": "vocabulary-search", "knowledge": knowledge, "options": {"beam": 2, "prior": 0.0}}
        for knowledge in ("K3", "K4")
    ]
    result = run(
        small(
            seeds=[0, 1, 2, 3, 4],
            attacks=twins,
            defenses=[{"name": "mid", "options": {"decoder": "linear", "start": 0.01}}],
        ),
        plugins=pm,
    )
    (row,) = result.numbers["over_seeds"]["adaptive"]
    assert (row["blind"], row["adaptive"]) == ("K3", "K4")
    blind, knowing = row["attack_performance"]
    assert row["gain"] == pytest.approx(knowing - blind)
    assert row["gain_interval"][0] > 0.2
    show_result(result, tmp_path, verbose=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "5 seeds, vocabulary-search through the defense: AP" in said


def test_several_seeds_give_their_mean_and_the_paired_change(pm, tmp_path, capsys):
    attacks = [{"name": "nearest-embedding", "knowledge": "K1"}]
    seeds = (0, 1, 2, 3, 4)
    noise = [{"name": "gaussian-noise", "options": {"noise_multiplier": 2.0}}]
    result = run(small(attacks=attacks, seeds=seeds, defenses=noise), plugins=pm)
    alone = [
        run(small(attacks=attacks, seed=seed, defenses=noise), plugins=pm).numbers for seed in seeds
    ]
    (row,) = result.numbers["over_seeds"]["attacks"]
    for arm in ("undefended", "defended"):
        each = [numbers[arm]["attacks"][0]["attack_performance"] for numbers in alone]
        assert row[arm] == pytest.approx(sum(each) / 5)
    assert row["change"] == pytest.approx(row["defended"] - row["undefended"])
    low, high = row["change_interval"]
    assert low <= row["change"] <= high
    show_result(result, tmp_path, verbose=True)
    assert "5 seeds, nearest-embedding" in " ".join(capsys.readouterr().out.split())


def test_fewer_than_five_seeds_are_refused():
    with pytest.raises(ExperimentError, match="five or more, all different"):
        small(attacks=[], seeds=(1, 2, 3))
    with pytest.raises(ExperimentError, match="five or more, all different"):
        small(attacks=[], seeds=(1, 2, 3, 4, 4))


def test_a_paired_interval_is_narrower_than_the_spread_between_sentences():
    """Every sentence loses exactly one of ten tokens: the change is −0.1 however sentences differ."""
    seeds = [([(n % 8 + 1, 10) for n in range(20)], [(n % 8, 10) for n in range(20)])] * 5
    assert paired_over_cells(seeds).interval == pytest.approx((-0.1, -0.1))


def test_a_paired_interval_covers_no_change_when_there_is_none():
    import torch

    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(100):
        rows = torch.bernoulli(torch.full((5, 2, 16), 0.5), generator=generator).long().tolist()
        pairs = [([(h, 1) for h in before], [(h, 1) for h in after]) for before, after in rows]
        low, high = paired_over_cells(pairs).interval
        covered += low <= 0 <= high
    assert covered >= 88  # 95 expected; binomial standard error 2.2


def test_pairs_need_the_same_sentences_on_both_sides():
    with pytest.raises(AttackError, match="no pairs"):
        paired_over_cells([([(1, 1)], [(1, 1), (0, 1)])] * 2)
