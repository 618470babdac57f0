"""No two messages are covered by the same noise, whatever was taken back between them; and what crossed stays counted."""

from __future__ import annotations

import threading

import pytest
import torch

from vflair_core import CheckpointError, FineTuning, Partition, Train, Transcript, split
from vflair_core.testing import tiny_batch, tiny_model
from vflair_defenses.gaussian_noise import GaussianNoise

CUT = Partition(head=1, tail=1)


def begun(folder, seed=None):
    """A run of two parties, the data party's noise with a seed or without."""
    model = tiny_model("llama")
    noise = GaussianNoise(noise_multiplier=1.0, clip=50.0)
    data_party, model_party = split(model, CUT, defenses=[noise], seed=seed, fingerprint="same")
    model_party.checkpoints = folder / "model-party"
    return FineTuning(data_party, Train(steps=9, learning_rate=0.01)), data_party


def noise_on(data_party, batch, work):
    """What was laid on a batch that crossed as `work` ran."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    plain = data_party.smashed(**inputs, use_cache=False)
    with data_party.channel.tap(Transcript()) as transcript:
        work()
    return next(m.tensor for m in transcript.messages if m.role == "smashed") - plain


def batch_of(seed):
    return tiny_batch(tiny_model("llama"), labels="tokens", rows=1, length=12, seed=seed)


@pytest.mark.parametrize("seed", [None, 3], ids=["without a seed", "seeded"])
def test_runs_that_take_up_the_same_checkpoint_draw_the_same_noise_with_a_seed_only(tmp_path, seed):
    run, _ = begun(tmp_path, seed)
    run.step(batch_of(0))
    run.save(tmp_path / "kept")
    each = []
    for number in (1, 2):
        again, data_party = begun(tmp_path, seed)
        assert again.load(tmp_path / "kept") == 1
        batch = batch_of(number)
        each.append(noise_on(data_party, batch, lambda: again.step(batch)))  # noqa: B023
    assert torch.allclose(*each, atol=1e-3) == (seed is not None)


@pytest.mark.parametrize("seed", [None, 3], ids=["without a seed", "seeded"])
def test_a_step_that_failed_after_it_crossed_leaves_its_noise_to_no_other_text(tmp_path, seed):
    run, data_party = begun(tmp_path, seed)
    wrong = batch_of(1)
    wrong = {**wrong, "labels": torch.full_like(wrong["labels"], 10**6)}

    def fail():
        with pytest.raises(IndexError):
            run.step(wrong)

    first = noise_on(data_party, wrong, fail)
    second = noise_on(data_party, batch_of(2), lambda: run.step(batch_of(2)))
    assert torch.allclose(first, second, atol=1e-3) == (seed is not None)


def test_noise_without_a_seed_is_in_no_file_and_a_run_with_one_does_not_go_on_from_there(tmp_path):
    run, _ = begun(tmp_path)
    run.step(batch_of(0))
    run.save(tmp_path / "kept")
    seeded, _ = begun(tmp_path, seed=3)
    with pytest.raises(CheckpointError, match="seed=None"):
        seeded.load(tmp_path / "kept")


def test_what_crossed_stays_counted_when_a_run_goes_back(tmp_path):
    run, data_party = begun(tmp_path)
    batch = batch_of(0)
    run.step(batch)
    run.save(tmp_path / "kept")
    before = data_party.releases
    run.step(batch)
    most = data_party.releases
    assert most.rows == 2 * before.rows
    run.load(tmp_path / "kept")
    assert data_party.releases == most
    # Elsewhere, what crossed before the checkpoint comes on top of what crossed since.
    other, elsewhere = begun(tmp_path)
    with torch.no_grad():
        elsewhere.model(**batch, use_cache=False)
    other.load(tmp_path / "kept")
    assert elsewhere.releases.rows == 2 * before.rows


def test_a_loop_of_ones_own_is_counted_as_generate_is(tmp_path):
    ids = torch.randint(3, 60, (1, 7))
    _, own = begun(tmp_path)
    own.model.eval()
    with torch.no_grad():
        out = own.model(ids, use_cache=True)
        for _ in range(9):
            token = out.logits[:, -1:].argmax(-1)
            out = own.model(token, cache=out.cache)
    _, generating = begun(tmp_path)
    generating.model.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    assert own.releases == generating.releases
    assert own.releases.rows == 7 + 9


def test_threads_count_what_each_of_them_sends_to_whom_it_belongs(tmp_path):
    ids = torch.randint(3, 60, (2, 7))
    _, data_party = begun(tmp_path)

    def generate(row, new):
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        data_party.model.generate(ids[row : row + 1], **options)

    threads = [threading.Thread(target=generate, args=each) for each in ((0, 3), (1, 25))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    counts = sorted(count.rows for count in data_party.calls.counts.each.values())
    assert counts == [7 + 2, 7 + 24]


def test_the_same_tokens_are_the_same_example_whatever_holds_them(tmp_path):
    ids = torch.randint(3, 60, (1, 7))
    _, data_party = begun(tmp_path)
    for each in (ids, ids.int()):
        data_party.model(input_ids=each, use_cache=False)
    assert data_party.releases.rows == 14
