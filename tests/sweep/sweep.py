"""Split every model type of transformers' auto classes and compare it with the unsplit model.

``python tests/sweep/sweep.py --quick --out results.jsonl`` writes a line per pair of task and type and prints
a summary; ``--write`` renews docs/models.md and counts.json, ``--check`` fails if fewer pairs are exact than
counts.json says.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cases
import table

MEMORY = 12 << 30
SECONDS = {True: 120, False: 900}  # a pair may take this long, quick or not
LIFETIME = 60  # pairs a process looks at before a fresh one takes over


def main() -> int:
    """Run the command line."""
    options = _options()
    pairs = [(t, task) for task in options.tasks for t in cases.types(task)]
    if options.types:
        pairs = [pair for pair in pairs if pair[0] in options.types]
    if options.table:
        rows = [json.loads(line) for line in options.out.read_text().splitlines()]
    else:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.unlink(missing_ok=True)
        rows = []
        for row in sweep(pairs, quick=options.quick):
            rows.append(row)
            with options.out.open("a") as out:
                out.write(json.dumps(row) + "\n")
            if options.verbose:
                _say(f"{row['task']:20} {row['type']:28} {table.said(row)}")
    _say(table.summary(rows))
    mode = "quick" if options.quick else "full"
    if options.write:
        table.write(rows, mode)
    if options.check:
        fallen = table.fallen(rows, mode)
        _say("\n".join(fallen) or "No count has fallen.")
        return bool(fallen)
    return 0


def sweep(pairs: list[tuple[str, str]], *, quick: bool) -> Any:
    """Yield what came out for each pair; a process that crashes or hangs loses one pair only."""
    waiting = list(reversed(pairs))
    while waiting:
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        worker = context.Process(target=_work, args=(theirs, quick), daemon=True)
        worker.start()
        theirs.close()
        for _ in range(LIFETIME):
            if not waiting:
                break
            model_type, task = waiting.pop()
            started = time.monotonic()
            try:
                ours.send((model_type, task))
                yield _received(ours, SECONDS[quick])
            except (TimeoutError, EOFError, ConnectionError) as error:
                reason = str(error) or f"the process ended with {_ended(worker)}"
                yield {
                    "task": task,
                    "type": model_type,
                    "runnable": False,
                    "reason": f"{type(error).__name__}: {reason}",
                    "cells": [],
                    "seconds": time.monotonic() - started,
                }
                break
        worker.kill()
        worker.join()


def _received(pipe: Connection, seconds: int) -> Any:
    if not pipe.poll(seconds):
        raise TimeoutError(f"took longer than {seconds} s")
    return pipe.recv()


def _ended(worker: Any) -> str:
    worker.join(5)
    return f"exit code {worker.exitcode}"


def _work(pipe: Connection, quick: bool) -> None:  # noqa: FBT001 - arguments of a process
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.simplefilter("ignore")
    import cells
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    while True:
        try:
            model_type, task = pipe.recv()
        except EOFError:
            return
        pipe.send(cells.examine(model_type, task, quick=quick))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])

    def listed(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    parser.add_argument("--types", type=listed, default=[], help="comma-separated model types")
    parser.add_argument(
        "--tasks", type=listed, default=list(cases.TASKS), help=", ".join(cases.TASKS)
    )
    parser.add_argument("--quick", action="store_true", help="head 1 only, sdpa only")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep.jsonl"))
    parser.add_argument("--table", action="store_true", help="only read what --out already holds")
    parser.add_argument("--write", action="store_true", help="renew docs/models.md and counts.json")
    parser.add_argument("--check", action="store_true", help="fail if a count has fallen")
    parser.add_argument("--verbose", action="store_true", help="print a line per pair")
    options = parser.parse_args()
    if (options.write or options.check) and (options.types or options.tasks != list(cases.TASKS)):
        parser.error("--write and --check need all types and tasks.")
    return options


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
