"""Attacks on shared updates: exact below the width, nothing at it, and refusals that say why."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from vflair_attacks.dager import Dager
from vflair_attacks.gradient_spans import span_of
from vflair_attacks.label_least_squares import LabelLeastSquares
from vflair_attacks.membership import MembershipResidual
from vflair_core import AttackError, Guess, Partition, split
from vflair_core.attacks.halves import halves
from vflair_core.testing import tiny_model
from vflair_core.training.tuning import Lora, tune

DROPLESS = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}

ROUGHLY = Dager(second=1e-2)  # for a head that the attacker knows without its small adapters


def shared(model, partition, rows, lora=None, step=0.0, size=1):
    """The updates that parties would share of `size` rows each, and the halves an attacker holds."""
    party, _ = split(model, partition)
    if lora is not None:
        tune(party, adapters=lora)
        for name, weight in party.model.named_parameters():
            if ".lora_B." in name:
                weight.data.normal_(std=step) if step else None
    head, tail = halves(tiny_model(model.config.model_type, **kept(model)), partition)
    party.model.train()
    updates = []
    for first in range(0, len(rows), size):
        some = rows[first : first + size]
        ids = pad_sequence(some, batch_first=True)
        labels = pad_sequence(some, batch_first=True, padding_value=-100)
        party.model.zero_grad()
        batch = {"input_ids": ids, "attention_mask": (labels >= 0).long(), "labels": labels}
        party.model(**batch, use_cache=False).loss.backward()
        named = party.model.named_parameters()
        updates.append({n: w.grad.clone() for n, w in named if w.grad is not None})
    return updates, head, tail, party


def kept(model):
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range")
    if model.config.model_type == "llama":
        names += ("num_key_value_heads",)
    sizes = {name: getattr(model.config, name) for name in names}
    return sizes | (DROPLESS if model.config.model_type == "gpt2" else {})


def sized(kind, **sizes):
    extra = DROPLESS if kind == "gpt2" else {}
    return tiny_model(kind, **{"vocab_size": 200, "hidden_size": 32, **extra, **sizes})


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_all_but_the_last_token_are_read_from_the_raw_gradient(kind):
    rows = [torch.randint(3, 200, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 5)]
    updates, head, _, _ = shared(sized(kind), Partition(2, 1), rows)
    guess = Dager()(updates, torch.tensor([9, 5]), head)
    for found, row in zip(guess.tokens, rows, strict=True):
        assert torch.equal(found[: len(row) - 1], row[:-1])
        assert bool((found[len(row) - 1 :] == -1).all())


def test_learned_positions_order_the_tokens_without_a_second_block():
    row = torch.randint(3, 200, (8,), generator=torch.Generator().manual_seed(0))
    updates, head, _, _ = shared(sized("gpt2"), Partition(1, 1), [row])
    guess = Dager()(updates, torch.tensor([8]), head)
    assert torch.equal(guess.tokens[0, :7], row[:7])


def test_without_positions_or_a_second_block_only_a_bag_is_there_and_it_says_so():
    row = torch.randint(3, 200, (6,))
    updates, head, _, _ = shared(sized("llama"), Partition(1, 1), [row])
    with pytest.raises(AttackError, match="a bag of tokens"):
        Dager()(updates, torch.tensor([6]), head)


def test_the_query_alone_is_not_taken():
    row = torch.randint(3, 200, (6,))
    updates, head, _, _ = shared(sized("llama"), Partition(2, 1), [row])
    only = {n: g for n, g in updates[0].items() if "q_proj" in n}
    with pytest.raises(AttackError, match="needs the gradient of the first block's attention"):
        Dager()([only], torch.tensor([6]), head)


def test_lora_at_its_first_step_is_refused_and_later_it_is_read():
    rows = [torch.randint(3, 200, (7,), generator=torch.Generator().manual_seed(3))]
    lora = Lora(r=16, target_modules=("v_proj",))
    updates, head, _, _ = shared(sized("llama"), Partition(2, 1), rows, lora)
    with pytest.raises(AttackError, match="LoRA starts with B = 0"):
        Dager()(updates, torch.tensor([7]), head)
    updates, head, _, _ = shared(sized("llama"), Partition(2, 1), rows, lora, step=1e-3)
    guess = ROUGHLY(updates, torch.tensor([7]), head)
    assert torch.equal(guess.tokens[0, :6], rows[0][:6])


def test_a_lora_rank_below_the_number_of_tokens_hides_them():
    rows = [torch.randint(3, 200, (9,), generator=torch.Generator().manual_seed(3))]
    lora = Lora(r=4, target_modules=("v_proj",))
    updates, head, _, _ = shared(sized("llama"), Partition(2, 1), rows, lora, step=1e-3)
    assert len(span_of(updates[0], head, 0, 1e-6).basis) == 4
    assert Dager()(updates, torch.tensor([9]), head).tokens.tolist() == [[-1] * 9]


def test_one_step_of_adam_fills_the_span():
    """Raw gradients only: what Adam applies is no longer of low rank."""
    row = torch.randint(3, 200, (8,), generator=torch.Generator().manual_seed(0))
    updates, head, _, _ = shared(sized("llama"), Partition(2, 1), [row])
    adam = {n: g / (g.abs() + 1e-8) for n, g in updates[0].items()}
    assert len(span_of(updates[0], head, 0, 1e-6).basis) == 7
    assert span_of(adam, head, 0, 1e-6).is_everything


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_output_layers_gradient_gives_all_tokens_below_its_rank(kind):
    rows = [
        torch.randint(3, 200, (n,), generator=torch.Generator().manual_seed(n)) for n in (12, 7)
    ]
    party_model, partition = sized(kind, tie_word_embeddings=False), Partition(1, 2)
    updates, _, _, party = shared(party_model, partition, rows)
    returned = returned_of(party, rows)
    _, tail = halves(sized(kind, tie_word_embeddings=False), partition)
    lengths = torch.tensor([12, 7])
    guess = LabelLeastSquares()(updates, returned, lengths, partition, "causal-lm", tail)
    for found, row in zip(guess.tokens, rows, strict=True):
        assert torch.equal(found[1 : len(row)], row[1:])


def test_a_tied_output_layer_is_found_under_the_name_of_the_embeddings_and_read_all_but_exactly():
    """GPT-2 as it is initialised: what the input embeddings add to the gradient is small."""
    model, partition = (
        sized("gpt2", tie_word_embeddings=True, initializer_range=0.02),
        Partition(1, 2),
    )
    rows = words(12, 7, 11, 9)
    updates, _, _, party = shared(model, partition, rows)
    assert "lm_head.weight" not in updates[0]
    _, tail = halves(sized("gpt2", tie_word_embeddings=True, initializer_range=0.02), partition)
    lengths = torch.tensor([len(row) for row in rows])
    guess = LabelLeastSquares()(
        updates, returned_of(party, rows), lengths, partition, "causal-lm", tail
    )
    right = [found[1 : len(row)] == row[1:] for found, row in zip(guess.tokens, rows, strict=True)]
    assert sum(int(each.sum()) for each in right) >= 34  # of 35


@pytest.mark.parametrize("lengths", [(9, 6), (5, 9)])
def test_the_rows_of_a_batch_are_solved_for_together(lengths):
    """Each text's states say which rows are its own: the order within the update is not lost."""
    rows, partition = words(*lengths, seed=5), Partition(1, 2)
    updates, _, _, party = shared(
        sized("llama", tie_word_embeddings=False), partition, rows, size=2
    )
    _, tail = halves(sized("llama", tie_word_embeddings=False), partition)
    guess = LabelLeastSquares()(
        updates, returned_of(party, rows), torch.tensor(lengths), partition, "causal-lm", tail
    )
    for found, row in zip(guess.tokens, rows, strict=True):
        assert torch.equal(found[1 : len(row)], row[1:])


