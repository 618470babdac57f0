"""Rows of chats are what the tokenizer's own template makes of the conversation; nothing is put in, nothing moved."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, ByT5Tokenizer

from support.made_tokenizers import TEMPLATES, make_tokenizer
from support.real_model import MISSING, PACKAGE
from vflair_core import Example, Task, in_chat, locate_checkpoint, takes_system
from vflair_core.errors import TaskError
from vflair_core.tasks.preprocessor import Preprocessor
from vflair_core.tasks.tokenization import InputFormat
from vflair_core.testing import tiny_model
from vflair_core.training.evaluation import evaluate

KINDS = ("byte-bpe", "metaspace-bpe", "metaspace-first", "wordpiece", "unigram")
ENDS = {"chatml": "<|im_end|>", "llama-2": "</s>", "llama-3": "<|eot|>", "gemma": "<end_of_turn>", "thinking": "<|im_end|>"}  # fmt: skip
QUESTION = "Who wrote the first program?"


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return make_tokenizer(request.param)


@pytest.fixture(params=TEMPLATES)
def chatty(request, tokenizer):
    tokenizer.chat_template = TEMPLATES[request.param]
    tokenizer.end = ENDS[request.param]
    return tokenizer


def conversation(question, answer, turns=(), system=""):
    talk = [{"role": "system", "content": system}] if system else []
    for said, reply in turns:
        talk += [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]
    talk.append({"role": "user", "content": question})
    return [*talk, {"role": "assistant", "content": answer}] if answer is not None else talk


def reading(turns=(), system=""):
    return InputFormat(render=lambda example, t: in_chat(example, turns, t, system=system))


def own_mask(tokenizer, talk, answer):
    """What the template's own tags mark, of the last turn alone."""
    made = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    mask = torch.tensor(made["assistant_masks"]).bool()
    before = len(tokenizer.apply_chat_template(talk[:-1], return_dict=True)["input_ids"])
    mask[: before - 1] = False
    return made["input_ids"], mask


@pytest.mark.parametrize("turns", [(), (("1 + 1?", "2"), ("2 + 2?", "It is 4."))])
def test_a_row_is_what_the_template_makes_of_the_whole_conversation(chatty, turns):
    talk = conversation(QUESTION, "Ada Lovelace", turns)
    ids, mask = own_mask(chatty, talk, "Ada Lovelace")
    batch = Preprocessor(chatty, reading(turns)).batch([Example(QUESTION, answer="Ada Lovelace")])
    assert batch.batch["input_ids"][0].tolist() == ids
    labels = batch.batch["labels"][0]
    assert torch.equal(labels != -100, mask)
    assert labels[labels != -100][-1] == chatty.convert_tokens_to_ids(chatty.end)


def test_a_prompt_is_the_templates_generation_prompt(chatty):
    talk = conversation(QUESTION, None, [("1 + 1?", "2")])
    expected = chatty.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    rows = Preprocessor(chatty, reading([("1 + 1?", "2")])).prompts([Example(QUESTION, answer="x")])
    assert rows.batch["input_ids"][0].tolist() == expected


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "gemma"])
def test_what_the_system_says_is_the_templates_too(tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name]
    assert takes_system(tokenizer)
    talk = conversation(QUESTION, "Ada", system="Be brief.")
    (row,) = Preprocessor(tokenizer, reading(system="Be brief.")).batch([Example(QUESTION, answer="Ada")]).rows  # fmt: skip
    assert row.ids == tokenizer.apply_chat_template(talk)["input_ids"]


def test_a_template_that_knows_no_system_is_refused_by_name(tokenizer):
    tokenizer.chat_template = TEMPLATES["gemma"]
    assert not takes_system(tokenizer)
    with pytest.raises(TaskError, match=r"refuses.*system, user: System role not supported"):
        in_chat(Example("a"), [], tokenizer, system="Be brief.")
    tokenizer.chat_template = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"  # fmt: skip
    assert not takes_system(tokenizer)
    with pytest.raises(TaskError, match="leaves out what the system says"):
        in_chat(Example("a"), [], tokenizer, system="Be brief.")


def test_choices_are_the_same_prompt_and_the_words_of_the_choice_without_the_end(chatty):
    example = Example(QUESTION, choices=("yes", "Ada", "maybe"), label=1)
    encoded = Preprocessor(chatty, reading()).choices([example])
    for n, choice in enumerate(example.choices):
        ids, mask = own_mask(chatty, conversation(QUESTION, choice), choice)
        row, labels = encoded.rows[n], encoded.batch["labels"][n][: len(ids)]
        assert row.ids == ids
        counted = labels[labels != -100]
        assert chatty.decode(counted).split()[-1] == choice.lower() or choice in chatty.decode(counted)  # fmt: skip
        assert chatty.convert_tokens_to_ids(chatty.end) not in counted.tolist()
        assert set(torch.nonzero(labels != -100)[:, 0].tolist()) < set(torch.nonzero(mask)[:, 0].tolist())  # fmt: skip


