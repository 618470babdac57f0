"""Defenses at matched utility: each is tuned to the same main-task performance, then attacked by all that fits it.

Each defense has one main option, which runs from no protection to much. With the same number of trainings for each,
bisection finds the strongest setting that keeps `--keep` of the undefended main-task performance above chance; there
the attacks run, and the strongest of each preset, chosen on development victims, is reported. What a defense reads of
its text is private as far as the task says so. Run it by hand; every training and every attack is kept in the folder
`--out`, so a second call goes on where the first one stopped.

Settings, all offline, on random models; `real_study.py` is the same on a real one: a small decoder on the Python manual in HBT
(`text`), and a small encoder that tells chapters of the manual apart, where text (`words`, in HBT) or labels (`labels-ht`,
`labels-hbt`) must not leak. Defenses that change words are in `words` only: a language model would be judged by how well it
predicts the changed text. Where labels are attacked, each victim crosses in a batch of eight, as in training.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import structlog
import torch
from attrs import field, frozen

from vflair_core.experiments.arm import Arm, run_arm
from vflair_core.experiments.build import build_run, make_defenses
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.context import RunContext
from vflair_core.experiments.experiment import Experiment, Named
from vflair_core.experiments.grading.ranking import strongest
from vflair_core.plugins import plugin_manager

TEXT = {
    "task": {"name": "python-manual", "options": {"records": 0.5, "train_examples": 320, "test_examples": 64}},
    "model": {
        "vocab_size": 1024,
        "config": {
            "model_type": "llama", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128,
            "tie_word_embeddings": False,
        },
    },
    "pretrain": {"steps": 300, "learning_rate": 2e-3, "length": 48},
    "partition": {"head": 1, "tail": 1},
    "train": {"steps": 100, "batch_size": 8, "schedule": "cosine", "max_length": 48},
    "victims": {"count": 24, "development": 8, "max_length": 24, "queries": 256},
    "threads": 1,
    "attacks": [
        {"name": "nearest-embedding", "knowledge": "K1"},
        {"name": "inverter", "knowledge": ["K1", "queries"], "options": {"steps": 300}},
        {"name": "vocabulary-search", "knowledge": "K2", "options": {"beam": 4}},
        {"name": "model-completion", "knowledge": "K2"},
        {"name": "vocabulary-search", "knowledge": "K3", "options": {"beam": 4}},
        {"name": "vocabulary-search", "knowledge": "K3", "options": {"beam": 4, "matching": "sorted"}},
        {"name": "beam-clean", "knowledge": "K3", "options": {"beam": 4}},
        {"name": "vocabulary-search", "knowledge": "K4", "options": {"beam": 4}},
        {"name": "inverter", "knowledge": "K4", "options": {"steps": 300}},
    ],
}  # fmt: skip
LABELS = {
    "task": {"name": "manual-chapters", "options": {"chapters": 2, "examples_per_chapter": 72, "test_share": 0.5}},
    "model": {
        "vocab_size": 1024,
        "config": {
            "model_type": "bert", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
            "num_attention_heads": 4, "max_position_embeddings": 128,
            "attn_implementation": "eager",  # adversarial training takes a gradient of a gradient
        },
    },
    "pretrain": {"steps": 300, "learning_rate": 2e-3, "length": 48},
    "train": {"steps": 80, "batch_size": 8, "schedule": "linear", "max_length": 48},
    "victims": {"count": 64, "development": 16, "known": 8, "max_length": 48, "companions": 7},
    "threads": 1,
}  # fmt: skip
SETTINGS = {
    "text": TEXT,
    "words": LABELS
    | {
        "partition": {"head": 1, "tail": 1},
        "victims": {"count": 24, "development": 8, "max_length": 24, "queries": 0},
        "attacks": [
            {"name": "nearest-embedding", "knowledge": "K1"},
            {
                "name": "coordinate-search",
                "knowledge": "K2",
                "options": {"candidates": 32, "sweeps": 2},
            },
            {
                "name": "coordinate-search",
                "knowledge": "K3",
                "options": {"candidates": 32, "sweeps": 2},
            },
            {
                "name": "replacement-inversion",
                "knowledge": "K4",
                "options": {"tried": 32, "sweeps": 2},
            },
        ],
    },
    "labels-ht": LABELS
    | {
        "partition": {"head": 1, "tail": 0},
        "attacks": [
            {"name": "gradient-sign", "knowledge": "K0"},
            {"name": "gradient-sign", "knowledge": "K4"},
            {"name": "norm-scoring", "knowledge": "K0"},
            {"name": "spectral", "knowledge": "K0"},
            {"name": "direction-scoring", "knowledge": ["K0", "known_labels"]},
            {"name": "label-completion", "knowledge": ["K0", "known_labels"]},
        ],
    },
    "labels-hbt": LABELS
    | {
        "partition": {"head": 1, "tail": 1},
        "attacks": [
            {"name": "norm-scoring", "knowledge": "K0"},
            {"name": "spectral", "knowledge": "K0"},
            {"name": "spectral", "knowledge": "K0", "options": {"on": "returned"}},
            {"name": "direction-scoring", "knowledge": ["K0", "known_labels"]},
            {"name": "label-completion", "knowledge": ["K0", "known_labels"]},
            {"name": "label-enumeration", "knowledge": "K3"},
            {"name": "label-enumeration", "knowledge": "K4"},
            {"name": "bli", "knowledge": "K3"},
            {"name": "bli", "knowledge": "K4"},
        ],
    },
}


@frozen
class Knob:
    """One option of a defense from weak to strong; `through` makes its value of a number between the two."""

    defense: str
    option: str
    weak: float
    strong: float
    fixed: dict[str, Any] = field(factory=dict)
    through: Callable[[float], Any] = float

    def options(self, strength: float) -> dict[str, Any]:
        """The options at a strength in [0, 1], even steps of the logarithm."""
        if not self.option:
            return dict(self.fixed)
        value = math.exp((1 - strength) * math.log(self.weak) + strength * math.log(self.strong))
        return {**self.fixed, self.option: self.through(value)}


def whole(value: float) -> int:
    return round(value)


def dropped(kept: float) -> float:
    return 1 - kept


NO_NOISE = {"noise_multiplier": 0.0, "clip": math.inf}
TEXT_KNOBS = (
    Knob("gaussian-noise", "noise_multiplier", 0.003, 0.3),
    Knob("laplace-noise", "epsilon", 1e5, 100),
    Knob("dp-forward", "epsilon", 1e6, 8),
    Knob("dx-noise", "eta", 1e4, 10),
    Knob("split-and-denoise", "eta", 1e4, 10),
    Knob("mid", "weight", 1e-5, 1.0),
    Knob("dual-bottleneck", "weight", 1e-5, 1.0),
    Knob("text-obfuscator", "epsilon", 1e3, 1.0),
    Knob("adversarial-training", "weight", 0.01, 100.0),
    Knob("nopeek", "weight", 0.01, 100.0),
    Knob("dual-guard", "steps", 10, 1000, through=whole),
    Knob("sparsification", "rate", 0.5, 0.01, through=dropped),
    Knob("top-k", "k", 64, 1, through=whole),
    Knob("quantisation", "bits", 8, 2, through=whole),
    Knob("permutation", "", 1, 1),
)
WORD_KNOBS = (
    Knob("santext", "epsilon", 100, 0.1),
    Knob("santext-plus", "epsilon", 100, 0.1),
    Knob("custext", "epsilon", 100, 0.1),
    Knob("custext-plus", "epsilon", 100, 0.1),
    Knob("rantext", "epsilon", 100, 0.5),
)
LABEL_KNOBS = (
    Knob("gaussian-noise", "gradient_multiplier", 1e-7, 1.0, {**NO_NOISE, "gradient_clip": 1.0}),
    Knob("laplace-noise", "gradient_epsilon", 1e8, 1.0, {"epsilon": math.inf, "clip": math.inf, "gradient_clip": 1.0}),
    Knob("sparsification", "rate", 0.5, 0.01, {"gradients": True}, dropped),
    Knob("quantisation", "bits", 8, 2, {"gradients": True}, whole),
    Knob("norm-matching", "strength", 0.1, 10.0),
    Knob("marvell", "power", 1e-4, 100.0),
    Knob("label-randomised-response", "epsilon", 6.0, 0.1),
    Knob("decoy-rows", "count", 1, 16, through=whole),
)  # fmt: skip
TAIL_KNOBS = (
    Knob("mid", "weight", 1e-5, 1.0, {"place": "tail"}),
    Knob("adversarial-training", "weight", 0.01, 100.0, {"place": "tail"}),
)
KNOBS = {
    "text": TEXT_KNOBS,
    "words": WORD_KNOBS,
    "labels-ht": LABEL_KNOBS,
    "labels-hbt": LABEL_KNOBS + TAIL_KNOBS,
}


@frozen
class Study:
    """One setting, its undefended arm, and a folder of what was found so far."""

    setting: RunContext
    model: Any
    undefended: Arm
    folder: Path

    def main_performance(self, defense: str, options: dict[str, Any]) -> float:
        """MP of one training, without attacks."""
        return self._once("tuned", defense, options, launches=[])["main_performance"]

    def attacked(self, defense: str, options: dict[str, Any]) -> dict[str, Any]:
        """MP, guarantee and grades of one training with all attacks."""
        return self._once("attacked", defense, options, launches=self.setting.launches)

    def _once(
        self, kind: str, defense: str, options: dict[str, Any], *, launches: list[Any]
    ) -> dict[str, Any]:
        key = "-".join(str(value) for value in options.values()).replace("/", "_") or "fixed"
        path = self.folder / f"{kind}-{defense}-{key}.json"
        if not path.exists():
            path.write_text(json.dumps(self._run(defense, options, launches), indent=1))
        return json.loads(path.read_text())

    def _run(self, defense: str, options: dict[str, Any], launches: list[Any]) -> dict[str, Any]:
        e: Experiment = attrs.evolve(self.setting.experiment, defenses=(Named(defense, options),))
        setting = attrs.evolve(self.setting, experiment=e, launches=launches)
        made = make_defenses(e, self.setting.plugins)
        references = self.undefended.references if launches else []
        return facts_of(run_arm("defended", copy.deepcopy(self.model), made, setting, references))


def facts_of(arm: Arm) -> dict[str, Any]:
    return {
        "main_performance": arm.numbers["main_performance"],
        "chance": arm.numbers["chance"],
        "guarantees": [row["statement"] for row in arm.numbers["guarantees"]],
        "strongest": strongest(arm.grades),
        "grades": [grade.to_dict() for grade in arm.grades],
        "seconds": arm.cost["seconds"],
    }


def begin(name: str, folder: Path) -> Study:
    """Train the public model and run the undefended arm."""
    folder.mkdir(parents=True, exist_ok=True)
    e = experiment_from(SETTINGS[name])
    torch.set_num_threads(e.threads or torch.get_num_threads())
    setting, model = build_run(e, plugin_manager())
    undefended = run_arm("undefended", copy.deepcopy(model), [], setting, [])
    (folder / "undefended.json").write_text(json.dumps(facts_of(undefended), indent=1))
    return Study(setting, model, undefended, folder)


def tune(study: Study, knob: Knob, target: float, trainings: int) -> float | None:
    """The strongest setting found that reaches `target`; None if not even the weakest does."""
    low, high, best = 0.0, 1.0, None
    for number in range(trainings):
        strength = (0.0, 1.0)[number] if number < 2 else (low + high) / 2  # both ends first
        if study.main_performance(knob.defense, knob.options(strength)) >= target:
            low, best = max(low, strength), max(best or 0.0, strength)
        else:
            high = min(high, strength)
        if best == 1.0 or high == 0.0 or not knob.option:
            break
    return best


def describe(knob: Knob, found: dict[str, Any], options: dict[str, Any]) -> str:
    value = options.get(knob.option, "")
    shown = f"{value:.3g}" if isinstance(value, float) else str(value)
    cells = [f"{knob.defense} {knob.option} {shown}".strip(), f"{found['main_performance']:.3f}"]
    plain = {row["knowledge"]: row for row in found["strongest"]}
    for preset in ("K0", "K1", "K2", "K3", "K4"):
        row = plain.get(preset)
        cells.append("–" if row is None else f"{row['attack_performance']:.3f} {row['attack']}")
    for detail in ("rouge_l", "planted_strings_recovered"):  # of the text before any defense
        most = [row["details"][detail] for row in found["grades"] if detail in row["details"]]
        cells.append(f"{max(most):.3f}" if most else "–")
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(SETTINGS))
    parser.add_argument("--keep", type=float, default=0.9, help="share of MP above chance to keep")
    parser.add_argument("--trainings", type=int, default=6, help="of each defense, to tune it")
    parser.add_argument("--out", type=Path, default=Path("runs/matched-utility"))
    parser.add_argument("--only", nargs="*", default=None, help="names of defenses")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    study = begin(options.name, options.out / options.name)
    best, chance = (study.undefended.numbers[key] for key in ("main_performance", "chance"))
    target = chance + options.keep * (best - chance)
    print(f"undefended MP {best:.3f}, chance {chance:.3f}, wanted {target:.3f}", flush=True)
    print(describe(Knob("none", "", 1, 1), facts_of(study.undefended), {}), flush=True)
    for knob in KNOBS[options.name]:
        if options.only is not None and knob.defense not in options.only:
            continue
        strength = tune(study, knob, target, options.trainings)
        if strength is None:
            print(f"{knob.defense} | not even {knob.options(0.0)} keeps that much", flush=True)
            continue
        chosen = knob.options(strength)
        print(describe(knob, study.attacked(knob.defense, chosen), chosen), flush=True)


if __name__ == "__main__":
    main()
