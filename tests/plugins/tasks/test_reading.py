"""The core reads what the tasks give: something to learn, answers unmasked, and private tokens among those sent."""

from __future__ import annotations

import pytest

from vflair_core.tasks.preprocessor import Preprocessor
from vflair_core.tasks.spans import private_tokens
from vflair_core.tasks.tokenization import InputFormat
from vflair_tasks import mathematics, offline, offline_questions

SMALL = {"train_examples": 8, "test_examples": 4, "public_characters": 5000}
OFFLINE = {
    "python_manual": lambda: offline.python_manual(**SMALL),
    "planted_records": lambda: offline.planted_records(**SMALL),
    "manual_similarity": lambda: offline.manual_similarity(**SMALL),
    "record_questions": lambda: offline_questions.record_questions(**SMALL),
    "record_answers": lambda: offline_questions.record_answers(**SMALL),
    "record_choices": lambda: offline_questions.record_choices(**SMALL),
    "record_summaries": lambda: offline_questions.record_summaries(**SMALL),
}


@pytest.mark.parametrize("make", OFFLINE.values(), ids=OFFLINE)
def test_every_secret_is_made_of_the_private_tokens_that_are_sent(make, tokenizer):
    task = make()
    reading = InputFormat(kind=task.kind, render=task.render, two_stacks=task.kind == "seq2seq")
    encoded = Preprocessor(tokenizer, reading, 4000).batch(list(task.train))
    assert len(encoded.rows) == len(task.train)
    for row, example in zip(encoded.rows, task.train, strict=True):
        private = private_tokens(row.example, row.offsets, row.sequences)
        said = tokenizer.decode(
            [token for token, secret in zip(row.ids, private, strict=True) if secret]
        )
        texts = [row.example.text, row.example.pair or ""]
        wanted = example.secrets or tuple(text for text in texts if text)
        for secret in wanted:
            assert secret.replace(" ", "") in said.replace(" ", "")
        assert not all(private)


def test_the_prompt_is_not_learnt_and_the_solution_is_to_its_end(files, tokenizer):
    line = '{"question": "6 × 7?", "answer": "It is 42.\\n#### 42"}\n'
    task = mathematics.gsm8k(data=str(files({"train.jsonl": line, "test.jsonl": line})))
    reading = InputFormat(kind=task.kind, render=task.render)
    encoded = Preprocessor(tokenizer, reading, 200).batch(list(task.train))
    (labels,) = encoded.batch["labels"]
    learnt = labels[labels != -100]
    assert tokenizer.decode(learnt[:-1]) == " It is 42.\n#### 42"
    assert learnt[-1] == tokenizer.eos_token_id
