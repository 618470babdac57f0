"""A model whose code comes with its weights is cut like any other, if it has a list of blocks."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from vflair_core import Partition, load_data_party, load_model_party, split
from vflair_core.errors import CheckpointError, PartitionError
from vflair_core.testing import tiny_batch

CODE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class StrangeConfig(PreTrainedConfig):
    model_type = "strange"
    vocab_size: int = 50
    hidden_size: int = 16
    num_hidden_layers: int = 4


class StrangeLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mix, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, scale):
        return x + self.out(torch.tanh(self.mix(x)).cumsum(1)) * scale, None


class StrangeForCausalLM(PreTrainedModel):
    config_class = StrangeConfig
    _no_split_modules = [NO_SPLIT]

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(StrangeLayer(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        x = self.words(input_ids)
        for block in self.blocks:
            x, _ = block(x, 0.5)
        logits = self.head(x)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
"""
CONFIG = """{"model_type": "strange", "architectures": ["StrangeForCausalLM"], "auto_map":
{"AutoConfig": "strange.StrangeConfig", "AutoModelForCausalLM": "strange.StrangeForCausalLM"}}"""


@pytest.fixture
def strange(tmp_path, monkeypatch):
    """Return a function that writes a checkpoint with its own code and loads the whole model."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code")
    )

    def write(no_split='"StrangeLayer"'):
        folder = tmp_path / "strange-model"
        folder.mkdir()
        (folder / "strange.py").write_text(CODE.replace("NO_SPLIT", no_split))
        (folder / "config.json").write_text(CONFIG)
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        torch.manual_seed(0)
        whole = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        whole.save_pretrained(folder)
        return folder, whole

    return write


@pytest.mark.parametrize("tail", [0, 1])
@pytest.mark.parametrize("no_split", ['"StrangeLayer"', ""])  # found by name, or by their calls
def test_a_model_with_code_of_its_own_is_exact(strange, no_split, tail):
    _, whole = strange(no_split)
    batch = tiny_batch(whole, labels="tokens")
    expected = whole(**batch)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in whole.named_parameters()}
    whole.zero_grad()
    data_party, model_party = split(whole, Partition(1, tail), wire=True)
    found = data_party.model(**batch)
    assert torch.equal(found.logits, expected.logits)
    found.loss.backward()
    for name, p in (*data_party.named_parameters(), *model_party.named_parameters()):
        assert torch.equal(p.grad, gradients[name]), name


def test_it_is_loaded_by_halves_when_its_code_is_trusted(strange):
    folder, whole = strange()
    options = {"trust_remote_code": True, "auto": AutoModelForCausalLM}
    model_party = load_model_party(folder, Partition(1, 1), **options)
    data_party = load_data_party(folder, Partition(1, 1), channel=model_party.handle, **options)
    assert not {n for n, _ in data_party.named_parameters()} & {
        n for n, _ in model_party.named_parameters()
    }
    batch = tiny_batch(whole)
    assert torch.equal(data_party.model(**batch).logits, whole.eval()(**batch).logits)


def test_code_that_is_not_trusted_is_not_run(strange):
    folder, _ = strange()
    with pytest.raises((CheckpointError, PartitionError), match="trust_remote_code"):
        load_model_party(folder, Partition(1, 1), trust_remote_code=False)
