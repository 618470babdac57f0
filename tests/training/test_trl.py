"""TRL's trainers for instructions and preferences across the cut: they take the steps of the unsplit model."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vflair_core import Lora, Partition, SplitCallback, split, tune
from vflair_core.testing import tiny_model

trl = pytest.importorskip("trl")

CUTS = [Partition(1, 1), Partition(1, 0)]
TARGETS = ["q_proj", "up_proj"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def words(seed):
    return " ".join(f"w{(number * 7 + seed) % 60 + 3}" for number in range(8))


TEXTS = Dataset.from_list([{"text": words(n)} for n in range(8)])
CONVERSATIONS = Dataset.from_list(
    [{"prompt": words(n), "completion": " " + words(n + 5)} for n in range(8)]
)
PREFERENCES = Dataset.from_list(
    [{"prompt": words(n), "chosen": words(n + 3), "rejected": words(n + 9)} for n in range(8)]
)


def tokenizer():
    made = Tokenizer(models.WordLevel({f"w{n}": n for n in range(64)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w1", eos_token="w2")


def trainer_of(make, config, folder, model, callbacks, data, **options):
    arguments = config(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0.3,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    return make(
        model=model,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer(),
        callbacks=callbacks,
        **options,
    )


def logged(trainer):
    torch.manual_seed(0)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def halves(kind, partition):
    whole = tiny_model(kind, tie_word_embeddings=False)
    return whole, *split(copy.deepcopy(whole), partition, wire=True)


def close(found, expected):
    return found == pytest.approx(expected, rel=1e-5) and len(set(found)) == 3


@pytest.mark.parametrize("partition", CUTS, ids=lambda partition: partition.kind)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("data", [TEXTS, CONVERSATIONS], ids=["texts", "completions"])
def test_fine_tuning_on_instructions(kind, partition, data, tmp_path):
    whole, data_party, model_party = halves(kind, partition)
    what = (trl.SFTTrainer, trl.SFTConfig, tmp_path)
    expected = logged(trainer_of(*what, whole, [], data))
    found = logged(trainer_of(*what, data_party.model, [SplitCallback(data_party)], data))
    assert close(found, expected)
    names = dict(whole.named_parameters())
    for party in (data_party, model_party):
        for name, weight in party.named_parameters():
            assert torch.allclose(weight, names[name], atol=1e-4), name


@pytest.mark.parametrize("partition", CUTS, ids=lambda partition: partition.kind)
def test_preferences_against_the_model_without_its_adapters(partition, tmp_path):
    whole, data_party, model_party = halves("llama", partition)
    tune(model_party, adapters=Lora(r=2, target_modules=TARGETS))
    config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=TARGETS)
    what = (trl.DPOTrainer, trl.DPOConfig, tmp_path)
    trainers = [
        trainer_of(*what, model, callbacks, PREFERENCES, peft_config=config)
        for model, callbacks in ((whole, []), (data_party.model, [SplitCallback(data_party)]))
    ]
    adapted = dict(whole.named_parameters())
    with torch.no_grad():
        for name, weight in adapted.items():
            if ".lora_" in name:  # so that switching them off makes a difference from the start
                weight.copy_(0.1 * torch.randn(weight.shape))
        for party in (data_party, model_party):
            for name, weight in party.named_parameters():
                weight.copy_(adapted[name])
    expected, found = map(logged, trainers)
    assert close(found, expected)
    assert abs(expected[0] - 0.6931) > 0.01  # log 2: nothing would tell it from its reference


@pytest.mark.parametrize("partition", CUTS, ids=lambda partition: partition.kind)
def test_preferences_against_a_model_of_reference(partition, tmp_path):
    whole, data_party, _ = halves("llama", partition)
    reference = tiny_model("llama", seed=5, tie_word_embeddings=False)
    other, _ = split(copy.deepcopy(reference), partition)
    what = (trl.DPOTrainer, trl.DPOConfig, tmp_path)
    expected = logged(trainer_of(*what, whole, [], PREFERENCES, ref_model=reference))
    callbacks = [SplitCallback(data_party)]
    model = data_party.model
    found = logged(trainer_of(*what, model, callbacks, PREFERENCES, ref_model=other.model))
    assert close(found, expected)
