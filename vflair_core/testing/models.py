"""Small random models and batches for tests, ours and those of plugin authors: no download, no file.

model = tiny_model("llama")
batch = tiny_batch(model, padding="left", labels="tokens")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

from vflair_core.errors import alternatives
from vflair_core.parties.config_fields import check_class, check_model_type
from vflair_core.tasks.kinds import KINDS as TASK_KINDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AUTOS: dict[str, str] = {kind: facts.auto for kind, facts in TASK_KINDS.items()}
AUTOS["masked-lm"] = "AutoModelForMaskedLM"  # no task of vflair, and a common form of encoders
PAD, BOS, EOS, FIRST_WORD = 0, 1, 2, 3
# The wide initialisation makes logits differ enough for greedy and beam search to have clear winners.
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"intermediate_size": 32, "num_key_value_heads": 1},
    "qwen2": {"intermediate_size": 32, "num_key_value_heads": 1},
    "bert": {"intermediate_size": 32},
    "roberta": {"intermediate_size": 32},
}


def tiny_model(
    kind: str, task: str = "causal-lm", *, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """Build a random model of four blocks of width 16, in evaluation mode as `from_pretrained` returns it.

    Args:
        kind: gpt2, llama, qwen2, bert or roberta; any other model type of transformers may work too.
        task: A kind of task, or ``masked-lm``.
        seed: Seed of the weights; the global random state stays as it was.
        overrides: Options of the config, e.g. ``num_hidden_layers=2`` or ``num_labels=3``.
    """
    if task not in AUTOS:
        raise ValueError(f"There is no task {task!r}.{alternatives(task, AUTOS)}")
    if wrong := check_model_type(kind) or check_class(transformers.CONFIG_MAPPING[kind], overrides):
        raise ValueError(wrong)
    config = AutoConfig.for_model(kind, **{**SIZES, **KINDS.get(kind, {}), **overrides})
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, AUTOS[task]).from_config(config)
    return model.eval()


def tiny_batch(
    model: PreTrainedModel,
    *,
    rows: int = 3,
    length: int = 7,
    padding: Literal["left", "right"] | None = None,
    labels: Literal["tokens", "classes"] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Build a batch of random words, without special tokens, that fits `model`.

    Args:
        model: Gives the size of the vocabulary and the number of classes.
        rows: Number of examples.
        length: Number of positions.
        padding: Shorten the n-th row by n positions on this side, and say so in `attention_mask`.
        labels: The tokens themselves (-100 on padding), one class for each row, or none.
        seed: Seed of the words and classes; the global random state stays as it was.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(FIRST_WORD, vocabulary, (rows, length), generator=generator)  # (B, T)
    mask = torch.ones_like(ids)
    if padding:
        for row in range(1, rows):
            gap = min(row, length - 1)
            mask[row, slice(gap) if padding == "left" else slice(-gap, None)] = 0
    batch = {"input_ids": torch.where(mask == 1, ids, PAD), "attention_mask": mask}
    if labels == "tokens":
        batch["labels"] = torch.where(mask == 1, ids, -100)
    elif labels == "classes":
        batch["labels"] = torch.randint(
            int(model.config.num_labels or 2), (rows,), generator=generator
        )
    return batch


def tiny_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """Build a tokenizer whose words are the numbers of its tokens, for texts as `numbers_as_texts` writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD} | {str(number): number for number in range(1, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))  # noqa: S106 - a word, not a password
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")  # noqa: S106


def numbers_as_texts(rows: Sequence[Tensor] | Tensor) -> list[str]:
    """Write each row of token ids as a text that `tiny_tokenizer` reads back."""
    return [" ".join(map(str, row.tolist())) for row in rows]
