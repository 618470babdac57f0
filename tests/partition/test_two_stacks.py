"""Models with an encoder and a decoder have two cuts: defenses and attacks know which is which."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from vflair_core import Example, Partition, split
from vflair_core.attacks.observables import Observables
from vflair_core.defenses.defense import Defense
from vflair_core.experiments.capture import record_victims
from vflair_core.tasks.tokenization import InputFormat
from vflair_core.tasks.tokenizer_training import train_tokenizer

TOKENIZER = train_tokenizer(["Ada wrote the first program.", "Where is she?"] * 3, 320)


def test_in_a_model_with_two_stacks_each_cut_is_masked_by_what_it_reads():
    seen = []

    class Note(Defense):
        def on_smashed(self, smashed, exchange):
            seen.append((exchange.axes, tuple(smashed.shape[:2]), exchange.mask.tolist()))
            return smashed

    config = AutoConfig.for_model(
        "t5", vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2
    )
    config.decoder_start_token_id = 0
    party, _ = split(AutoModelForSeq2SeqLM.from_config(config), Partition(1, 1), defenses=[Note()])
    ids = torch.tensor([[5, 6, 7, 8, 1], [5, 6, 1, 0, 0]])
    labels = torch.tensor([[9, 4, 1], [9, 1, -100]])
    party.model(input_ids=ids, attention_mask=(ids > 0).long(), labels=labels, use_cache=False)
    text, answer = [[1] * 5, [1, 1, 1, 0, 0]], [[1, 1, 1], [1, 1, 0]]
    assert seen[0] == ("BTD", (2, 5), text)
    assert seen[1:] == [("BTD", (2, 3), answer), ("BTD", (2, 5), text)]


def test_an_attack_sees_what_the_encoder_read_once_for_each_victim_and_release():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "t5", vocab_size=len(TOKENIZER), d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2
    )
    config.decoder_start_token_id = 0
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    party, _ = split(model, Partition(1, 1), tokenizer=TOKENIZER)
    party.take_up_format(InputFormat("seq2seq", two_stacks=True))
    victims = [Example("Where is she?", answer="Ada"), Example("Ada wrote", answer="the first one")]
    crossed = record_victims(party, victims, max_length=16, releases=2, gradients=False)
    seen = Observables(crossed.transcript.messages, releases=2, victims=2)
    assert seen["lengths"].tolist() == [len(row.ids) for row in crossed.rows]
    assert seen["releases"].shape[:2] == (2, 2)
    for n, row in enumerate(crossed.rows):
        alone = party.smashed(input_ids=torch.tensor([row.ids]))
        assert torch.allclose(seen["smashed"][n, : len(row.ids)], alone[0], atol=1e-6)
        assert torch.equal(seen["releases"][0, n], seen["releases"][1, n])
