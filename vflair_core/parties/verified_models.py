"""Model types that split exactly, and for which cuts; a test compares every line with the unsplit model.

docs/models.md has the result for every other type that transformers knows.
"""

from __future__ import annotations

_BOTH = ("HBT", "HT")

VERIFIED: dict[str, tuple[str, ...]] = {
    "bloom · causal-lm": _BOTH,
    "deepseek_v3 · causal-lm": _BOTH,
    "falcon · causal-lm": _BOTH,
    "gemma · causal-lm": _BOTH,
    "gemma2 · causal-lm": _BOTH,
    "gemma3_text · causal-lm": _BOTH,
    "glm · causal-lm": _BOTH,
    "glm4 · causal-lm": _BOTH,
    "gpt2 · causal-lm": _BOTH,
    "gpt_neox · causal-lm": _BOTH,
    "llama · causal-lm": _BOTH,
    "mamba · causal-lm": _BOTH,
    "minicpm3 · causal-lm": _BOTH,
    "mistral · causal-lm": _BOTH,
    "mixtral · causal-lm": _BOTH,
    "opt · causal-lm": _BOTH,
    "phi3 · causal-lm": _BOTH,
    "qwen2 · causal-lm": _BOTH,
    "qwen3 · causal-lm": _BOTH,
    "albert · classification": _BOTH,
    "bert · classification": _BOTH,
    "deberta-v2 · classification": _BOTH,
    "distilbert · classification": _BOTH,
    "electra · classification": _BOTH,
    "gpt2 · classification": _BOTH,
    "llama · classification": _BOTH,
    "modernbert · classification": _BOTH,
    "qwen2 · classification": _BOTH,
    "roberta · classification": _BOTH,
    "xlnet · classification": _BOTH,
    "bert · question-answering": _BOTH,
    "distilbert · question-answering": _BOTH,
    "roberta · question-answering": _BOTH,
    "bart · seq2seq": _BOTH,
    "t5 · seq2seq": _BOTH,
    "gemma3 · image-text": _BOTH,
    "llava · image-text": _BOTH,
    "qwen2_5_vl · image-text": _BOTH,
    "qwen2_vl · image-text": _BOTH,
}
