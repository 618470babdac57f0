"""Model types that `verify` found exact, and for which cuts; a test verifies every line."""

from __future__ import annotations

_BOTH = ("HBT", "HT")

VERIFIED: dict[str, tuple[str, ...]] = {
    "gpt2 · causal-lm": _BOTH,
    "llama · causal-lm": _BOTH,
    "qwen2 · causal-lm": _BOTH,
    "gpt2 · classification": _BOTH,
    "bert · classification": _BOTH,
    "roberta · classification": _BOTH,
}