def test_private_is_what_came_from_the_example(chatty):
    example = Example("  Who is Ada? ", answer="maybe", private=((9, 12),))
    for encoded in (
        Preprocessor(chatty, reading([("Ada?", "Ada.")])).batch([example]),
        Preprocessor(chatty, reading([("Ada?", "Ada.")])).prompts([example]),
    ):
        secret = encoded.batch["input_ids"][encoded.private]
        assert chatty.decode(secret).strip().lower() == "ada"
        place = int(torch.nonzero(encoded.private[0])[0, 0])
        assert place > encoded.batch["input_ids"].shape[1] // 4  # not the one of the turn before


@pytest.mark.parametrize("surplus", [1, 4])
def test_a_long_chat_loses_what_was_said_first_and_nothing_of_the_template_or_the_answer(
    chatty, surplus
):
    example = Example(QUESTION, answer="Ada Lovelace")
    (whole,) = Preprocessor(chatty, reading([("1 + 1?", "2 2 2")])).batch([example]).rows
    reader = Preprocessor(chatty, reading([("1 + 1?", "2 2 2")]), len(whole.ids) - surplus)
    (short,) = reader.batch([example]).rows
    special = set(chatty.added_tokens_decoder)
    assert short.truncated == surplus
    assert [i for i in short.ids if i in special] == [i for i in whole.ids if i in special]
    assert short.target == whole.target
    assert short.ids[short.start :] == whole.ids[whole.start :]
    least = len(chatty.apply_chat_template(conversation("", "Ada Lovelace"))["input_ids"])
    with pytest.raises(
        TaskError, match=r"written by the chat template. Set train.max_length higher, to \d+"
    ):
        Preprocessor(chatty, reading(), least // 2).batch([example])


@pytest.mark.parametrize("turn", [0, 1])
def test_a_template_that_changes_what_is_said_is_refused(tokenizer, turn):
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['content'] | upper if loop.index0 == " + str(turn) + " else m['content'] }}]"
        "{% endfor %}"
    )  # fmt: skip
    with pytest.raises(TaskError, match=r"changes what the (user|assistant) says"):
        in_chat(Example("Ada", answer="yes"), [], tokenizer)


def test_answers_that_the_template_trims_are_learnt_as_it_writes_them(tokenizer):
    tokenizer.chat_template = TEMPLATES["llama-3"]
    talk = conversation(QUESTION, " \n Ada ")
    (row,) = Preprocessor(tokenizer, reading()).batch([Example(QUESTION, answer=" \n Ada ")]).rows
    assert row.ids == tokenizer.apply_chat_template(talk)["input_ids"]
    assert row.target[-1] == tokenizer.convert_tokens_to_ids("<|eot|>")


@pytest.mark.parametrize(
    ("name", "lead"), [("chatml", ""), ("thinking", "<think>\n\n</think>\n\n")]
)
def test_a_generated_answer_ends_with_the_turn_and_begins_behind_what_leads_to_it(
    name, lead, monkeypatch
):
    tokenizer = make_tokenizer("byte-bpe")
    tokenizer.chat_template = TEMPLATES[name]
    model = tiny_model("llama", vocab_size=len(tokenizer))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    said = [*tokenizer(lead + "Ada", add_special_tokens=False)["input_ids"], end, *[end + 20] * 3]
    asked = {}

    def generate(**options):
        asked.update(options)
        ids = options["input_ids"]
        return torch.cat([ids, torch.tensor([said] * len(ids))], 1)

    monkeypatch.setattr(model, "generate", generate)
    row = Example(QUESTION, answer="Ada")
    task = Task("t", kind="causal-lm", train=[row], test=[row])
    found = evaluate(model, task, Preprocessor(tokenizer, reading()), batch_size=1)
    assert found.metrics["exact_match"] == 1.0
    assert {end, tokenizer.eos_token_id} <= set(asked["eos_token_id"])


