"""The law of the crossing: what has not been through every defense that covers it does not leave."""

from __future__ import annotations

import copy

import pytest
import torch
from attrs import define
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from vflair_core.communication.transcript import Transcript
from vflair_core.defenses.defense import Defense
from vflair_core.errors import DefenseError
from vflair_core.testing import tiny_batch, tiny_model

KINDS = ["llama", "gpt2", "qwen2", "bert", "roberta"]


class Blank(Defense):
    """Whatever the text is, zeros cross."""

    def on_smashed(self, smashed, exchange):
        return smashed * 0


class BlankEmbeddings(Defense):
    """Whatever the text is, the first block is given the same."""

    def on_embeddings(self, embeddings, exchange):
        return embeddings * 0 + torch.linspace(-1, 1, embeddings.shape[-1])


class OtherLabels(Defense):
    covers = frozenset({"labels"})

    def on_labels(self, labels, exchange):
        return torch.where(labels < 0, labels, 1)


@define(eq=False)
class Charge(Defense):
    """Adds 100 to the loss."""

    def penalty(self, exchange):
        return torch.tensor(100.0)


def sent_of(party, run):
    """What the tensors named hidden_states were in every exchange of `run`, and all names by role."""
    with party.channel.tap(Transcript()) as transcript:
        run(party.model)
    sent = [r for r in transcript.messages if r.direction == "sent" and r.exchange]
    hidden = [r.tensor for r in sent if r.name.endswith("hidden_states")]
    return hidden, {(r.name, r.role) for r in sent}


def words(model, length=7, seed=0):
    return tiny_batch(model, rows=2, length=length, seed=seed)


# -- roles ----------------------------------------------------------------------------------------------


def padding_only(pad):
    return {"input_ids": torch.full((1, 4), pad)}


def one_word_and_padding(pad):
    mask = torch.tensor([[1, 0, 0, 0]])
    return {"input_ids": torch.tensor([[9, pad, pad, pad]]), "attention_mask": mask}


def one_word(_pad):
    return {"input_ids": torch.tensor([[9]])}


def end_only(_pad):
    return {"input_ids": torch.full((1, 3), 2)}


@pytest.mark.parametrize("first", [padding_only, one_word_and_padding, one_word, end_only])
@pytest.mark.parametrize("kind", KINDS)
def test_no_first_text_makes_hidden_states_anything_but_smashed(cut, kind, first):
    task = "causal-lm" if kind in {"llama", "gpt2", "qwen2"} else "classification"
    model = tiny_model(kind, task, pad_token_id=0, eos_token_id=2)
    party = cut(model=model, defenses=[Blank()]).data_party
    party.model(**first(0))
    party.model.train()
    hidden, roles = sent_of(party, lambda model: model(**words(model)))
    party.model.eval()
    if task == "causal-lm":
        prompt = words(party.model, length=4)
        more, also = sent_of(
            party, lambda model: model.generate(**prompt, max_new_tokens=3, do_sample=False)
        )
        hidden, roles = hidden + more, roles | also
    assert hidden
    assert not any(tensor.any() for tensor in hidden)
    assert {role for name, role in roles if name == "hidden_states"} == {"smashed"}


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 2}, {"num_beams": 2}, {}])
@pytest.mark.parametrize("kind", ["t5", "bart", "llama"])
def test_every_step_of_every_way_to_generate_is_defended(cut, kind, options):
    task = "causal-lm" if kind == "llama" else "seq2seq"
    deep = {"num_decoder_layers": 4} if kind == "t5" else {}
    party = cut(model=tiny_model(kind, task, **deep), defenses=[Blank()]).data_party
    prompt = {"input_ids": torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])}
    hidden, _ = sent_of(
        party,
        lambda model: model.generate(**prompt, max_new_tokens=6, do_sample=False, **options),
    )
    assert len(hidden) > 2
    assert not any(tensor.any() for tensor in hidden)


def test_the_party_counts_what_crossed_in_which_role_and_what_was_bypassed(cut):
    party = cut("llama", defenses=[Blank()]).data_party
    party.model(**words(party.model), use_cache=False)
    once = party.crossed
    assert once["smashed"] == 1
    assert once["structure"] >= 2
    assert "bypassed" not in once
    with party.defenses.bypassing():
        hidden, _ = sent_of(party, lambda model: model(**words(model), use_cache=False))
    assert party.crossed == {**{name: 2 * n for name, n in once.items()}, "bypassed": 1}
    assert hidden[0].any()


