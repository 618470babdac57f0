"""What the attacks read of a real language model: figures of random models do not carry over."""

from __future__ import annotations

from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.real_model import PACKAGE, REAL
from vflair_attacks.linear_inverter import LinearInverter
from vflair_attacks.nearest_embedding import NearestEmbedding
from vflair_attacks.vocabulary_search import GreedySearch, VocabularySearch
from vflair_core import Partition, launch, locate_checkpoint
from vflair_core.testing import crossed

pytestmark = REAL
PROMPTS = (
    "My name is Lucy Okafor and I was treated at your clinic in March for high blood pressure.",
    "Please transfer 2,450 euros from my savings account to Miguel Sanchez before Friday.",
)


@pytest.fixture(scope="module")
def smollm2():
    folder = locate_checkpoint(**PACKAGE)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def victims(smollm2):
    """What is known at K2 after two blocks, and the text of the victims."""
    model, tokenizer = smollm2
    rows = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    manual = [part for topic in sorted(topics) for part in topics[topic].split("\n\n")]
    knowledge = crossed(model, Partition(2, 0), rows) | {
        "embeddings": model.get_input_embeddings().weight.detach(),
        "pretrained_model": model,
        "tokenizer": tokenizer,
        "public_texts": [" ".join(part.split()) for part in manual if len(part) > 200],
    }
    return rows, knowledge


def accuracy(attack, victims) -> float:
    rows, knowledge = victims
    tokens = launch(attack, knowledge).tokens
    pairs = zip(tokens, rows, strict=True)
    return float(torch.cat([found[: len(row)] == row for found, row in pairs]).float().mean())


def test_the_nearest_embedding_reads_nothing_and_a_linear_map_two_thirds(victims):
    assert accuracy(NearestEmbedding(), victims) < 0.05
    assert accuracy(LinearInverter(), victims) > 0.65  # .85 of 183 tokens in docs/attacks.md


@pytest.mark.parametrize("attack", [VocabularySearch, GreedySearch])
def test_a_search_with_proposals_reads_every_token(attack, victims):
    assert accuracy(attack(proposals="prior+linear", chunk=512), victims) == 1
