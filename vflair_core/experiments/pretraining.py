"""The public phase: language modelling on public text, before any cut, and what anyone may expect of a text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vflair_core.errors import ExperimentError
from vflair_core.experiments.experiment import Experiment
from vflair_core.randomness import stream_seed
from vflair_core.training.fine_tuning import Train

Report = Callable[[str, int, int], None]


def pretrain(
    model: Any, tokenizer: Any, texts: Sequence[str], experiment: Experiment, report: Report
) -> None:
    """Language modelling for a causal model, masked language modelling for an encoder.

    A model with two stacks reads the first half of each stretch of text and writes the second.
    """
    import transformers

    options, kind = experiment.pretrain, type(model).__name__
    halves = bool(model.config.is_encoder_decoder) and "Conditional" in kind
    stream = _stream(tokenizer, texts)
    if len(stream) <= options.length:
        raise ExperimentError(f"There are {len(stream)} public tokens, fewer than pretrain.length.")
    if halves or kind.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        learner, masks = model, False
    else:
        learner = _language_model_around(model, transformers)
        masks = type(learner).__name__.endswith("ForMaskedLM")
    generator = torch.Generator().manual_seed(stream_seed(experiment.seed, "pretraining"))
    schedule = Train(
        steps=options.steps, learning_rate=options.learning_rate, schedule="cosine",
        warmup=min(20, options.steps),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(learner.parameters(), lr=options.learning_rate, weight_decay=0.01)
    learner.train()
    for step in range(options.steps):
        starts = torch.randint(
            len(stream) - options.length, (options.batch_size,), generator=generator
        )
        ids = torch.stack([stream[s : s + options.length] for s in starts.tolist()])
        ids[:, 0] = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else ids[:, 0]
        if halves:
            first, second = ids.tensor_split([options.length // 2], dim=1)
            inputs, labels = first.contiguous(), second.contiguous()
        else:
            inputs, labels = _masked(ids, tokenizer, generator) if masks else (ids, ids)
        loss = learner(input_ids=inputs, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = schedule.rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report(
            f"pretraining on public text, loss {float(loss.detach()):.3f}", step + 1, options.steps
        )
    model.eval()


def _stream(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    ids = [token for row in tokenizer(list(texts))["input_ids"] for token in row]
    return torch.tensor(ids)


def _language_model_around(model: Any, transformers: Any) -> Any:
    """Put a language-model head around a classifier's own base: what it learns stays in the classifier."""
    prefix = model.base_model_prefix
    for auto in ("AutoModelForMaskedLM", "AutoModelForCausalLM"):
        try:
            learner = getattr(transformers, auto).from_config(model.config)
        except ValueError:
            continue
        old, new = getattr(learner, prefix, None), getattr(model, prefix)
        if type(old) is type(new):
            setattr(learner, prefix, new)
            learner.tie_weights()
            return learner
    raise ExperimentError(
        f"{type(model).__name__} has no language-model twin to pretrain: set pretrain.steps = 0."
    )


def _masked(ids: Tensor, tokenizer: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Replace 15 % of the tokens by the mask token, or the end token where there is none, and learn those."""
    chosen = torch.rand(ids.shape, generator=generator) < 0.15
    chosen[:, 0] = False
    stand_in = (
        tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.eos_token_id
    )
    return ids.masked_fill(chosen, stand_in), ids.masked_fill(~chosen, -100)


def prior_guess(model: Any, tokenizer: Any, texts: Sequence[str], length: int) -> Tensor | None:
    """The best guess (length,) of someone who knows the public text and saw no message.

    The public model continues greedily from the first token of most public texts.
    """
    if not texts:
        return None
    rows = tokenizer(list(texts[:2000]), truncation=True, max_length=length)["input_ids"]
    first = Counter(row[0] for row in rows if row).most_common(1)[0][0]
    if length == 1:
        return torch.tensor([first])
    training = model.training
    model.eval()
    with torch.no_grad():
        guess = model.generate(
            torch.tensor([[first]]),
            attention_mask=torch.ones(1, 1, dtype=torch.long),
            max_new_tokens=length - 1,
            min_new_tokens=length - 1,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )[0]
    model.train(training)
    return guess  # type: ignore[no-any-return]
