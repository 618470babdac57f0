"""What defenses prepare on public text is kept under all it depends on, and equals what would be made again."""

from __future__ import annotations

import pytest
import torch

from vflair_core import Example
from vflair_core.defenses.calibration import CalibrationCache
from vflair_core.errors import CheckpointError
from vflair_defenses.custext import CusText
from vflair_defenses.dual_bottleneck import DualBottleneck
from vflair_defenses.dual_guard import DualGuard
from vflair_defenses.gaussian_noise import GaussianNoise
from vflair_defenses.split_and_denoise import SplitAndDenoise
from vflair_defenses.text_obfuscator import TextObfuscator

MAKERS = {
    "custext": lambda: CusText(size=4),
    "text-obfuscator": lambda: TextObfuscator(clusters=4),
    "split-and-denoise": lambda: SplitAndDenoise(eta=50.0, steps=5),
    "dual-guard": lambda: DualGuard(steps=3),
    "dual-bottleneck": lambda: DualBottleneck(steps=3),
}


def prepared(make, defended, folder, texts):
    """A defense that was prepared with a cache at `folder`, and its data party."""
    defense = make()
    party = defended([defense], prepare=False).data_party
    party.calibration = CalibrationCache(folder)
    defense.prepare(texts, party)
    return defense, party


def sent_by(defense, party):
    """What crosses, or is made of a text, with the randomness that is left after preparing."""
    if isinstance(defense, CusText):
        return defense.on_text({"text": "the river runs past the old mill"})["text"]
    batch = party.encode([Example("The river runs past the old mill.")])
    seen = []
    taps = party.channel.tap(lambda message, direction, _: seen.append((message, direction)))
    with taps, torch.no_grad():
        party.model(**batch, use_cache=False)
    return [c.tensor for m, direction in seen if direction == "sent" for c in m.tensors]


@pytest.fixture(params=list(MAKERS))
def make(request):
    return MAKERS[request.param]


def same(one, other):
    if isinstance(one, str):
        return one == other
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_kept_preparation_gives_what_a_fresh_one_gives(make, defended, public, tmp_path):
    outcomes = [
        sent_by(*prepared(make, defended, folder, public))
        for folder in (None, tmp_path, tmp_path)  # not kept, made and kept, read
    ]
    assert same(outcomes[0], outcomes[1])
    assert same(outcomes[1], outcomes[2])
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_kept_is_not_made_again(defended, public, tmp_path, monkeypatch):
    prepared(MAKERS["text-obfuscator"], defended, tmp_path, public)
    monkeypatch.setattr("vflair_defenses.text_obfuscator.k_means", None)
    prepared(MAKERS["text-obfuscator"], defended, tmp_path, public)
    with pytest.raises(TypeError):
        prepared(lambda: TextObfuscator(clusters=5), defended, tmp_path, public)


def test_text_options_and_weights_each_have_a_file_of_their_own(defended, public, tmp_path):
    make = MAKERS["text-obfuscator"]
    prepared(make, defended, tmp_path, public)
    prepared(make, defended, tmp_path, public[:3])
    prepared(lambda: TextObfuscator(clusters=3), defended, tmp_path, public)
    defense, party = prepared(make, defended, None, public)
    party.calibration = CalibrationCache(tmp_path)
    with torch.no_grad():
        next(party.model.parameters()).add_(1.0)
    defense.prepare(public, party)
    assert len(list(tmp_path.iterdir())) == 4


def test_what_crossed_through_other_defenses_is_not_taken_for_what_did_not(
    defended, public, tmp_path
):
    """The denoiser learns from messages, and so from all defenses of the list."""

    def learnt(others, folder):
        defense = SplitAndDenoise(eta=50.0, clip=1.0, steps=5)
        party = defended([*others, defense], prepare=False).data_party
        party.calibration = CalibrationCache(folder)
        for each in party.defenses.each:
            each.prepare(public, party)
        return defense.state()

    alone = learnt([], tmp_path)
    behind = learnt([GaussianNoise(0.5, clip=1.0)], tmp_path)
    fresh = learnt([GaussianNoise(0.5, clip=1.0)], None)
    assert all(torch.equal(behind[name], value) for name, value in fresh.items())
    assert not torch.equal(behind["2.weight"], alone["2.weight"])
    learnt([GaussianNoise(0.6, clip=1.0)], tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_stale_file_is_refused_and_what_differs_is_named(defended, public, tmp_path):
    make = MAKERS["text-obfuscator"]
    prepared(make, defended, tmp_path, public)
    (first,) = tmp_path.iterdir()
    prepared(make, defended, tmp_path, public[:3])
    (second,) = set(tmp_path.iterdir()) - {first}
    first.replace(second)
    with pytest.raises(CheckpointError, match="public text differ"):
        prepared(make, defended, tmp_path, public[:3])


@pytest.mark.parametrize("damage", ["cut short", "changed"])
def test_a_damaged_file_is_refused_by_name(defended, public, tmp_path, damage):
    make = MAKERS["text-obfuscator"]
    prepared(make, defended, tmp_path, public)
    (path,) = tmp_path.iterdir()
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=rf"{path.name} is damaged.*Delete it"):
        prepared(make, defended, tmp_path, public)


def test_it_says_how_far_it_is(defended, public):
    heard = []
    defense = SplitAndDenoise(eta=50.0, steps=3)
    party = defended([defense], prepare=False).data_party
    party.calibration = CalibrationCache(None, lambda *told: heard.append(told))
    defense.prepare(public, party)
    assert heard == [("preparing SplitAndDenoise", n, 3) for n in range(3)]


def test_a_warm_up_that_crossed_leaves_the_noise_of_others_as_a_kept_one_does(
    defended, public, tmp_path
):
    outcomes = []
    for _ in range(2):  # made, read
        noise, guard = GaussianNoise(noise_multiplier=0.5, clip=1.0), DualGuard(steps=3)
        party = defended([noise, guard], prepare=False).data_party
        party.calibration = CalibrationCache(tmp_path)
        guard.prepare(public, party)
        outcomes.append(sent_by(guard, party))
    assert same(*outcomes)


def test_beginning_anew_twice_repeats_no_noise(defended):
    noise = GaussianNoise(noise_multiplier=0.5, clip=1.0)
    defenses = defended([noise], prepare=False).data_party.defenses
    draws = [torch.randn(8, generator=defenses.generator_of(noise))]
    for _ in range(3):
        defenses.begin_anew(noise)
        draws.append(torch.randn(8, generator=defenses.generator_of(noise)))
    assert all(not torch.equal(a, b) for n, a in enumerate(draws) for b in draws[:n])
