"""Inputs of every task for any model: texts with labels, padded or not, and pictures where a model takes them."""

from __future__ import annotations

import inspect
import logging
import zlib

import pictures
import torch
from shrink import FIRST_WORD, LAST_WORD, small_config
from sizes import EOS, LABELS, PAD
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

log = logging.getLogger(__name__)
BATCH, LENGTH, ANSWER, PADDING = 2, 12, 7, 3
TASKS: dict[str, tuple[str, str]] = {  # task -> (auto class, mapping of transformers)
    "causal-lm": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "classification": (
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    "question-answering": (
        "AutoModelForQuestionAnswering",
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    ),
    "seq2seq": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "image-text": ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
}
GENERATES = ("causal-lm", "seq2seq", "image-text")


def types(task: str) -> list[str]:
    """Return all model types that transformers maps to a model of this task."""
    return list(getattr(auto, TASKS[task][1]))


def build(model_type: str, task: str) -> PreTrainedModel:
    """Make a small random model of `model_type` for `task`, always the same one."""
    import transformers

    config = small_config(model_type, **({"num_labels": 2} if task == "question-answering" else {}))
    if task == "causal-lm" and is_encoder(model_type):
        config.is_decoder = True
    torch.manual_seed(zlib.crc32(f"{model_type} {task}".encode()))
    auto_class = getattr(transformers, TASKS[task][0])
    own = auto_class._model_mapping.get(type(config), None)
    for name in ("decoder", "text_config"):  # some classes are made of a part of the config alone
        part = getattr(config, name, None)
        if own and not isinstance(config, own.config_class) and isinstance(part, own.config_class):
            return own._from_config(part).float()  # type: ignore[no-any-return]
    return auto_class.from_config(config).float()  # type: ignore[no-any-return]


def is_encoder(model_type: str) -> bool:
    """Tell whether the texts of this type are read from both sides, and so padded at the right."""
    return model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def batches(model: PreTrainedModel, task: str, *, padded: bool) -> dict[str, dict[str, Tensor]]:
    """Return the inputs to try, by name: ``text``, and ``image`` where the model takes pictures."""
    words = text(model, task, padded=padded)
    found = {"text": words}
    if task in {"causal-lm", "image-text"} and {"pixel_values", "flattened_patches"} & _takes(
        model
    ):
        try:
            found["image"] = pictures.with_picture(model, {**_others(model, words), **words})
        except ValueError as error:  # such a model is tried with text alone
            log.info("%s gets no picture: %s", type(model).__name__, error)
    return {
        name: {**_others(model, batch), **batch} if "input_ids" in batch else batch
        for name, batch in found.items()
    }


def text(model: PreTrainedModel, task: str, *, padded: bool) -> dict[str, Tensor]:
    """Make a batch of texts with labels; with `padded`, the second text is shorter than the first."""
    config = model.config
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(FIRST_WORD, LAST_WORD + 1, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(words)
    ends = [LENGTH] * BATCH
    left = not (config.is_encoder_decoder or is_encoder(config.model_type))
    if padded and left:
        mask[-1, :PADDING] = 0
    elif padded:
        mask[-1, -PADDING:] = 0
        ends[-1] -= PADDING
    if config.is_encoder_decoder or task == "question-answering":
        for row, end in enumerate(ends):
            words[row, end - 1] = EOS
    if task == "question-answering":
        words[:, 3:5] = EOS  # the separators between question and context
    words = words.masked_fill(mask == 0, PAD)
    whole = config.is_encoder_decoder and task in GENERATES
    labels = _labels(words, mask, task, generator, answer=_answer_length(config) if whole else 0)
    if "start_positions" in labels and "start_positions" not in _takes(model):
        labels = {"labels": labels["start_positions"]}  # an answer out of a list
    if getattr(config, "num_codebooks", None) == 1:
        labels = {"labels": labels["labels"][..., None]}  # one label a codebook
    return {"input_ids": words, "attention_mask": mask, **labels}


def _labels(
    words: Tensor, mask: Tensor, task: str, generator: torch.Generator, *, answer: int
) -> dict[str, Tensor]:
    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    if task == "classification":
        return {"labels": draw(0, LABELS, BATCH)}
    if task == "question-answering":
        return {"start_positions": draw(5, 7, BATCH), "end_positions": draw(7, 9, BATCH)}
    if answer:  # an encoder reads the text, a decoder writes the answer
        return {"labels": draw(FIRST_WORD, LAST_WORD + 1, BATCH, answer)}
    return {"labels": words.masked_fill(mask == 0, -100)}


def _answer_length(config: PreTrainedConfig) -> int:
    """Answers are shorter than texts, but for types that take the text as their answer."""
    return LENGTH if config.model_type in {"fsmt", "pp_formulanet"} else ANSWER


def _takes(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _others(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what some models cannot do without, by the names of what their forward takes."""
    generator = torch.Generator().manual_seed(2)
    rows, positions = batch["input_ids"].shape
    corners = torch.randint(0, 50, (rows, positions, 2), generator=generator)
    others = {
        "bbox": torch.cat([corners, corners + 40], dim=-1),
        "visual_feats": torch.rand(
            rows, 4, getattr(model.config, "visual_feat_dim", 1), generator=generator
        ),
        "visual_pos": torch.rand(rows, 4, 4, generator=generator),
        "qformer_input_ids": torch.randint(FIRST_WORD, LAST_WORD, (rows, 5), generator=generator),
        "mm_token_type_ids": torch.zeros_like(batch["input_ids"]),
    }
    takes = _takes(model)
    return {name: value for name, value in others.items() if name in takes}
