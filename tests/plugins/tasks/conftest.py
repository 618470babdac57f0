"""What the tests of data sets share: a cache of their own, files of the hub's layout, a small tokenizer."""

from __future__ import annotations

import json

import datasets
import pytest

from vflair_core.tasks.tokenizer_training import train_tokenizer

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Nothing is written outside of a folder of the test, and no progress bar is drawn."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    return cache


@pytest.fixture
def hub(tmp_path):
    """A factory: hub(split, rows, features) writes a parquet file as the hub has it; returns the folder."""

    def write(split, rows, features=None, folder=""):
        table = datasets.Dataset.from_list(rows, features=features)
        place = tmp_path / "hub" / folder
        place.mkdir(parents=True, exist_ok=True)
        table.to_parquet(place / f"{split}-00000-of-00001.parquet")
        return tmp_path / "hub"

    return write


@pytest.fixture
def files(tmp_path):
    """A factory: files({name: content}) writes texts and json; returns the folder."""

    def write(contents):
        for name, content in contents.items():
            path = tmp_path / "files" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / "files"

    return write


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(["public words for a small tokenizer"], 300)


@pytest.fixture
def chatty(tokenizer):
    """The same tokenizer with a chat template."""
    tokenizer.chat_template = CHAT
    yield tokenizer
    tokenizer.chat_template = None
