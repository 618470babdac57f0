"""Speed across the cut as a ratio to the unsplit model, in one run on one thread, interleaved.

GPT-2-small shape, random weights. Prints medians of CPU time; run it by hand or by ``nox -s bench``.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vflair_core import Partition, split

BATCH, LENGTH, PROMPT, TOKENS = 8, 128, 32, 64
DROPOUT_OFF = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


def main() -> None:
    """Measure a training step and a generation, split in process against unsplit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--small", action="store_true", help="a model of toy size, to try the script"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size = {"n_layer": 4, "n_embd": 64, "n_head": 4, "vocab_size": 1000} if options.small else {}
    whole = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **DROPOUT_OFF, **size))
    parts = {
        kind: split(copy.deepcopy(whole), Partition(2, tail))
        for kind, tail in (("HBT", 2), ("HT", 0))
    }
    ids = torch.randint(3, 1000, (BATCH, LENGTH))
    for task, measure in (("training step 8x128", step), ("generate 64 tokens", generate)):
        contenders: dict[str, Callable[[], float]] = {
            "unsplit": lambda measure=measure: measure(whole, (), ids)
        }
        for kind, (party, other) in parts.items():
            contenders[kind] = lambda p=party, o=other, measure=measure: measure(
                p.model, (o.model,), ids
            )
        report(task, interleaved(contenders, options.rounds))
    party, _ = parts["HBT"]
    sent = sum(t.bytes for (role, _), t in party.channel.traffic.items() if role != "structure")
    everything = sum(t.bytes for t in party.channel.traffic.values())
    print(json.dumps({"bytes to hidden states and gradients": round(everything / sent, 4)}))


def interleaved(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run each in turn, once to warm up and then `rounds` times, the order turning round each time."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        names = list(contenders)
        for name in names if number % 2 else reversed(names):
            seconds = contenders[name]()
            if number:
                times[name].append(seconds)
    return times


def report(task: str, times: dict[str, list[float]]) -> None:
    """Print each contender's median and its ratio to unsplit."""
    base = statistics.median(times["unsplit"])
    rows = {
        name: {
            "CPU s": round(statistics.median(t), 4),
            "ratio": round(statistics.median(t) / base, 4),
        }
        for name, t in times.items()
    }
    print(json.dumps({task: rows}))


def step(model: torch.nn.Module, others: tuple[torch.nn.Module, ...], ids: torch.Tensor) -> float:
    """CPU seconds of one forward and backward."""
    model.train()
    start = time.process_time()
    model(ids, labels=ids, use_cache=False).loss.backward()
    seconds = time.process_time() - start
    for owner in (model, *others):
        owner.zero_grad(set_to_none=True)
    return seconds


def generate(
    model: torch.nn.Module, _others: tuple[torch.nn.Module, ...], ids: torch.Tensor
) -> float:
    """CPU seconds of greedy generation with the cache."""
    model.eval()
    prompt = ids[:1, :PROMPT]
    start = time.process_time()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return time.process_time() - start


if __name__ == "__main__":
    main()
