"""Attacks on shared updates: exact below the width, nothing at it, and refusals that say why."""

from __future__ import annotations

import pytest
import torch

from vflair_attacks.dager import Dager
from vflair_attacks.gradient_spans import span_of
from vflair_attacks.label_least_squares import LabelLeastSquares
from vflair_attacks.membership import MembershipResidual
from vflair_core import AttackError, Partition, split
from vflair_core.halves import halves
from vflair_core.testing import tiny_model
from vflair_core.tuning import Lora, tune

DROPLESS = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


def shared(model, partition, rows, lora=None, step=0.0):
    """The updates that parties would share for each row alone, and the halves an attacker holds."""
    party, _ = split(model, partition)
    if lora is not None:
        tune(party, adapters=lora)
        for name, weight in party.model.named_parameters():
            if ".lora_B." in name:
                weight.data.normal_(std=step) if step else None
    head, tail = halves(tiny_model(model.config.model_type, **kept(model)), partition)
    party.model.train()
    updates = []
    for row in rows:
        party.model.zero_grad()
        party.model(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
        named = party.model.named_parameters()
        updates.append({n: w.grad.clone() for n, w in named if w.grad is not None})
    return updates, head, tail, party


def kept(model):
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range")
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
    guess = Dager()(updates, torch.tensor([7]), head)
    assert torch.equal(guess.tokens[0, :6], rows[0][:6])


def test_a_lora_rank_below_the_number_of_tokens_hides_them():
    rows = [torch.randint(3, 200, (9,), generator=torch.Generator().manual_seed(3))]
    lora = Lora(r=4, target_modules=("v_proj",))
    updates, head, _, party = shared(sized("llama"), Partition(2, 1), rows, lora, step=1e-3)
    assert len(span_of(updates[0], party.model, 0, 1e-6).basis) == 4
    assert Dager()(updates, torch.tensor([9]), head).tokens.tolist() == [[-1] * 9]


def test_one_step_of_adam_fills_the_span():
    """Raw gradients only: what Adam applies is no longer of low rank."""
    row = torch.randint(3, 200, (8,), generator=torch.Generator().manual_seed(0))
    updates, _, _, party = shared(sized("llama"), Partition(2, 1), [row])
    adam = {n: g / (g.abs() + 1e-8) for n, g in updates[0].items()}
    assert len(span_of(updates[0], party.model, 0, 1e-6).basis) == 7
    values = party.model.model.layers[0].self_attn.v_proj.weight
    assert len(span_of(adam, party.model, 0, 1e-6).basis) == min(values.shape) == 16


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


def returned_of(party, rows):
    from vflair_core import Transcript
    from vflair_core.attack import Observables

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