def returned_of(party, rows):
    from vflair_core import Transcript
    from vflair_core.attacks.observables import Observables

    with party.channel.tap(Transcript()) as transcript, torch.no_grad():
        for row in rows:
            party.model(input_ids=row[None], use_cache=False)
    return Observables(transcript.messages, victims=len(rows))["returned"]


def test_least_squares_names_the_gradient_that_is_missing():
    row = torch.randint(3, 200, (5,))
    updates, _, tail, party = shared(sized("llama"), Partition(1, 1), [row])
    rest = {n: g for n, g in updates[0].items() if "lm_head" not in n}
    with pytest.raises(AttackError, match=r"needs the gradient of lm_head.weight"):
        LabelLeastSquares()(
            [rest], returned_of(party, [row]), torch.tensor([5]), Partition(1, 1), "causal-lm", tail
        )


def words(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 200, (n,), generator=generator) for n in lengths]


def told(guess):
    """What a guess says of each victim, as a set: within an update there is no order."""
    return {tuple(row[row >= 0].tolist()) for row in guess.tokens}


def beginnings(rows):
    return {tuple(row[:-1].tolist()) for row in rows}


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_texts_that_share_an_update_are_read_apart(kind):
    rows = words(9, 5, 7, 9, 4, 8)
    updates, head, _, _ = shared(sized(kind, hidden_size=64), Partition(2, 1), rows, size=3)
    guess = Dager()(updates, torch.tensor([9, 5, 7, 9, 4, 8]), head)
    assert told(guess) == beginnings(rows)
    first = Guess(tokens=guess.tokens[:3])
    assert told(first) == beginnings(rows[:3])  # and each update's rows are its own


