"""Pictures with text: where the words stand when a picture's positions are in front of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from vflair_core import Example, in_chat
from vflair_core.errors import ExperimentError, TaskError
from vflair_core.experiments.base_model import random_processor
from vflair_core.tasks.preprocessor import Preprocessor
from vflair_core.tasks.tokenization import InputFormat
from vflair_core.tasks.tokenizer_training import train_tokenizer
from vflair_core.testing import tiny_model

TOKENIZER = train_tokenizer(
    ["Ada wears this.", "What colour is it?"] * 3, 320, image_token="<image>"
)
PLACE = TOKENIZER.convert_tokens_to_ids("<image>")
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION = {
    "model_type": "clip_vision_model",
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 16,
}
RED = np.zeros((20, 24, 3), dtype=np.uint8) + np.array([255, 0, 0], dtype=np.uint8)
BLUE = np.zeros((30, 20, 3), dtype=np.uint8) + np.array([0, 0, 255], dtype=np.uint8)


@pytest.fixture(scope="module")
def model():
    config = AutoConfig.for_model(
        "llava",
        image_token_id=PLACE,
        text_config={"model_type": "llama", "vocab_size": len(TOKENIZER), **SIZES},
        vision_config={**VISION, **SIZES},
    )
    return AutoModelForImageTextToText.from_config(config).eval()


def reader(model, **more):
    reading = InputFormat("image-text", processor=random_processor(model, TOKENIZER))
    return Preprocessor(TOKENIZER, reading, **more)


def test_a_picture_takes_as_many_positions_as_the_model_gives_it_and_words_keep_their_place(model):
    example = Example("Ada wears this.", answer="red", images=(RED,), private=((0, 3),))
    encoded = reader(model).batch([example])
    (row,) = encoded.rows
    assert row.ids.count(PLACE) == (16 // 8) ** 2
    secret = [token for token, private in zip(row.ids, row.private, strict=True) if private]
    assert TOKENIZER.decode(secret) == "Ada"
    with torch.no_grad():
        assert model(**encoded.batch).logits.shape[:2] == (1, len(row.ids))
    words = TOKENIZER("Ada wears this.", add_special_tokens=False)["input_ids"]
    target = [*TOKENIZER(" red", add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]
    assert row.ids == [TOKENIZER.bos_token_id, *[PLACE] * 4, *words, *target]


def test_a_long_prompt_loses_words_and_never_a_picture(model):
    example = Example("Ada wears this. What colour is it?", answer="red", images=(RED,))
    whole = reader(model).batch([example]).rows[0]
    (short,) = reader(model, max_length=len(whole.ids) - 3).batch([example]).rows
    assert (short.truncated, short.ids.count(PLACE)) == (3, 4)
    assert short.ids[-len(short.target) :] == whole.target


def test_each_picture_has_a_place_where_the_text_says(model):
    text = "<image> Ada. <image> Bob."
    encoded = reader(model).batch([Example(text, answer="red", images=(RED, BLUE))])
    assert encoded.batch["pixel_values"].shape == (2, 3, 16, 16)
    red, blue = encoded.batch["pixel_values"].mean((2, 3)).argmax(1).tolist()
    assert (red, blue) == (0, 2)
    with pytest.raises(TaskError, match="has 1 pictures and 2 places '<image>'"):
        reader(model).batch([Example(text, answer="red", images=(RED,))])


def test_in_a_chat_the_picture_is_in_front_of_what_the_user_says(model):
    template = (
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{{ '|' if add_generation_prompt }}"
    )
    TOKENIZER.chat_template = template
    try:
        reading = InputFormat(
            "image-text",
            render=lambda example, tokenizer: in_chat(example, [("Ada?", "red")], tokenizer),
            processor=random_processor(model, TOKENIZER),
        )
        example = Example("What colour?", answer="red", images=(RED,), private=((5, 11),))
        reader = Preprocessor(TOKENIZER, reading)
        (row,), (asked,) = reader.batch([example]).rows, reader.prompts([example]).rows
    finally:
        TOKENIZER.chat_template = None
    whole = "[Ada?][red][" + "<image>" * 4 + "What colour?][red]"
    assert row.ids == TOKENIZER(whole, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(row.target) == "red]"
    prompt = whole.removesuffix("[red]") + "|"
    assert asked.ids == TOKENIZER(prompt, add_special_tokens=False)["input_ids"]
    for each in (row, asked):
        secret = [token for token, private in zip(each.ids, each.private, strict=True) if private]
        assert TOKENIZER.decode(secret).strip() == "colour"


def test_a_processor_that_says_more_of_each_token_than_its_id_is_refused(model):
    inner = random_processor(model, TOKENIZER)

    class Talkative:
        image_token, tokenizer = inner.image_token, TOKENIZER

        def __call__(self, **inputs):
            made = dict(inner(**inputs))
            return {**made, "mm_token_type_ids": torch.zeros_like(made["input_ids"])}

    talkative = Preprocessor(TOKENIZER, InputFormat("image-text", processor=Talkative()))
    with pytest.raises(TaskError, match="'mm_token_type_ids' of every token"):
        talkative.batch([Example("Ada", answer="red", images=(RED,))])


def test_other_random_models_have_no_processor():
    with pytest.raises(ExperimentError, match="no processor for a random llama"):
        random_processor(tiny_model("llama"), TOKENIZER)
