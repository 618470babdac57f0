"""Time to the first batch and memory of a local file, by its number of rows: memory must not grow with the file.

Writes a csv or jsonl file of reviews, opens it as the task `own` in a process of its own, first without and then with
the Arrow table in the cache, and encodes a first batch of 8. Prints seconds from the call to the batch, and private
memory (not the pages of the mapped file, which the system takes back when it needs them) less that of the same process
before the call. Run it by hand or by ``nox -s bench``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIB = 2**20
WORDS = (
    "good",
    "bad",
    "slow",
    "kind",
    "cold",
    "warm",
    "place",
    "food",
    "they",
    "not",
    "again",
    "never",
)
COLUMNS = {"kind": "classification", "text": "review", "label": "stars"}


def main() -> None:
    """Measure every size in processes of their own, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="few rows, to try the script")
    parser.add_argument("--ending", choices=["csv", "jsonl"], default="csv")
    parser.add_argument("--file", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.file:
        print(json.dumps(measured(options.file)))
        return
    sizes = [100, 1000] if options.small else [10_000, 100_000, 1_000_000]
    print("    rows   file MiB  first s  again s  first MiB  again MiB  batch ms")
    for rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"reviews.{options.ending}"
            write(file, rows)
            first, again = (in_own_process(file, folder) for _ in range(2))
            print(
                f"{rows:>8}  {file.stat().st_size / MIB:9.1f}  {first['seconds']:7.2f}  {again['seconds']:7.2f}  "
                f"{first['mib']:9.1f}  {again['mib']:9.1f}  {again['batch_ms']:8.2f}"
            )


def write(file: Path, rows: int) -> None:
    """Write reviews of 30 words and a number that makes each a text of its own."""
    rng = random.Random(0)
    with file.open("w") as stream:
        if file.suffix == ".csv":
            stream.write("review,stars\n")
        for row in range(rows):
            text = f"{' '.join(rng.choices(WORDS, k=30))} {row}"
            stars = row % 5 + 1
            stream.write(
                f"{text},{stars}\n"
                if file.suffix == ".csv"
                else json.dumps({"review": text, "stars": stars}) + "\n"
            )


def in_own_process(file: Path, cache: str) -> dict[str, float]:
    """Run this script on the file with a cache of its own."""
    out = subprocess.run(  # noqa: S603  # itself
        [sys.executable, __file__, "--file", str(file)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_DATASETS_CACHE": f"{cache}/cache", "HF_HUB_OFFLINE": "1"},
    )
    return json.loads(out.stdout.splitlines()[-1])


def measured(file: str) -> dict[str, float]:
    """Open the file as a task, encode batches from all over it, and say what that took."""
    import torch

    from vflair_core.tasks.tokenizer_training import train_tokenizer
    from vflair_tasks.own import own

    torch.set_num_threads(1)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 10, 400)
    # What is loaded on first use does not depend on the rows: another file loads it.
    warm = Path(file).with_name(f"warm{Path(file).suffix}")
    write(warm, 100)
    own(data=str(warm), **COLUMNS)
    before, start = private_bytes(), time.perf_counter()
    task = own(data=file, test_limit=100, **COLUMNS)
    tokenizer([task.train[n].text for n in range(8)], padding=True, return_tensors="pt")
    seconds = time.perf_counter() - start
    rng, start = random.Random(1), time.perf_counter()
    batches = 200
    for _ in range(batches):
        chosen = [task.train[rng.randrange(len(task.train))] for _ in range(8)]
        tokenizer([e.text for e in chosen], padding=True, return_tensors="pt")
    batch_ms = (time.perf_counter() - start) / batches * 1000
    return {
        "seconds": seconds,
        "mib": (private_bytes() - before) / MIB,
        "batch_ms": batch_ms,
    }


def private_bytes() -> int:
    """Resident memory that is the process's own, from Linux' count of anonymous pages."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this benchmark runs on Linux.")


if __name__ == "__main__":
    main()
