"""Models that cannot be cut in memory because something else has already taken hold of their weights."""

from __future__ import annotations

from torch import nn

from vflair_core.errors import PartitionError

# Named rather than imported: torch builds without torch.distributed lack most of them.
WRAPPERS = {
    "DataParallel": "split(model.module, ...)",
    "DistributedDataParallel": "split(model.module, ...)",
    "FullyShardedDataParallel": "split the model before it is sharded",
    "FSDPModule": "split the model before it is sharded",
    "DeepSpeedEngine": "split(engine.module, ...)",
    "OptimizedModule": "split the model before torch.compile",
}


def refuse_wrapped(model: nn.Module) -> None:
    """See that `model` is a transformers model as `from_pretrained` returns it, unwrapped and unquantised.

    Raises:
        PartitionError: It is not; the message names what holds it and what to do.
    """
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in WRAPPERS:
                raise PartitionError(
                    f"Cannot cut a model inside {kind.__name__}: its weights are not the model's own any "
                    f"more. Instead: {WRAPPERS[kind.__name__]}."
                )
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is not None:
        method = quantiser.quantization_config.quant_method
        raise PartitionError(
            f"Cannot cut a model that {getattr(method, 'value', method)} has quantised: packed weights have "
            "no stand-in. Instead: load_model_party(name, partition, quantization_config=...) quantises the "
            "model party's half as it is loaded."
        )