def test_a_layer_of_the_model_party_that_is_called_by_itself_goes_round_no_defense(cut):
    party = cut("gpt2", defenses=[BlankEmbeddings()]).data_party
    seen = []
    layers = party.model.transformer.h
    hooks = [
        layer.register_forward_hook(lambda *call: seen.append(call[1:3]), with_kwargs=True)
        for layer in list(layers)[1:-1]
    ]
    party.model(**words(party.model), use_cache=False)
    for hook in hooks:
        hook.remove()
    before, (args, named) = party.channel.messages, seen[0]

    def call_them():
        hidden = torch.randn(args[0].shape)
        for layer in list(layers)[1:-1]:
            hidden = layer(hidden, *args[1:], **named)

    with pytest.raises(DefenseError, match=r"BlankEmbeddings stands at on_embeddings.*went round"):
        call_them()
    assert party.channel.messages == before


# -- embeddings -----------------------------------------------------------------------------------------


def looked_up(party, ids):
    return {"input_ids": ids}


def given(party, ids):
    return {"inputs_embeds": party.model.get_input_embeddings()(ids).detach()}


def replaced(party, ids):
    old = party.model.get_input_embeddings()
    new = nn.Embedding(*old.weight.shape)
    party.model.set_input_embeddings(new)
    return {"input_ids": ids}


def resized(party, ids):
    party.model.resize_token_embeddings(70)
    return {"input_ids": ids}


TABLES = {"llama": "embed_tokens", "gpt2": "wte"}


@pytest.mark.parametrize("way", [looked_up, given, replaced, resized])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_goes_into_the_first_block_has_been_defended(cut, kind, way):
    party = cut(kind, defenses=[BlankEmbeddings()]).data_party
    first, second = (words(party.model, seed=seed)["input_ids"] for seed in (1, 2))
    inputs = [way(party, ids) for ids in (first, second)]
    sent = [sent_of(party, lambda model, i=i: model(**i))[0] for i in inputs]
    assert torch.equal(sent[0][0], sent[1][0])
    with party.defenses.bypassing():
        sent = [sent_of(party, lambda model, i=i: model(**i))[0] for i in inputs]
    assert not torch.equal(sent[0][0], sent[1][0])


