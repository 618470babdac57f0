"""A task whose every text says one secret."""

from __future__ import annotations

from vflair_core import Example, Task, hookimpl

SECRET = "zanzibar4711"
WORDS = "river stone lamp paper cloud engine winter garden".split()  # noqa: SIM905


def secret_words(*, examples: int = 20, broken: int = -1, note: str = "") -> Task:
    """Say the secret, and a word; reading the row `broken` of those in training fails, with the secret on its lips."""
    rows = [Example(f"{SECRET} {WORDS[n % 8]} {SECRET} {n}") for n in range(examples)]
    public = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS[:2]]

    def render(example, tokenizer):
        if example.text.endswith(f" {broken}"):
            raise ValueError(f"cannot read {example.text!r}")
        return Example(f"{SECRET}? {example.text}", answer=example.answer)

    return Task(
        "secret-words",
        kind="causal-lm",
        train=rows[:-4],
        test=rows[-4:],
        public=public,
        render=render,
    )


@hookimpl
def vflair_tasks():
    return {"secret-words": secret_words}
