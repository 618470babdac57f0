"""What two attacks cost at the sizes that decide whether they can be used. Prints JSON lines; one thread.

`--case search`: vocabulary search on a small decoder. `--case memory`: relaxed tokens over a vocabulary of 150,000.
Without it, both, each in a process of its own, so that one's memory is not the other's.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from vflair_attacks.vocabulary_search import VocabularySearch
from vflair_attacks.wbi import WhiteBoxInversion
from vflair_core import Partition
from vflair_core.attacks.attack import launch
from vflair_core.testing import crossed, tiny_model

MIB = 2**20
CASES = ("search", "memory")


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES)
    case = parser.parse_args().case
    if case is None:
        for name in CASES:
            subprocess.run([sys.executable, __file__, "--case", name], check=True)  # noqa: S603 - this very script
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(json.dumps({"search": search, "memory": memory}[case]()))


def search() -> dict[str, float]:
    """Search 64 texts of 16 tokens, V = 1000, D = 64, two blocks at the data party, beam 8."""
    rows = torch.randint(3, 1000, (64, 16))
    model = tiny_model("gpt2", vocab_size=1000, hidden_size=64, initializer_range=0.02)
    knowledge = crossed(model, Partition(2, 1), list(rows))
    attack = VocabularySearch(beam=8, prior=0.0)
    start, busy = time.perf_counter(), time.process_time()
    guess = launch(attack, knowledge)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - busy, 1),
        "forwards": guess.budget["forwards"],
        "accuracy": float((guess.tokens == rows).float().mean()),
    }


def memory() -> dict[str, float]:
    """Invert one text of 512 tokens, V = 150,000, D = 64, a few steps: memory does not grow with steps."""
    rows = torch.randint(3, 150_000, (1, 512))
    size = {"vocab_size": 150_000, "hidden_size": 64, "max_position_embeddings": 512}
    knowledge = crossed(tiny_model("llama", **size), Partition(1, 2), list(rows))
    before = peak()
    start = time.perf_counter()
    launch(WhiteBoxInversion(steps=3), knowledge)
    return {
        "peak_mib": round(peak()),
        "peak_before_mib": round(before),
        "all_at_once_mib": round(16 * rows.numel() * 150_000 / MIB),
        "seconds": round(time.perf_counter() - start, 1),
    }


def peak() -> float:
    """Most memory this process has held, in MiB; Linux counts it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
