"""A training run that saves after every step and goes on where it was killed: run by test_resuming."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from vflair_core import Partition, split
from vflair_core.testing import tiny_batch, tiny_model
from vflair_core.training.fine_tuning import FineTuning, Train

STEPS = 12
OPTIONS = Train(steps=STEPS, learning_rate=0.01, schedule="cosine", warmup=2, clip=0.5)


def model():
    return tiny_model("gpt2", seed=3)


def batches():
    return [tiny_batch(model(), padding="right", labels="tokens", seed=n) for n in range(STEPS)]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    data_party, model_party = split(model(), Partition(1, 1))
    model_party.checkpoints = folder / "model party"
    torch.manual_seed(4)
    fine_tuning = FineTuning(data_party, OPTIONS)
    if (folder / "data party").exists():
        fine_tuning.load(folder / "data party")
    else:
        fine_tuning.save(folder / "data party")
    for batch in batches()[data_party.step :]:
        loss = fine_tuning.step(batch)
        sys.stdout.write(f"{data_party.step - 1} {loss.hex()}\n")
        sys.stdout.flush()
        fine_tuning.save(folder / "data party")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
