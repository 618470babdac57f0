"""Fixtures for pytest, there wherever vflair-core is installed; each begins with ``vflair_``."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vflair_core.parties.data_party.party import DataParty


@pytest.fixture
def vflair_model() -> Any:
    """A random llama of four blocks of width 16 and 64 words."""
    from vflair_core.testing.models import tiny_model

    return tiny_model("llama")


@pytest.fixture(scope="session")
def vflair_real_model() -> Any:
    """SmolLM2-135M-Instruct and its tokenizer; the test is skipped where its packages are not installed."""
    from vflair_core.testing.real_model import INSTALL, load_real_model, missing

    if missing():
        pytest.skip(f"not installed: {', '.join(missing())} ({INSTALL})")
    return load_real_model()


@pytest.fixture
def vflair_parties() -> Callable[..., SimpleNamespace]:
    """A factory of two parties in this process: ``vflair_parties(defenses=[...])`` has `data_party`, `model_party` and `whole`.

    It takes a `model` (left out, a small one), a `partition` (left out, one block in front and one behind), `defenses`, which
    are prepared on `public` texts (left out, rows of words), and options of `split`.
    """
    import copy

    from vflair_core.parties.split import split
    from vflair_core.partition.partition import Partition
    from vflair_core.testing.models import (
        numbers_as_texts,
        tiny_batch,
        tiny_model,
        tiny_tokenizer,
    )

    def make(
        model: Any = None,
        partition: Partition | None = None,
        *,
        public: Any = None,
        **options: Any,
    ) -> SimpleNamespace:
        whole = model if model is not None else tiny_model("llama")
        words = whole.config.get_text_config().vocab_size
        options = {"tokenizer": tiny_tokenizer(words), "seed": 0, **options}
        data_party, model_party = split(
            copy.deepcopy(whole), partition or Partition(1, 1), **options
        )
        if options.get("defenses"):
            rows = tiny_batch(whole, rows=16)["input_ids"]
            data_party.prepare(list(public) if public is not None else numbers_as_texts(rows))
        return SimpleNamespace(data_party=data_party, model_party=model_party, whole=whole)

    return make


@pytest.fixture
def vflair_remote_parties() -> Iterator[Callable[..., SimpleNamespace]]:
    """The same with the model party in a process of its own; has `data_party`, `remote` and `whole`.

    Skipped where gRPC is not installed. The process ends with the test.
    """
    pytest.importorskip("grpc")
    import copy

    from vflair_core.communication.remote.client import connect
    from vflair_core.parties.split import split
    from vflair_core.partition.partition import Partition
    from vflair_core.testing.models import tiny_model
    from vflair_core.testing.remote import remote_model_party

    with ExitStack() as open_:

        def make(
            model: Any = None, partition: Partition | None = None, **options: Any
        ) -> SimpleNamespace:
            whole = model if model is not None else tiny_model("llama")
            cut = partition or Partition(1, 1)
            remote = open_.enter_context(remote_model_party(whole, cut))
            channel = open_.enter_context(connect(remote.url))
            data_party, _ = split(copy.deepcopy(whole), cut, channel=channel, **options)
            return SimpleNamespace(data_party=data_party, remote=remote, whole=whole)

        yield make


@pytest.fixture
def vflair_captured() -> Iterator[Callable[[DataParty], Any]]:
    """What crosses from now on: ``vflair_captured(data_party).messages`` are the records, in order."""
    from vflair_core.communication.transcript import Transcript

    with ExitStack() as taps:

        def capture(data_party: DataParty) -> Transcript:
            return taps.enter_context(data_party.channel.tap(Transcript()))

        yield capture


@pytest.fixture
def vflair_knowledge() -> Callable[..., dict[str, Any]]:
    """A factory of what an attack may ask for, each name of the vocabulary, of words that crossed a small model.

    Arguments are those of `crossed`: ``vflair_knowledge(defenses=[...], partition=...)``; `rows` are there as ``"rows"``.
    """
    from vflair_core.testing.crossing import everything

    return everything