@pytest.mark.real
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_the_chat_of_a_real_model_is_its_own():
    folder = locate_checkpoint(PACKAGE["name"], gguf_file=PACKAGE["gguf_file"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for system in ("", "Be brief."):
        talk = conversation(QUESTION, "Ada Lovelace.", [("1 + 1?", "2")], system)
        encoded = Preprocessor(tokenizer, reading([("1 + 1?", "2")], system)).batch(
            [Example(QUESTION, answer="Ada Lovelace.")]
        )
        assert encoded.rows[0].ids == tokenizer.apply_chat_template(talk)["input_ids"]
        labels = encoded.batch["labels"][0]
        assert tokenizer.decode(labels[labels != -100]) == "Ada Lovelace.<|im_end|>"


# -- without a template ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["Question: Who?\nAnswer:", "Who? ", "Who?\n", ""])
def test_prompt_and_answer_are_tokenised_as_one_text(tokenizer, prompt):
    gap = "" if not prompt or prompt[-1].isspace() else " "
    (row,) = Preprocessor(tokenizer).batch([Example(prompt, answer="Ada wrote")]).rows
    whole = tokenizer(f"{prompt}{gap}Ada wrote", return_offsets_mapping=True)
    assert row.ids == [*whole["input_ids"], tokenizer.eos_token_id]
    # By hand: the first token that reaches beyond the prompt begins the answer.
    first = next(
        n
        for n, (_, end) in enumerate(whole["offset_mapping"])
        if end > len(prompt) and whole.sequence_ids(0)[n] == 0
    )
    assert row.ids[: row.start] == whole["input_ids"][:first]
    assert row.target == [*whole["input_ids"][first:], tokenizer.eos_token_id]
    assert row.start + len(row.target) == len(row.ids)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_choices_score_what_the_unsplit_model_says_of_the_joint_text(kind):
    tokenizer = make_tokenizer(kind)
    torch.manual_seed(0)
    model = tiny_model("llama", vocab_size=len(tokenizer)).eval()
    example = Example("Who wrote?", choices=("yes", "no", "Ada Lovelace"), label=0)
    sums = []
    for choice in example.choices:
        whole = tokenizer(f"Who wrote? {choice}", return_tensors="pt", return_offsets_mapping=True)
        offsets = whole.pop("offset_mapping")[0].tolist()
        likely = model(input_ids=whole["input_ids"]).logits[0].log_softmax(-1)
        sums.append(
            sum(
                float(likely[n - 1, token])
                for n, token in enumerate(whole["input_ids"][0].tolist())
                if offsets[n][1] > len("Who wrote?")
            )
        )
    row = [example]
    task = Task("t", kind="causal-lm", train=row, test=[example])
    encoded = Preprocessor(tokenizer).choices(row)
    logits = model(**encoded.batch).logits[:, :-1].log_softmax(-1)
    labels = encoded.batch["labels"][:, 1:]
    found = (logits.gather(-1, labels.clamp_min(0)[..., None])[..., 0] * (labels != -100)).sum(-1)
    assert found.tolist() == pytest.approx(sums, rel=1e-4)
    metrics = evaluate(model, task, Preprocessor(tokenizer), batch_size=1).metrics
    assert metrics["accuracy"] == float(max(range(3), key=sums.__getitem__) == 0)


def test_a_prefix_space_gives_no_piece_of_its_own():
    tokenizer = make_tokenizer("metaspace-bpe")
    (row,) = Preprocessor(tokenizer).batch([Example("Who?", answer="yes")]).rows
    assert "▁" not in tokenizer.convert_ids_to_tokens(row.ids)
    assert tokenizer.convert_ids_to_tokens(row.target) == ["▁yes", "</s>"]


def test_an_answer_follows_the_second_text_of_a_pair(tokenizer):
    (row,) = Preprocessor(tokenizer).batch([Example("Who?", pair="Ada wrote", answer="yes")]).rows
    assert row.ids == [*tokenizer("Who?", "Ada wrote yes")["input_ids"], tokenizer.eos_token_id]
    assert "yes" in tokenizer.decode(row.target)
    assert "wrote" not in tokenizer.decode(row.target)


def test_an_empty_answer_is_the_end_alone(tokenizer):
    encoded = Preprocessor(tokenizer).batch([Example("Who?", answer="")])
    labels = encoded.batch["labels"][0]
    assert labels[labels != -100].tolist() == [tokenizer.eos_token_id]


def test_a_tokenizer_that_is_not_fast_finds_the_answer_too():
    tokenizer = ByT5Tokenizer(extra_ids=0)
    assert not tokenizer.is_fast
    (row,) = Preprocessor(tokenizer).batch([Example("Who?", answer="Ada")]).rows
    assert row.ids == tokenizer("Who? Ada")["input_ids"]
    assert tokenizer.decode(row.target, skip_special_tokens=True) == " Ada"
    tokenizer.chat_template = TEMPLATES["chatml"]
    (row,) = Preprocessor(tokenizer, reading()).batch([Example("Who?", answer="Ada")]).rows
    assert row.ids == tokenizer.apply_chat_template(conversation("Who?", "Ada"))["input_ids"]
    assert tokenizer.decode(row.target) == "Ada<|im_end|>\n"  # it has no token for an end of turn


def test_a_tokenizer_that_rewrites_the_prompt_is_refused_by_name():
    class Rewriting(ByT5Tokenizer):
        def _tokenize(self, text):
            return super()._tokenize(text[::-1])

    with pytest.raises(TaskError, match=r"Rewriting does not say where.*Use a fast tokenizer"):
        Preprocessor(Rewriting(extra_ids=0)).batch([Example("Who?", answer="Ada")])
