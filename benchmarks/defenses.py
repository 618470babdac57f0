"""What each defense costs: seconds and bytes of a training step against the undefended one, interleaved.

A GPT-2 of 4 layers of width 128 and random weights; BERT of the same size for defenses of classifiers. Text defenses
are timed by themselves, on 50,000 words of width 300. Run it by hand; it prints medians of CPU time.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from vflair_core import Partition, split
from vflair_core.offers import load_target
from vflair_core.tasks.tokenizer_training import train_tokenizer
from vflair_defenses import vflair_defenses

BATCH, LENGTH = 8, 64
OPTIONS = {
    "gaussian-noise": {"gradient_multiplier": 0.1, "gradient_clip": 1.0},
    "laplace-noise": {"gradient_epsilon": 50.0, "gradient_clip": 1.0},
    "sparsification": {"gradients": True},
    "quantisation": {"gradients": True},
}
CLASSIFIERS = {"marvell", "label-randomised-response"}
TEXT = ("santext", "santext-plus", "custext", "custext-plus", "rantext")
SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 2000}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WORDS = ["a", "river", "ran", "past", "the", "old", "mill"]
PUBLIC = [" ".join(random.Random(n).choices(WORDS, k=40)) for n in range(32)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--words", type=int, default=50_000, help="words with vectors")
    parser.add_argument("--only", nargs="*", default=None, help="names of defenses")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name in vflair_defenses() if options.only is None or name in options.only]
    print(f"{'defense':28} {'step, s':>9} {'ratio':>6} {'MB':>7} {'ratio':>6}")
    for name in names:
        if name not in TEXT:
            measure_step(name, options.rounds)
    measure_text([name for name in names if name in TEXT], options.words)


def parties(kind: str, defenses: list):
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(kind, **SIZES, intermediate_size=512, **ENDS))
    party, _ = split(
        model, Partition(1, 1), defenses=defenses, tokenizer=train_tokenizer(PUBLIC, 300), seed=0
    )
    party.defenses.task_kind = "classification" if kind == "bert" else "causal-lm"
    for defense in defenses:
        defense.prepare(PUBLIC, party)
    return party


def step(party, kind: str) -> tuple[float, int]:
    """CPU seconds and bytes, both directions, of one training step."""
    torch.manual_seed(1)
    ids = torch.randint(5, 1990, (BATCH, LENGTH))
    labels = torch.arange(BATCH) % 2 if kind == "bert" else ids
    options = {} if kind == "bert" else {"use_cache": False}
    before = sum(t.bytes for t in party.channel.traffic.values())
    start = time.process_time()
    party.model.train()
    party.model(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, **options
    ).loss.backward()
    seconds = time.process_time() - start
    return seconds, sum(t.bytes for t in party.channel.traffic.values()) - before


def measure_step(name: str, rounds: int) -> None:
    kind = "bert" if name in CLASSIFIERS else "gpt2"
    defense = load_target(vflair_defenses()[name])(**OPTIONS.get(name, {}))
    plain, covered = parties(kind, []), parties(kind, [defense])
    for party in (plain, covered):  # roles are found, and programs sent, once
        step(party, kind)
    seen = [(step(plain, kind), step(covered, kind)) for _ in range(rounds)]
    (base, bytes_base), (seconds, sent) = (
        (statistics.median(pair[n][0] for pair in seen), seen[0][n][1]) for n in (0, 1)
    )
    print(
        f"{name:28} {seconds:9.3f} {seconds / base:6.2f} {sent / 1e6:7.2f} {sent / bytes_base:6.2f}"
    )


def measure_text(names: list[str], words: int) -> None:
    if not names:
        return
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(words, 300, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.txt"
        with path.open("w", encoding="utf-8") as out:
            out.writelines(
                f"word{n} {' '.join(f'{x:.4f}' for x in row.tolist())}\n"
                for n, row in enumerate(rows)
            )
        print(f"\n{words} words: {'prepare, s':>12} {'1,000 words, s':>15} {'peak RSS, GiB':>14}")
        text = " ".join(f"word{random.Random(n).randrange(words)}" for n in range(1000))
        streams = SimpleNamespace(generator_of=lambda _: generator)
        party = SimpleNamespace(
            defenses=streams,
            tell=lambda *_: None,
            remember=lambda _defense, _texts, make, **_facts: make(),
        )
        for name in names:
            defense = load_target(vflair_defenses()[name])(vectors=str(path))
            start = time.perf_counter()
            defense.prepare(PUBLIC, party)
            prepared = time.perf_counter()
            defense.on_text({"text": text})
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            done = time.perf_counter()
            print(f"{name:14} {prepared - start:12.1f} {done - prepared:15.1f} {peak:14.2f}")


if __name__ == "__main__":
    main()
