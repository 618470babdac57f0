"""What an attacker may know: one page, one name each. An attack asks by naming its parameters.

The presets nest: K0 ⊂ K1 ⊂ K2 ⊂ K3 ⊂ K4. "Pretrained" means weights from before private fine-tuning,
which the provider of a model has; "current" means the data party's weights at the time of the messages.
Shapes: N examples, R releases, T positions (padded with zeros to the longest), D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

from vflair_core.errors import AttackError, alternatives

OBSERVABLES = {
    "smashed": "What leaves the head for each example: (N, T, D).",
    "returned": "What the model party returned: (N, T, D), or logits in HT.",
    "logits": "The same, in HT only: (N, T, V) or (N, C).",
    "hidden_grad": "The gradient the data party sent: shaped like `returned`.",
    "smashed_grad": "The gradient the model party sent back: (N, T, D).",
    "share": "How much of the loss that was differentiated each example is: (N,); below 1 in a batch, whose loss is a mean.",
    "mask": "Which positions are real: (N, T), bool.",
    "lengths": "Number of positions of each example: (N,).",
    "rounds": "All records of the transcript as they are, in order.",
    "releases": "The smashed data of each repetition of the same example: (R, N, T, D).",
    "updates": "Raw gradients of the data party's weights, one dict per update, as an aggregator of several data parties sees them. Each is of the next `len(lengths) // len(updates)` victims; only with `victims.share_updates`, and only by name.",
}
ALWAYS = {
    "body": "The model party's own modules, as they are: nn.Module.",
    "task_kind": "The kind of the task, e.g. 'causal-lm'.",
    "partition": "The cut.",
    "generator": "The attack's own random stream: torch.Generator.",
    "device": "Where the attack computes: torch.device; models that are granted are there, what crossed is on the CPU.",
    "progress": "Call it with (done, total), (done, total, objective), (done, total, objective, tokens) with the guess so far (N, T), or (…, tokens, forwards) with what it cost, now and then: whoever watches sees how much of it is right, and the grade has its course.",
}
WEIGHTS = {
    "embeddings": "The public token embedding table: (V, D).",
    "tokenizer": "The tokenizer.",
    "pretrained_head": "The head as it was before private fine-tuning: `Head`.",
    "pretrained_tail": "The tail as it was before private fine-tuning: `Tail`; HBT only.",
    "pretrained_model": "The whole model before private fine-tuning, as language-model prior.",
    "current_head": "The head at the time of the messages: `Head`.",
    "current_tail": "The tail at the time of the messages: `Tail`; HBT only.",
    "head": "The best head that is granted: current, else pretrained.",
    "tail": "The best tail that is granted: current, else pretrained; HBT only.",
}
DEFENSE = {
    "mechanism": "How the defense works, without what it calibrated or learned: `Mechanism`.",
    "gradient_mechanism": "The same of what it does to the gradient that is sent: a `Mechanism` of the gradients (K, T, D) that K guesses would give.",
    "replacement": "How the defense replaces words: `Replacement`, of one such defense.",
    "parameters": "What the defense calibrated or learned; `mechanism` then has it too.",
}
AUXILIARY = {
    "public_texts": "Text of the kind anyone can get: list of str.",
    "in_domain": "Text like the private one, but other text: list of str.",
    "few_labelled": "A few examples of the task with their labels: list of Example.",
    "known_labels": "Labels that the attacker was told of some victims: dict of int to int; only with `victims.known`.",
    "candidates": "Texts of which some are victims, for attacks on membership: list of str; only with `victims.candidates`.",
    "queries": "Public texts and the smashed data they gave in the defended pipeline: list of (str, (T, D)).",
}
ACTIVE = {
    "adversary_state": "What the active adversary of the run kept, as its `state()` returned it: dict of tensors; only for the attack under [adversary].",
}
VOCABULARY = OBSERVABLES | ALWAYS | WEIGHTS | DEFENSE | AUXILIARY | ACTIVE

# No message of split learning holds an update, so no preset grants any.
_K0 = frozenset(OBSERVABLES) - {"updates"} | frozenset(ALWAYS)
_K1 = _K0 | {"embeddings", "tokenizer", "public_texts"}
_K2 = _K1 | {"pretrained_head", "pretrained_tail", "pretrained_model", "head", "tail"}
_K3 = _K2 | {"current_head", "current_tail"}
_K4 = _K3 | frozenset(DEFENSE)
BEFORE = frozenset(ALWAYS | WEIGHTS) - {"progress", "current_head", "current_tail"} | {
    "public_texts",
    "in_domain",
    "few_labelled",
}  # what there is for an active adversary before anything crosses
ADAPTIVE = frozenset(DEFENSE) | {"queries"}  # who uses one of these takes the defense into account
PRESETS = {"K0": _K0, "K1": _K1, "K2": _K2, "K3": _K3, "K4": _K4}


def names_of(knowledge: str | Iterable[str]) -> tuple[str, ...]:
    """Presets and names as they were given, one or several."""
    return (knowledge,) if isinstance(knowledge, str) else tuple(knowledge)


def shown(knowledge: Iterable[str]) -> str:
    """The same as results and tables print it: ``"K4+queries"``."""
    return "+".join(knowledge)


def granted(knowledge: str | Iterable[str]) -> frozenset[str]:
    """Return the names behind a preset, a name, or a list of presets and names.

    Raises:
        AttackError: A name is not in the vocabulary.
    """
    names = set(ALWAYS)
    for name in names_of(knowledge):
        if name in PRESETS:
            names |= PRESETS[name]
        elif name in VOCABULARY:
            names.add(name)
        else:
            raise AttackError(
                f"There is no knowledge called {name!r}.{alternatives(name, [*PRESETS, *VOCABULARY])}"
            )
    if names & {"pretrained_head", "current_head"}:
        names.add("head")
    if names & {"pretrained_tail", "current_tail"}:
        names.add("tail")
    return frozenset(names)