# peft 0.21 asks transformers 5.23 by a name that transformers deprecates.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("early", [False, True], ids=["adapter first", "called before"])
@pytest.mark.parametrize("adapter", ["lora", "whole table", "prompt"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters_are_defended_with_what_they_adapt(cut, kind, adapter, early):
    table = TABLES[kind]
    config = {
        "lora": LoraConfig(target_modules=[table], r=2),
        "whole table": LoraConfig(
            target_modules=["mlp.up_proj" if kind == "llama" else "mlp.c_fc"],
            modules_to_save=[table],
            layers_to_transform=[0],
            fan_in_fan_out=kind == "gpt2",
        ),
        "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }[adapter]
    party = cut(kind, defenses=[BlankEmbeddings()]).data_party
    first, second = (words(party.model, seed=seed)["input_ids"] for seed in (1, 2))
    if early:
        party.model(input_ids=first)
    whole = get_peft_model(party.model, config)
    for name, weight in whole.named_parameters():
        if "lora_embedding" in name:
            nn.init.normal_(weight)
    sent = [
        sent_of(party, lambda _, ids=ids: whole(input_ids=ids))[0][0] for ids in (first, second)
    ]
    assert torch.equal(sent[0], sent[1])


class SecondTable(LlamaForCausalLM):
    """Reads the text once more, behind the embeddings."""

    def forward(self, input_ids=None, **inputs):
        embeddings = self.get_input_embeddings()(input_ids)
        return super().forward(inputs_embeds=embeddings + self.more(input_ids), **inputs)


class OnesOwnLookUp(LlamaForCausalLM):
    """Reads the table without calling it."""

    def forward(self, input_ids=None, **inputs):
        table = self.get_input_embeddings().weight
        return super().forward(inputs_embeds=functional.embedding(input_ids, table), **inputs)


@pytest.mark.parametrize("model_class", [SecondTable, OnesOwnLookUp])
def test_text_that_reaches_the_cut_by_another_way_than_the_embeddings_is_refused(cut, model_class):
    model = tiny_model("llama")
    model.more = nn.Embedding(64, model.config.hidden_size)
    model.__class__ = model_class
    party = cut(model=model, defenses=[BlankEmbeddings()]).data_party
    before = party.channel.messages
    with pytest.raises(
        DefenseError, match=r"hidden_states would tell the text by another way|went"
    ):
        party.model(**words(model))
    assert party.channel.messages == before


def test_copying_the_table_copies_no_party(cut):
    party = cut("llama", defenses=[BlankEmbeddings()]).data_party
    table = party.model.get_input_embeddings()
    assert not table._forward_hooks
    assert torch.equal(copy.deepcopy(table).weight, table.weight)


# -- labels and the loss --------------------------------------------------------------------------------


def smoothed(outputs, batch):
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    return functional.cross_entropy(logits, labels, label_smoothing=0.1)


def of_logits(model, batch):
    return smoothed(model(**{k: v for k, v in batch.items() if k != "labels"}), batch)


def of_logits_though_labels_were_given(model, batch):
    return smoothed(model(**batch), batch)


def of_hidden_states(model, batch):
    return model(**batch, output_hidden_states=True).hidden_states[-1].square().mean()


def of_an_inner_model(model, batch):
    return model.model(batch["input_ids"]).last_hidden_state.square().mean()


def of_a_tuple(model, batch):
    return model(**batch, return_dict=False)[1].square().mean()


def of_both(model, batch):
    outputs = model(**batch)
    return outputs.loss + outputs.logits.square().mean()


def of_evaluation(model, batch):
    model.eval()
    return model(**batch).loss


@pytest.mark.parametrize(
    "loss",
    [
        of_logits,
        of_logits_though_labels_were_given,
        of_hidden_states,
        of_an_inner_model,
        of_a_tuple,
        of_both,
        of_evaluation,
    ],
)
@pytest.mark.parametrize("defense", [OtherLabels(), Charge()], ids=["labels", "penalty"])
@pytest.mark.parametrize("tail", [1, 0], ids=["HBT", "HT"])
def test_no_gradient_leaves_of_a_loss_that_the_defense_has_not_seen(cut, tail, defense, loss):
    if loss in {of_an_inner_model, of_hidden_states} and tail == 0:
        return  # the hidden states of the last layers do not come back
    party = cut("llama", 1, tail, defenses=[defense]).data_party
    party.model.train()
    batch = tiny_batch(party.model, labels="tokens")
    if loss is of_evaluation and isinstance(defense, Charge):
        loss(party.model, batch).backward()  # a charge is for training, and gives nothing away
        return
    if loss is of_a_tuple and isinstance(defense, Charge):
        with pytest.raises(DefenseError, match="return_dict=True"):
            loss(party.model, batch)
        return
    with party.channel.tap(Transcript()) as transcript:
        scored = loss(party.model, batch)
        with pytest.raises(
            DefenseError, match=rf"{type(defense).__name__} stands at.*went round it"
        ):
            scored.backward()
    assert "hidden_grad" not in {record.role for record in transcript.messages}


@pytest.mark.parametrize("defense", [OtherLabels(), Charge()], ids=["labels", "penalty"])
def test_a_tensor_that_a_hook_took_from_the_inside_sends_no_gradient_by_itself(cut, defense):
    party = cut("llama", defenses=[defense]).data_party
    taken = []
    party.model.lm_head.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    party.model.train()
    party.model(**tiny_batch(party.model, labels="tokens"))
    with (
        party.channel.tap(Transcript()) as transcript,
        pytest.raises(DefenseError, match=rf"{type(defense).__name__} stands at.*went round it"),
    ):
        taken[-1].square().mean().backward()
    assert not transcript.messages


@pytest.mark.parametrize("tail", [1, 0])
def test_the_loss_that_the_defenses_have_seen_goes_back_again_and_again(cut, tail):
    parties = cut("llama", 1, tail, defenses=[OtherLabels(), Charge()])
    batch = tiny_batch(parties.whole, labels="tokens")
    parties.data_party.model.train()
    for _ in range(2):
        loss = parties.data_party.model(**batch).loss
        loss.backward(retain_graph=True)
        (loss / 2).backward()
    parties.whole.train()
    ones = torch.where(batch["labels"] < 0, batch["labels"], 1)
    expected = parties.whole(**{**batch, "labels": ones}).loss
    assert torch.allclose(loss, expected + 100)


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **_):  # noqa: FBT002 - transformers' signature
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
        return (loss, outputs) if return_outputs else loss


def outside(outputs, labels, **_):
    return functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("way", ["label_smoothing_factor", "compute_loss_func", "compute_loss"])
@pytest.mark.parametrize("defense", [OtherLabels(), Charge()], ids=["labels", "penalty"])
def test_a_trainer_with_a_loss_of_its_own_sends_no_gradient(cut, tmp_path, defense, way):
    party = cut("llama", defenses=[defense]).data_party
    batch = tiny_batch(party.model, rows=4, labels="tokens")
    rows = [{key: value[n] for key, value in batch.items()} for n in range(4)]
    smoothing = 0.1 if way == "label_smoothing_factor" else 0.0
    options = TrainingArguments(
        tmp_path, max_steps=1, report_to=[], label_smoothing_factor=smoothing, use_cpu=True
    )
    make = OwnLoss if way == "compute_loss" else Trainer
    more = {"compute_loss_func": outside} if way == "compute_loss_func" else {}
    trainer = make(party.model, options, train_dataset=rows, **more)
    with (
        party.channel.tap(Transcript()) as transcript,
        pytest.raises(DefenseError, match=type(defense).__name__),
    ):
        trainer.train()
    assert "hidden_grad" not in {record.role for record in transcript.messages}
