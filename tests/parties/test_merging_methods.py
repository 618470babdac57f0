"""Adapters of every sort that two parties can train are joined: into the weights, and into one adapter that peft reads."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from vflair_core import CheckpointError, FineTuning, Partition, Train, merge, split, tune
from vflair_core.testing import tiny_batch, tiny_model

METHODS = {
    "LoRA": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "rsLoRA": lambda: peft.LoraConfig(r=4, use_rslora=True, target_modules=["q_proj"]),
    "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "v_proj"]),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "IA3, feed-forward": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "IA3, patterns": lambda: peft.IA3Config(
        target_modules=r".*\.(k_proj|down_proj)", feedforward_modules=r".*\.down_proj"
    ),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, tinit=1, tfinal=2, target_modules=["q_proj"]
    ),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=["q_proj"]),
    "LoKr": lambda: peft.LoKrConfig(r=4, target_modules=["q_proj"]),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=["q_proj"]),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=8, target_modules=["q_proj"]),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
}


def trained(config, tmp_path):
    """Both halves of a trained model on disk, what it says of a batch, and the batch."""
    data_party, model_party = split(tiny_model("llama"), Partition(1, 1))
    for party in (data_party, model_party):
        tune(party, adapters=config())
    batch = tiny_batch(data_party.model, labels="tokens")
    run = FineTuning(data_party, Train(steps=2, learning_rate=0.05))
    losses = [run.step(batch) for _ in range(2)]
    assert losses[1] != losses[0]
    del batch["labels"]
    data_party.model.eval()
    with torch.no_grad():
        said = data_party.model(**batch, use_cache=False).logits
    data_party.save(tmp_path / "data")
    model_party.save(tmp_path / "model")
    return said, batch


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_merged_and_written_as_one_adapter(tmp_path, method):
    said, batch = trained(METHODS[method], tmp_path)
    halves, base = (tmp_path / "data", tmp_path / "model"), {"base": tiny_model("llama")}
    merged = AutoModelForCausalLM.from_pretrained(merge(*halves, tmp_path / "merged", **base))
    folder = merge(*halves, tmp_path / "adapter", adapter=True, **base)
    adapted = peft.PeftModel.from_pretrained(tiny_model("llama"), folder)
    with torch.no_grad():
        assert torch.equal(adapted.eval()(**batch, use_cache=False).logits, said)
        torch.testing.assert_close(
            merged.eval()(**batch, use_cache=False).logits, said, atol=1e-4, rtol=1e-4
        )


@pytest.mark.filterwarnings("ignore")
def test_what_peft_does_not_read_back_is_refused_by_its_name(tmp_path):
    def config():
        return peft.RandLoraConfig(r=4, target_modules=["q_proj"])

    trained(config, tmp_path)
    with pytest.raises(CheckpointError, match=r"a RANDLORA, back as it was written.*as its party"):
        merge(tmp_path / "data", tmp_path / "model", tmp_path / "out", base=tiny_model("llama"))
    assert not (tmp_path / "out").exists()
