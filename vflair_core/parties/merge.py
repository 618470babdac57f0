"""What the parties saved, joined into an ordinary Hugging Face checkpoint, or one peft adapter.

Nobody joins by accident: it takes all folders and an explicit call. What comes out is what the unsplit
model would have been; it is written aside and renamed when it is whole.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vflair_core.errors import CheckpointError
from vflair_core.parties.checkpoint_parts import Parts, find_parts
from vflair_core.parties.joined_adapter import (
    join_adapters,
    merge_adapter,
    plain_name,
    write_adapter,
)
from vflair_core.partition.adapters import check_peft
from vflair_core.partition.checkpoint import TOKENIZER
from vflair_core.partition.fingerprint import files_digest, sample_digest
from vflair_core.partition.module_tree import names_by_weight

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def merge(
    data_folder: str | Path,
    model_folder: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    adapter: bool = False,
    base: str | Path | PreTrainedModel | None = None,
) -> Path:
    """Join all parties' parts into the folder `out`: config, weights, and tokenizer if there is one.

    Of checkpoints of a run, the last step that all folders hold is taken.

    Args:
        data_folder: Where `data_party.save` or `FineTuning.save` wrote.
        model_folder: Where `model_party.save` wrote, or `model_party.checkpoints`; of a chain, a list of them.
        out: A new or an empty folder.
        adapter: Write one peft adapter; otherwise adapters are merged into the weights.
        base: The model that adapters were trained on; by default the one that was loaded. A model that was
            split in memory is given as it was before.

    Raises:
        CheckpointError: The parts do not fit each other or the base; nothing is written.
        VflairError: The parts hold adapters, and peft is not installed.
    """
    folders = [model_folder] if isinstance(model_folder, (str, Path)) else model_folder
    if not folders:
        raise CheckpointError(
            "Merging takes a folder of the data party and one of each model party."
        )
    parts = find_parts(Path(data_folder), [Path(folder) for folder in folders])
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already. Choose a new folder.")
    if adapter and not parts.adapters:
        raise CheckpointError(
            "There is no adapter in these parts: they hold the weights themselves. Leave out the adapter option."
        )
    if parts.adapters:
        check_peft()
    unfinished = out.with_name(out.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        if parts.adapters:
            _write_adapted(parts, _find_base(parts, base), unfinished, adapter=adapter)
        else:
            _whole_model(parts).save_pretrained(unfinished)
        _write_tokenizer(parts, unfinished)
        unfinished.replace(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


# -- putting a model together ----------------------------------------------------------------------------


def _whole_model(parts: Parts) -> PreTrainedModel:
    """The whole model from weights alone."""
    model = _empty(parts, _config(parts))
    twins = _twins(model)
    weights = dict(parts.weights)
    apart = [
        name
        for name in parts.data["untied"]
        if not all(torch.equal(weights[name], weights[t]) for t in twins[name] if t in weights)
    ]
    if apart:  # they were trained apart
        model = _empty(parts, _config(parts, tied=False))
    else:
        for name in parts.data["untied"]:
            if twins[name]:
                del weights[name]
    mismatch = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    missing += [name for name in mismatch.missing_keys if name in dict(model.named_buffers())]
    if missing or mismatch.unexpected_keys:
        wrong = sorted(missing + mismatch.unexpected_keys)
        raise CheckpointError(
            f"The parts are not the whole of {type(model).__name__}: {len(missing)} weights are missing and "
            f"{len(mismatch.unexpected_keys)} unknown, {', '.join(wrong[:4])} among them."
        )
    return model


def _config(parts: Parts, *, tied: bool = True) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING

    facts = parts.data["config"]
    if facts["model_type"] not in CONFIG_MAPPING:
        raise CheckpointError(
            f"transformers has no model type {facts['model_type']!r}: its code came with the checkpoint, and "
            "parts of such models cannot be joined."
        )
    config: Any = CONFIG_MAPPING[facts["model_type"]].from_dict(facts)
    if not tied:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return config  # type: ignore[no-any-return]


def _empty(parts: Parts, config: PretrainedConfig) -> PreTrainedModel:
    from transformers import GenerationConfig

    with torch.device("meta"):
        model: Any = _architecture(parts)._from_config(config)
    if parts.data["generation"] is not None:
        model.generation_config = GenerationConfig.from_dict(parts.data["generation"])
    return model.eval()  # type: ignore[no-any-return]


def _architecture(parts: Parts) -> Any:
    import transformers

    named = getattr(transformers, parts.data["architecture"], None)
    if named is None:
        raise CheckpointError(f"transformers has no class {parts.data['architecture']}.")
    return named


def _twins(model: nn.Module) -> dict[str, list[str]]:
    """Every weight that is tied, and the other names it has."""
    groups = names_by_weight(model)
    return {name: [n for n in group if n != name] for group in groups for name in group}


# -- adapters --------------------------------------------------------------------------------------------


def _find_base(parts: Parts, base: str | Path | PreTrainedModel | None) -> PreTrainedModel:
    """Load the model that the adapters were trained on, and see that it is the one."""
    agreed = dict(part.split("=", 1) for part in parts.data["fingerprint"].split("; "))
    kind, _, name = agreed["weights"].partition(":")
    if base is None:
        base = parts.data["base"]
    if not base:
        raise CheckpointError(
            "The model that these adapters were trained on has no name. Say which: base=FOLDER, or "
            "base=model."
        )
    if isinstance(base, nn.Module):
        model, digest = copy.deepcopy(base), sample_digest(base)
    else:
        options = {"revision": name} if kind == "commit" else {}
        model = _architecture(parts).from_pretrained(
            base, config=_config(parts), dtype=agreed["dtype"], **options
        )
        digest = {
            "files": lambda: files_digest(Path(base)),
            "sample": lambda: sample_digest(model),
            "commit": lambda: agreed["weights"],  # it was asked for by this name
        }[kind]()
    if digest != agreed["weights"]:
        raise CheckpointError(
            f"{base if not isinstance(base, nn.Module) else 'The given model'} is not the base of these "
            f"adapters: its weights are {digest}, theirs were {agreed['weights']}. Give base=."
        )
    return model  # type: ignore[no-any-return]


def _write_adapted(parts: Parts, model: PreTrainedModel, folder: Path, *, adapter: bool) -> None:
    joined = join_adapters(parts.adapters)
    plain = {plain_name(name, joined): tensor for name, tensor in parts.weights.items()}
    ours = {name: tensor for name, tensor in plain.items() if joined.has(name)}
    whole = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    unknown = sorted(plain.keys() - ours.keys() - whole.keys())
    if unknown:
        raise CheckpointError(
            f"The base has no {', '.join(unknown[:4])}: give the base of these parts."
        )
    changed = {
        name: tensor
        for name, tensor in plain.items()
        if name not in ours and not torch.equal(whole[name].detach().cpu(), tensor)
    }
    _untie(
        model, parts, {*changed, *(f"{path}.weight" for path in joined.adapted)}, adapter=adapter
    )
    if adapter:
        write_adapter(folder, joined, ours, changed, model, base=parts.data["base"])
        return
    whole = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in changed.items():
            whole[name].copy_(tensor)
    merge_adapter(model, joined, ours).save_pretrained(folder)


def _untie(model: PreTrainedModel, parts: Parts, touched: set[str], *, adapter: bool) -> None:
    """Give each side of the cut its own weight again where one of the two was trained."""
    twins = _twins(model)
    apart = [n for n in parts.data["untied"] if touched & {n, *twins[n]}]
    if apart and adapter:
        raise CheckpointError(
            f"{', '.join(apart)} and what it was tied to were trained apart, which an adapter cannot say. "
            "Merge into the weights instead."
        )
    for name in apart:
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, leaf, nn.Parameter(getattr(module, leaf).detach().clone()))
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False


# -- tokenizer -------------------------------------------------------------------------------------------


def _write_tokenizer(parts: Parts, folder: Path) -> None:
    from transformers import AutoTokenizer

    for near in (parts.data_path.parent, parts.data_path.parent.parent):
        if (near / TOKENIZER).is_dir():
            AutoTokenizer.from_pretrained(near / TOKENIZER).save_pretrained(folder)
            return
    base = Path(parts.data["base"] or "")
    if parts.data["base"] and (base / "tokenizer_config.json").is_file():
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
