"""What an attacker's half gives, against the whole model; and what a mechanism can draw."""

from __future__ import annotations

import pytest
import torch

from vflair_core import Partition
from vflair_core.attacks.halves import halves
from vflair_core.defenses.mechanism import ComposedMechanism, Mechanism
from vflair_core.testing import crossed, numbers_as_texts, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "gemma"])
@pytest.mark.parametrize("cut", [0, 2])
def test_embeddings_of_the_tokens_give_the_same_smashed_data_as_the_tokens(kind, cut):
    task = "classification" if kind == "bert" else "causal-lm"
    head, _ = halves(
        tiny_model(
            kind,
            task=task,
            **({"head_dim": 8, "num_key_value_heads": 1} if kind == "gemma" else {}),
        ),
        Partition(cut, 1),
    )
    ids = torch.randint(3, 60, (2, 5))
    assert torch.equal(head(inputs_embeds=head.vectors()[ids]), head(ids))


def test_what_crossed_for_a_test_is_what_the_head_gives():
    rows = [torch.randint(3, 60, (n,)) for n in (5, 3)]
    knowledge = crossed(tiny_model("gpt2"), Partition(2, 1), rows, labels=rows)
    for number, row in enumerate(rows):
        expected = knowledge["head"](row[None])[0]
        assert torch.equal(knowledge["smashed"][number, : len(row)], expected)
    assert knowledge["hidden_grad"].shape == knowledge["returned"].shape


class Shifted(Mechanism):
    def expected(self, hidden):
        return hidden + 1


class Noisy(Mechanism):
    def sample(self, hidden, generator):
        return hidden + torch.randn(hidden.shape, generator=generator)


def test_a_mechanism_without_noise_draws_what_it_expects():
    hidden = torch.randn(3, 4)
    assert torch.equal(Shifted().sample(hidden, torch.Generator()), hidden + 1)


def test_defenses_in_a_row_draw_in_their_order_with_the_noise_of_each():
    hidden, seeds = torch.zeros(4), [torch.Generator().manual_seed(7) for _ in range(2)]
    drawn = ComposedMechanism([Noisy(), Shifted(), Noisy()]).sample(hidden, seeds[0])
    expected = torch.randn(4, generator=seeds[1]) + 1
    assert torch.equal(drawn, expected + torch.randn(4, generator=seeds[1]))


def test_numbers_written_as_texts_are_read_back():
    ids = torch.arange(1, 201).view(10, 20)
    tokenizer = tiny_tokenizer(201)
    assert torch.tensor(tokenizer(numbers_as_texts(ids))["input_ids"]).equal(ids)


def test_they_tell_names_and_parts_of_the_whole_model():
    model = tiny_model("llama")
    head, tail = halves(model, Partition(1, 1))
    other, _ = halves(model, Partition(1, 1))
    assert head.partition == Partition(1, 1)
    names = {name for name, _ in head.named_parameters()}
    assert "model.embed_tokens.weight" in names  # of the head, and of the tail of the same model
    assert "lm_head.weight" in names
    assert "model.layers.1.mlp.up_proj.weight" not in names
    assert (
        head.get_submodule("model.layers.0.mlp") is dict(tail.named_modules())["model.layers.0.mlp"]
    )
    assert tail.is_of(head)
    assert not tail.is_of(other)


def test_a_head_stops_at_the_cut(monkeypatch):
    head, _ = halves(tiny_model("llama"), Partition(1, 1))

    def refuse(*_):
        raise AssertionError("what lies behind the cut is no business of the head")

    monkeypatch.setattr("vflair_core.parties.data_party.recorder.Shapes.of", refuse)
    ids = torch.arange(3, 9)[None]
    assert head(ids).shape == (1, 6, 16)
    assert head.try_tokens(ids, head.cache()).shape == (1, 6, 16)
