"""A folder with what a run of the Flower apps needs: a tiny model, and the records of two nodes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from vflair_core.testing import tiny_model, tiny_tokenizer

COUNTS = {"alice": 5, "bob": 3}  # records: the average must weigh them


def texts_of(seed: int, count: int) -> list[str]:
    """Texts of a tiny tokenizer, whose words are numbers."""
    return [" ".join(str(3 + (seed + 7 * n + 5 * j) % 60) for j in range(8)) for n in range(count)]


def make_premises(folder: Path) -> SimpleNamespace:
    """Write them, the records in two formats."""
    model = folder / "model"
    tiny_model("llama", seed=4).save_pretrained(model)
    tiny_tokenizer(64).save_pretrained(model)
    texts = {name: texts_of(n, count) for n, (name, count) in enumerate(COUNTS.items())}
    lines = [json.dumps({"id": n, "note": text}) for n, text in enumerate(texts["alice"])]
    (folder / "alice.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "bob.csv").write_text("note\n" + "\n".join(texts["bob"]) + "\n")
    nodes = {
        "alice": {"data": str(folder / "alice.jsonl"), "text": "note"},
        "bob": {"data": str(folder / "bob.csv"), "text": "note"},
    }
    for name, config in nodes.items():
        config["folder"] = str(folder / "nodes" / name)
    run = {"model": str(model), "partition": "1,1", "steps": 2, "batch-size": 2, "lora-r": 2}
    run |= {"folder": str(folder / "model-party"), "learning-rate": 5e-3, "round-timeout": 60.0}
    return SimpleNamespace(folder=folder, texts=texts, nodes=nodes, run=run)
