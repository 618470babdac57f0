"""Only hidden states tell two texts apart; whatever else would, is refused before it crosses."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from vflair_core.communication.transcript import Transcript
from vflair_core.errors import LeakError
from vflair_core.testing import tiny_batch, tiny_model

RARE = 5
BITS = 6  # enough for 64 words


class IdsAsNumbers(LlamaForCausalLM):
    def forward(self, input_ids=None, **inputs):
        return super().forward(input_ids, cu_seq_lens_q=input_ids.int(), **inputs)


class IdsAsFloats(LlamaForCausalLM):
    def forward(self, input_ids=None, **inputs):
        return super().forward(input_ids, cu_seq_lens_k=input_ids / 64, **inputs)


class IdsAsPositions(LlamaForCausalLM):
    def forward(self, input_ids=None, **inputs):
        return super().forward(input_ids, position_ids=input_ids, **inputs)


class IdsAsBits(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, **inputs):
        bits = (input_ids[:, :, None] >> torch.arange(BITS)) & 1  # (B, T, 6)
        width = input_ids.shape[1]
        mask = torch.ones(len(input_ids), 1, width, width, dtype=torch.bool)
        mask[:, 0, :, :BITS] = bits.bool()
        return super().forward(input_ids, attention_mask=mask, **inputs)


class PlaceOfOneWord(LlamaForCausalLM):
    """As BART does with its end-of-sentence token: a mask that changes with a single word."""

    def forward(self, input_ids=None, attention_mask=None, **inputs):
        width = input_ids.shape[1]
        mask = torch.ones(width, width, dtype=torch.bool).tril().expand(len(input_ids), 1, -1, -1)
        mask = mask & (input_ids != RARE)[:, None, None, :] | torch.eye(width, dtype=torch.bool)
        return super().forward(input_ids, attention_mask=mask, **inputs)


class RareWordMask(LlamaForCausalLM):
    """Its mask, of flags or of numbers, is the usual one as long as a certain word does not come."""

    def forward(self, input_ids=None, attention_mask=None, **inputs):
        width = input_ids.shape[1]
        seen = (input_ids == RARE).any(1)[:, None, None, None]
        mask = torch.ones(width, width, dtype=torch.bool).tril().expand(len(input_ids), 1, -1, -1)
        mask = torch.where(seen, torch.eye(width, dtype=torch.bool), mask)
        if self.numbers:
            mask = torch.zeros(mask.shape).masked_fill(~mask, -100.0)
        return super().forward(input_ids, attention_mask=mask, **inputs)


class RareWordBias(LlamaForCausalLM):
    """What is added to the scores is a weight; which one, a certain word says."""

    def forward(self, input_ids=None, attention_mask=None, **inputs):
        width = input_ids.shape[1]
        seen = (input_ids == RARE).any(1).float()[:, None, None, None]
        mask = self.bias[:width, :width] + seen * self.other[:width, :width]
        return super().forward(input_ids, attention_mask=mask, **inputs)


class LearnedBias(LlamaForCausalLM):
    """As T5 does: what is added to the attention scores is a weight."""

    def forward(self, input_ids=None, attention_mask=None, **inputs):
        width = input_ids.shape[1]
        mask = self.bias[:width, :width].expand(len(input_ids), 1, -1, -1)
        return super().forward(input_ids, attention_mask=mask, **inputs)


def turned_into(model_class, **overrides):
    model = tiny_model("llama", **overrides)
    model.__class__ = model_class
    return model


def sent_roles(parties, **inputs):
    with parties.data_party.channel.tap(Transcript()) as transcript:
        parties.data_party.model(**inputs)
    sent = [record for record in transcript.messages if record.direction == "sent"]
    return {record.name: record.role for record in sent}


def sent_messages(party, **inputs):
    """All requests, with their numbers for the model party, that one call of the model makes."""
    seen = []

    def watch(message, direction, _seconds):
        if direction == "sent":
            seen.append(message)

    with party.channel.tap(watch):
        party.model(**inputs)
    return seen


@pytest.mark.parametrize(("head", "tail"), [(1, 1), (0, 1), (1, 0)])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_masks_positions_and_rotary_tables_are_structure_and_hidden_states_are_smashed(
    cut, kind, head, tail
):
    parties = cut(kind, head, tail)
    roles = sent_roles(parties, **tiny_batch(parties.whole, padding="left", labels="tokens"))
    assert roles.pop("hidden_states") == "smashed"
    assert "attention_mask" in roles
    assert {"position_embeddings.0", "position_embeddings.1"} <= roles.keys() or kind == "gpt2"
    assert set(roles.values()) == {"structure"}


@pytest.mark.parametrize("wire", [False, True], ids=["clones", "wire"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_every_tensor_that_crosses_in_a_training_step_has_a_role(cut, kind, wire):
    task = "causal-lm" if kind != "bert" else "classification"
    parties = cut(kind, task=task, wire=wire)
    labels = "tokens" if kind != "bert" else "classes"
    with parties.data_party.channel.tap(Transcript()) as transcript:
        parties.data_party.model(
            **tiny_batch(parties.whole, padding="right", labels=labels)
        ).loss.backward()
    sent = {r.role for r in transcript.messages if r.direction == "sent"}
    received = {r.role for r in transcript.messages if r.direction == "received"}
    assert sent <= {"smashed", "structure", "hidden_grad"}
    assert received == {"returned", "smashed_grad"}


@pytest.mark.parametrize(("head", "tail"), [(1, 1), (0, 1), (1, 0)])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_two_texts_of_equal_form_differ_in_smashed_data_only(cut, kind, head, tail):
    parties = cut(kind, head, tail)
    texts = [
        tiny_batch(parties.whole, padding="left", labels="tokens", seed=seed) for seed in (1, 2)
    ]
    assert not torch.equal(texts[0]["input_ids"], texts[1]["input_ids"])
    sent_messages(parties.data_party, **texts[0])  # the program is spelt out the first time only
    (first,), (second,) = (
        sent_messages(
            parties.data_party, **text, num_items_in_batch=text["labels"].max(), use_cache=False
        )
        for text in texts
    )
    (again,) = sent_messages(parties.data_party, **texts[1], use_cache=False)
    own = {
        "program",
        "released_graphs",
        "released_caches",
    }  # tell of messages before, not of the text
    facts = [{k: v for k, v in m.meta.items() if k not in own} for m in (first, second, again)]
    assert facts[0] == facts[1] == facts[2]
    for ours, theirs in zip(first.tensors, second.tensors, strict=True):
        assert (ours.name, ours.role) == (theirs.name, theirs.role)
        assert torch.equal(ours.tensor, theirs.tensor) == (ours.role == "structure")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_labels_ids_and_the_number_of_items_never_cross(cut, kind):
    parties = cut(kind)
    batch = tiny_batch(parties.whole, padding="right", labels="tokens")
    batch["num_items_in_batch"] = (batch["labels"] >= 0).sum()
    (message,) = sent_messages(parties.data_party, **batch)
    assert not {"labels", "input_ids", "num_items_in_batch", "shift_labels"} & {
        c.name for c in message.tensors
    }
    said = repr(message.meta)
    assert not [name for name in ("labels", "input_ids", "num_items_in_batch") if name in said]
    for crossing in message.tensors:
        for private in ("labels", "input_ids"):
            assert crossing.tensor.shape != batch[private].shape or not torch.equal(
                crossing.tensor.double(), batch[private].double()
            )


LEAKS = [
    (IdsAsNumbers, ("cu_seq_lens_q",)),
    (IdsAsFloats, ("cu_seq_lens_k",)),
    (IdsAsBits, ("attention_mask",)),
    (IdsAsPositions, ("position_ids", "position_embeddings.0", "position_embeddings.1")),
]


@pytest.mark.parametrize(("model_class", "names"), LEAKS)
def test_a_planted_leak_is_refused_by_name_and_nothing_is_sent(cut, model_class, names):
    parties = cut(model=turned_into(model_class))
    before = parties.data_party.channel.messages
    with pytest.raises(LeakError, match=rf"'({'|'.join(names)})'.*would carry the text.*disclose="):
        parties.data_party.model(**tiny_batch(parties.whole))
    assert parties.data_party.channel.messages == before


@pytest.mark.parametrize(("model_class", "names"), LEAKS)
def test_a_planted_leak_that_is_disclosed_crosses_under_that_role(cut, model_class, names):
    parties = cut(model=turned_into(model_class), disclose=names)
    batch = tiny_batch(parties.whole)
    roles = sent_roles(parties, **batch)
    assert {name for name, role in roles.items() if role == "disclosed"} == set(names)
    assert torch.equal(parties.data_party.model(**batch).logits, parties.whole(**batch).logits)


def test_disclosing_one_name_discloses_no_other(cut):
    parties = cut(model=turned_into(IdsAsNumbers), disclose=("attention_mask",))
    with pytest.raises(LeakError, match="cu_seq_lens_q"):
        parties.data_party.model(**tiny_batch(parties.whole))


def test_a_mask_that_shows_the_place_of_one_rare_word_is_refused(cut):
    # Random text almost never has the word; the text at hand does.
    parties = cut(model=turned_into(PlaceOfOneWord, vocab_size=5000))
    batch = tiny_batch(parties.whole)
    batch["input_ids"][1, 4] = RARE
    with pytest.raises(LeakError, match="attention_mask"):
        parties.data_party.model(**batch)


def without_and_with_the_word(whole, length=7):
    batch = tiny_batch(whole, length=length)
    plain = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == RARE, 6)}
    return plain, {**plain, "input_ids": plain["input_ids"].index_fill(1, torch.tensor([4]), RARE)}


@pytest.mark.parametrize("length", [7, 9], ids=["same length", "other length"])
@pytest.mark.parametrize("generates", [False, True])
@pytest.mark.parametrize("numbers", [False, True])
def test_a_mask_that_tells_one_rare_word_is_refused_when_the_word_comes(
    cut, numbers, generates, length
):
    model = turned_into(RareWordMask, vocab_size=5000)
    model.numbers = numbers
    parties = cut(model=model)
    plain, _ = without_and_with_the_word(parties.whole)
    _, rare = without_and_with_the_word(parties.whole, length)
    for _ in range(2):
        parties.data_party.model(**plain)
    model = parties.data_party.model
    call = partial(model.generate, max_new_tokens=2) if generates else model
    with pytest.raises(LeakError, match="attention_mask"):
        call(**rare)
    parties.data_party.model(**plain)  # nothing is lost for what tells nothing


def test_a_weight_that_tells_one_rare_word_is_smashed_when_the_word_comes(cut):
    model = turned_into(RareWordBias, vocab_size=5000)
    model.bias, model.other = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))
    parties = cut(model=model)
    plain, rare = without_and_with_the_word(parties.whole)
    assert sent_roles(parties, **plain)["attention_mask"] == "weight"
    assert sent_roles(parties, **rare)["attention_mask"] == "smashed"
    assert sent_roles(parties, **plain)["attention_mask"] == "smashed"  # from then on


class ScoresOfWords(LlamaForCausalLM):
    """A floating tensor that is computed from words and is constant where there is one: a softmax over positions."""

    def forward(self, input_ids=None, attention_mask=None, **inputs):
        words = self.get_input_embeddings()(input_ids).mean(-1)
        scores = words[:, None].expand(-1, words.shape[1], -1).softmax(-1)
        return super().forward(input_ids, attention_mask=scores[:, None], **inputs)


def test_what_one_word_proves_holds_for_one_word(cut):
    parties = cut(model=turned_into(ScoresOfWords))
    one, many = tiny_batch(parties.whole, length=1), tiny_batch(parties.whole)
    assert sent_roles(parties, **one)["attention_mask"] == "weight"  # 1.0, whatever the word is
    assert sent_roles(parties, **many)["attention_mask"] == "smashed"


def test_what_padding_proves_is_not_remembered(cut):
    parties = cut(model=turned_into(ScoresOfWords, pad_token_id=0))
    padding = torch.zeros(2, 7, dtype=torch.long)
    assert sent_roles(parties, input_ids=padding)["attention_mask"] == "smashed"
    assert not parties.data_party.calls.dry_runs.roles


def test_an_argument_that_blocks_are_not_known_to_take_stays_at_home(cut):
    parties = cut("llama")
    with pytest.raises(LeakError, match=r"called with 'secret'.*It stays with the data party"):
        parties.data_party.model(**tiny_batch(parties.whole), secret=torch.ones(2))


def test_what_derives_from_a_local_weight_is_a_weight_and_gets_its_gradient(cut):
    model = turned_into(LearnedBias)
    model.bias = nn.Parameter(torch.randn(8, 8))
    parties = cut(model=model)
    batch = tiny_batch(parties.whole, labels="tokens")
    assert sent_roles(parties, **batch)["attention_mask"] == "weight"
    parties.whole(**batch).loss.backward()
    parties.data_party.model(**batch).loss.backward()
    ours, expected = parties.data_party.model.bias.grad, parties.whole.bias.grad
    assert (ours - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_finding_roles_sends_nothing_draws_nothing_and_leaves_no_gradient(cut, kind):
    parties = cut(kind)
    batch = tiny_batch(parties.whole, labels="tokens")
    state, before = torch.get_rng_state(), parties.data_party.channel.messages
    parties.data_party.model(**batch)
    assert parties.data_party.channel.messages == before + 1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in parties.data_party.parameters())
    assert not parties.data_party.model.get_input_embeddings().weight.grad_fn


def test_frozen_embeddings_do_not_hide_the_text(cut):
    model = tiny_model("llama")
    model.requires_grad_(False)
    parties = cut(model=model)
    assert sent_roles(parties, **tiny_batch(parties.whole))["hidden_states"] == "smashed"


def test_given_embeddings_are_smashed_like_looked_up_ones(cut):
    parties = cut("llama")
    embeddings = parties.whole.get_input_embeddings()(
        tiny_batch(parties.whole)["input_ids"]
    ).detach()
    assert sent_roles(parties, inputs_embeds=embeddings)["hidden_states"] == "smashed"
    ours = parties.data_party.model(inputs_embeds=embeddings).logits
    assert torch.equal(ours, parties.whole(inputs_embeds=embeddings).logits)


def test_an_end_of_text_outside_the_vocabulary_is_no_word_to_try(cut):
    """GPT-2's config names 50256, also where it has 64 words."""
    parties = cut(model=tiny_model("gpt2", eos_token_id=50256))
    batch = tiny_batch(parties.whole, labels="tokens")
    assert torch.equal(parties.data_party.model(**batch).loss, parties.whole(**batch).loss)
