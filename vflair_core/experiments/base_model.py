"""The model as the public knows it: loaded, or made at random with its tokenizer and trained on public text."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from vflair_core.defenses.calibration import about_text, remember
from vflair_core.errors import ExperimentError
from vflair_core.experiments.experiment import Experiment
from vflair_core.experiments.pretraining import Report, pretrain
from vflair_core.parties.checkpoint_files import locate_checkpoint
from vflair_core.parties.config_fields import (
    check_class,
    check_fields,
    check_model_type,
    has_parts,
)
from vflair_core.partition.fingerprint import sample_digest
from vflair_core.randomness import stream_seed
from vflair_core.tasks.kinds import KINDS
from vflair_core.tasks.task import Task
from vflair_core.tasks.tokenizer_training import train_tokenizer


def random_model(
    auto: Any, fields: Mapping[str, Any], tokenizer: Any, heads: Mapping[str, Any]
) -> Any:
    """Build a model of the transformers class `auto` from the fields of a config; weights come from torch's stream.

    What depends on the tokenizer is filled in: the size of the vocabulary and the numbers of special tokens, in the
    config of the text part if there is one.

    Raises:
        ExperimentError: The fields are not those of a config, or there is no such model.
    """
    import transformers

    _check(check_model_type(fields["model_type"]))
    kind = transformers.CONFIG_MAPPING[fields["model_type"]]
    if not has_parts(kind):  # whose parts may have it
        _check(check_class(kind, fields))

    special = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    given = dict(fields)
    model_type = given.pop("model_type")
    if "text_config" in given:
        given["text_config"] = {**special, **given["text_config"]}
        special = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>")}
    if twice := special.keys() & given.keys():
        _check(
            f"{', '.join(sorted(twice))} comes from the tokenizer that is trained; leave it out, and give its size as "
            "model.vocab_size."
        )
    try:
        config = transformers.AutoConfig.for_model(model_type, **special, **given, **heads)
        _check(check_fields(config, fields))
        if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = tokenizer.pad_token_id
        return auto.from_config(config)
    except StrictDataclassError as error:  # of a type or a size that does not fit
        raise ExperimentError(f"model.config: {' '.join(str(error).split())}") from error
    except (ValueError, TypeError) as error:
        reason, *_ = str(error).splitlines()  # the others list all models
        raise ExperimentError(f"model.config is not a transformers config: {reason}") from error


def _check(wrong: str) -> None:
    if wrong:
        raise ExperimentError(f"model.config: {wrong}")


def random_processor(model: Any, tokenizer: Any) -> Any:
    """Return what puts pictures into text for a random llava; its pictures are scaled to what the model takes.

    Raises:
        ExperimentError: The model is of another type, whose processor is not known without a checkpoint.
    """
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    if model.config.model_type != "llava":
        raise ExperimentError(
            f"There is no processor for a random {model.config.model_type}: use model_type = 'llava' in "
            "model.config, or model.name = 'a model to load', which brings its own."
        )
    vision = model.config.vision_config
    side = vision.image_size
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # the class token of the picture's encoder
    )


def check_packing(model: Any, task: Task) -> None:
    """See that texts of one row do not see each other, by trying: other text in front must change nothing behind.

    Raises:
        ExperimentError: They do, or the task is not causal-lm.
    """
    if task.kind != "causal-lm":
        raise ExperimentError(
            f"train.packing puts several texts into one row, which {task.kind} cannot learn from: leave it out."
        )
    takes = "position_ids" in inspect.signature(type(model).forward).parameters
    if not takes or _sees_across(model):
        raise ExperimentError(
            f"{type(model).__name__} lets texts that are packed into one row see each other: it does not take its "
            "mask from position_ids. Leave train.packing out."
        )


def _sees_across(model: Any) -> bool:
    ids = torch.arange(3, 11)[None] % model.config.get_text_config().vocab_size  # (1, 8)
    other = torch.cat([ids[:, :4].flip(1), ids[:, 4:]], dim=1)
    positions = torch.arange(4).repeat(2)[None]
    training = model.training
    model.eval()
    with torch.no_grad():
        first, second = (
            model(input_ids=row, position_ids=positions, use_cache=False).logits[:, 4:]
            for row in (ids, other)
        )
    model.train(training)
    return not torch.equal(first, second)


IMAGE = "<image>"


def prepare_model(
    experiment: Experiment, task: Task, report: Report, cache: Path | None = None
) -> tuple[Any, Any, Any]:
    """Return the model as the public knows it, its tokenizer, and for ``image-text`` its processor, else None.

    In the folder `cache`, if there is one, the weights after the public phase are kept for the next time.

    Raises:
        ExperimentError: The config is not one of transformers or has no model for the task's kind, or texts cannot
            be packed.
        CheckpointError: The package or the GGUF file is not there, or cannot be read.
    """
    import transformers

    spec, kind = experiment.model, KINDS[task.kind]
    auto = getattr(transformers, kind.auto)
    heads = {"num_labels": max(len(task.labels), 1)} if kind.labelled else {}
    processor = None
    # Of weights that are not in the checkpoint, of dropout in the public phase, and of a random model's.
    torch.manual_seed(stream_seed(experiment.seed, "weights"))
    if spec.name:
        place = locate_checkpoint(spec.name, gguf_file=spec.gguf_file)
        try:
            if task.kind == "image-text":
                processor = transformers.AutoProcessor.from_pretrained(place)
                tokenizer: Any = processor.tokenizer
            else:
                tokenizer = transformers.AutoTokenizer.from_pretrained(place)
            model = auto.from_pretrained(place, **heads)
        except (OSError, SafetensorError, ValueError) as error:
            raise ExperimentError(
                f"[model] name = {spec.name!r} cannot be loaded: {error} It is a folder with config.json, weights and tokenizer, "
                "the name of a hub model, or package:NAME/FOLDER."
            ) from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        text_config = model.config.get_text_config()
        if text_config.pad_token_id is None:
            text_config.pad_token_id = tokenizer.pad_token_id
    else:
        image_token = IMAGE if task.kind == "image-text" else ""
        pairs = task.train[0].pair is not None and kind.pairs
        tokenizer = train_tokenizer(
            task.public, spec.vocab_size, pairs=pairs, image_token=image_token
        )
        model = random_model(auto, spec.config, tokenizer, heads)
        if task.kind == "image-text":
            processor = random_processor(model, tokenizer)
    if experiment.train.packing:
        check_packing(model, task)
    if experiment.pretrain.steps:
        _public_phase(model, tokenizer, task, experiment, report, cache)
    return model, tokenizer, processor


def _public_phase(
    model: Any, tokenizer: Any, task: Task, e: Experiment, report: Report, cache: Path | None
) -> None:
    """Train the model on public text, or give it the weights that an earlier run of the same phase left."""

    def trained() -> dict[str, torch.Tensor]:
        pretrain(model, tokenizer, task.public, e, report)
        return dict(model.named_parameters()) | dict(model.named_buffers())

    if cache is None:
        trained()
        return
    facts = {
        "phase": json.dumps(attrs.asdict(e.pretrain), sort_keys=True),
        "seed": str(e.seed),
        "threads": str(torch.get_num_threads()),
        "model": f"{type(model).__name__} {sample_digest(model)}",
        "config": model.config.to_json_string(use_diff=False),
        "transformers": importlib.metadata.version("transformers"),
        **about_text(tokenizer, task.public),
    }
    weights = remember(cache, "public-phase", facts, trained)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, weight in weights.items():
            own[name].copy_(weight)
    model.eval()