def test_texts_that_begin_alike_repeat_themselves_or_permute_each_other_are_read_apart():
    start = torch.tensor([7, 7, 11])
    ends = torch.tensor([[20, 21, 22, 9], [20, 22, 21, 9], [30, 30, 30, 9]])
    rows = [torch.cat([start, end]) for end in ends]
    updates, head, _, _ = shared(sized("llama"), Partition(2, 1), rows, size=3)
    assert told(Dager()(updates, torch.full((3,), 7), head)) == beginnings(rows)


def test_a_text_sent_twice_is_found_once():
    rows = words(7) * 2
    updates, head, _, _ = shared(sized("llama"), Partition(2, 1), rows, size=2)
    assert told(Dager()(updates, torch.full((2,), 7), head)) == beginnings(rows) | {()}


def test_several_texts_are_not_joined_without_a_second_block():
    updates, head, _, _ = shared(sized("gpt2"), Partition(1, 1), words(5, 5), size=2)
    with pytest.raises(AttackError, match="which tokens of 2 texts belong together"):
        Dager()(updates, torch.tensor([5, 5]), head)


def test_a_beam_that_cannot_hold_the_texts_of_an_update_is_refused():
    updates, head, _, _ = shared(sized("gpt2"), Partition(2, 1), words(3, 3, 3, 3), size=4)
    with pytest.raises(AttackError, match=r"holds 4 victims, and dager keeps beam = 3.*beam = 8"):
        Dager(beam=3)(updates, torch.full((4,), 3), head)


@pytest.mark.parametrize(("rank", "dimensions"), [(8, 8), (16, 14), (32, 14)])
def test_a_lora_update_of_a_batch_spans_its_rank_or_all_rows_with_a_gradient(rank, dimensions):
    """Two texts of 8 tokens: 14 rows, since the last of each has no gradient. min(r, 14), and below that nothing."""
    rows, lora = words(8, 8), Lora(r=rank, target_modules=("v_proj",))
    model = sized("llama", num_key_value_heads=2)
    updates, head, _, _ = shared(model, Partition(2, 1), rows, lora, step=1e-3, size=2)
    assert len(span_of(updates[0], head, 0, 1e-6).basis) == dimensions
    guess = ROUGHLY(updates, torch.tensor([8, 8]), head)
    assert told(guess) == (beginnings(rows) if dimensions == 14 else {()})


def test_queries_and_keys_say_what_values_of_few_heads_cannot():
    """The values of one of two heads have 16 outputs, and 24 rows have a gradient."""
    rows = words(9, 9, 9)
    updates, head, _, _ = shared(sized("llama"), Partition(2, 1), rows, size=3)
    alone = {n: g for n, g in updates[0].items() if "q_proj" not in n and "k_proj" not in n}
    assert len(span_of(alone, head, 0, 1e-6).basis) == 16
    assert told(Dager()([alone], torch.full((3,), 9), head)) == {()}
    assert len(span_of(updates[0], head, 0, 1e-6).basis) == 24
    assert told(Dager()(updates, torch.full((3,), 9), head)) == beginnings(rows)


class Words:
    """A tokenizer of numbers in a string."""

    def __call__(self, text, truncation, max_length):
        return {"input_ids": [int(word) for word in text.split()][:max_length]}


def test_members_lie_in_the_span_and_strangers_of_the_same_words_do_not():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 200, (8,), generator=generator) for _ in range(4)]
    updates, head, _, _ = shared(sized("llama"), Partition(2, 1), rows)
    shuffled = [torch.cat([row[:-1].flip(0), row[-1:]]) for row in rows]
    others = [torch.randint(3, 200, (8,), generator=generator) for _ in range(4)]
    texts = [" ".join(map(str, row.tolist())) for row in (*rows, *shuffled, *others)]
    guess = MembershipResidual()(updates, texts, torch.full((4,), 8), Words(), head)
    assert (guess.members > 0).tolist() == [True] * 4 + [False] * 8
