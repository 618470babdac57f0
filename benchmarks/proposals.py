"""What an exact search of a real model costs with proposals: the figures under "On a real LLM" in docs/attacks.md.

`python benchmarks/proposals.py [BLOCKS ...]`. The victims are the prompts of `linear_inverter.py` and twelve paragraphs of the
Python manual, of at most 48 tokens each; the public text is the rest of the manual. One thread; prints a JSON line for each cut.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from linear_inverter import PROMPTS, passages, smollm2

from vflair_attacks.vocabulary_search import VocabularySearch
from vflair_core import Partition
from vflair_core.attacks.attack import launch
from vflair_core.testing import crossed

LENGTH, VICTIMS, PRIVATE = 48, 16, 210  # of the last paragraphs some are private


def main() -> None:
    """Search behind each number of blocks that is named, or 1, 2 and 8."""
    torch.set_num_threads(1)
    model, tokenizer = smollm2()
    texts = [*PROMPTS, *passages()[10 - PRIVATE :: 9]]
    each = [torch.tensor(tokenizer(text)["input_ids"])[:LENGTH] for text in texts]
    rows = (each[: len(PROMPTS)] + [row for row in each[len(PROMPTS) :] if len(row) == LENGTH])[
        :VICTIMS
    ]
    for blocks in map(int, sys.argv[1:] or (1, 2, 8)):
        knowledge = crossed(model, Partition(blocks, 0), rows) | {
            "tokenizer": tokenizer,
            "public_texts": passages()[:-PRIVATE],
            "pretrained_model": model,
        }
        start, busy = time.perf_counter(), time.process_time()
        guess = launch(VocabularySearch(proposals="prior+linear", chunk=512), knowledge)
        tokens = sum(map(len, rows))
        pairs = zip(guess.tokens, rows, strict=True)
        found = {
            "blocks": blocks,
            "tokens": tokens,
            "right": sum(int((said[: len(row)] == row).sum()) for said, row in pairs),
            "candidates_a_token": round(guess.budget["forwards"] / tokens, 1),
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(time.process_time() - busy, 1),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
