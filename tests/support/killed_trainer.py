"""A Trainer that saves after every step and goes on where it was killed: run by test_trainer_checkpoints."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from support.trainers import halves_of, trainer_of
from vflair_core import Partition, SplitCallback

STEPS = 8
OPTIONS = {
    "max_steps": STEPS,
    "max_grad_norm": 0.3,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
}


class Say(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **parts):
        if "loss" in logs:
            sys.stdout.write(f"{state.global_step} {logs['loss'].hex()}\n")
            sys.stdout.flush()


def main(folder: Path, *, whole: bool) -> None:
    torch.set_num_threads(1)
    model, data_party, model_party = halves_of("gpt2", Partition(1, 1))
    model_party.checkpoints = folder / "model party"
    callbacks = [Say()] if whole else [SplitCallback(data_party), Say()]
    trainer = trainer_of(
        model if whole else data_party.model,
        folder / "trainer",
        *callbacks,
        save_strategy="no" if whole else "steps",
        save_steps=1,
        save_total_limit=2,
        **OPTIONS,
    )
    torch.manual_seed(5)
    folder.joinpath("trainer").mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder / "trainer")
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder / "trainer"))


def remove_unfinished(folder: Path) -> None:
    """As docs/fine-tuning.md tells whoever was killed while a checkpoint was being written."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not checkpoint.joinpath("trainer_state.json").exists():
            shutil.rmtree(checkpoint)


if __name__ == "__main__":
    main(Path(sys.argv[1]), whole=len(sys.argv) > 2)
