"""What defenses make of public text before anything private is touched: kept between runs, under all it depends on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, frozen
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vflair_core.errors import CheckpointError
from vflair_core.offers import options_of, target_of
from vflair_core.partition.fingerprint import sample_digest

if TYPE_CHECKING:
    from vflair_core.defenses.defense import Defense

Made = dict[str, Tensor]
Report = Callable[[str, int, int], None]  # told (what, done, total) now and then


@frozen(eq=False)
class Situation:
    """What a preparation depends on beside the defense and the public text: the data party as it is."""

    model: nn.Module
    tokenizer: Any
    fingerprint: str
    untied: Sequence[str]
    defenses: Sequence[Defense]


@define
class CalibrationCache:
    """Where a data party keeps what its defenses prepared, and whom they tell how far they are.

    Args:
        folder: Where it is kept; None keeps nothing.
        report: Told (what, done, total) now and then.
    """

    folder: Path | None = None
    report: Report = lambda *_: None

    def tell(self, defense: Defense, done: int, total: int) -> None:
        """Say how far `defense` is."""
        self.report(f"preparing {type(defense).__name__}", done, total)

    def remember(
        self,
        defense: Defense,
        public_texts: Sequence[str],
        make: Callable[[], Made],
        situation: Situation,
        **facts: str,
    ) -> Made:
        """Return what `make` makes: by calling it, or from the file where an earlier call left it.

        The file's name is a digest of all that it depends on: the defense, its options and its version, the other
        defenses of the list as they are by then, the data party's weights and tokenizer, both parties' fingerprint, the
        cut, the public text, the versions of torch and the core, and `facts` that the defense adds. What changes any of
        them makes a new file.

        Raises:
            CheckpointError: The file is damaged, or holds something else than its name says.
        """
        if self.folder is None:
            return make()
        known = {**_facts(defense, public_texts, situation), **facts}
        return remember(self.folder, type(defense).__name__, known, make)


def remember(folder: Path, name: str, facts: Mapping[str, str], make: Callable[[], Made]) -> Made:
    """Return what `make` makes, by calling it or from the file in `folder` that is named by `name` and a digest of `facts`.

    Raises:
        CheckpointError: The file is damaged, or holds something else than its name says.
    """
    path = folder / f"{name}-{_digest(json.dumps(facts, sort_keys=True))[:16]}.safetensors"
    if path.exists():
        return _read(path, facts)
    made = make()
    _write(path, made, facts)
    return made


def _facts(defense: Any, public_texts: Sequence[str], situation: Situation) -> dict[str, str]:
    # What is prepared may have crossed, and then it went through all of them.
    others = ["itself" if d is defense else _named(d) for d in situation.defenses]
    return {
        "defense": target_of(defense),
        "options": json.dumps(_options(defense), sort_keys=True),
        "version": _version(type(defense).__module__.partition(".")[0]),
        "other defenses": json.dumps(others),
        "model": sample_digest(situation.model),
        "fingerprint": situation.fingerprint,
        "tied": ",".join(situation.untied),
        **about_text(situation.tokenizer, public_texts),
    }


def about_text(tokenizer: Any, public_texts: Sequence[str]) -> dict[str, str]:
    """What everything depends on that is made of public text: the tokenizer, the text, and the versions that compute."""
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    return {
        "tokenizer": _digest(json.dumps(vocabulary, sort_keys=True)),
        "public text": _digest("\0".join(public_texts)),
        "torch": torch.__version__,
        "vflair-core": _version("vflair_core"),
    }


def _named(defense: Any) -> list[str]:
    """Another defense: what it is, its options, and what it has calibrated so far."""
    state = {key: value.detach().cpu().contiguous() for key, value in defense.state().items()}
    return [target_of(defense), json.dumps(_options(defense), sort_keys=True), _content(state)]


def _options(defense: Any) -> dict[str, str]:
    """The options by name; an object without fields is named by its values."""
    options = options_of(defense)
    known = vars(defense) if options is None else options
    return {name: repr(value) for name, value in known.items()}


def _version(package: str) -> str:
    """The version of the distribution that holds a package; a plugin in one file has none."""
    distributions = importlib.metadata.packages_distributions().get(package)
    return importlib.metadata.version(distributions[0]) if distributions else "none"


def _write(path: Path, made: Made, facts: Mapping[str, str]) -> None:
    """Write beside the place and move there: whoever reads finds all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in made.items()}
    metadata = {"facts": json.dumps(dict(facts)), "digest": _content(tensors)}
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False, suffix=".part") as file:
        file.write(save(tensors, metadata))
    Path(file.name).replace(path)


def _read(path: Path, facts: Mapping[str, str]) -> Made:
    remedy = "Delete it, and it is made again."
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            made = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). {remedy}") from error
    held = json.loads(metadata.get("facts", "{}"))
    differing = sorted(name for name in {*facts, *held} if facts.get(name) != held.get(name))
    if differing:
        raise CheckpointError(
            f"{path} was made for something else: {', '.join(differing)} differ. {remedy}"
        )
    if metadata.get("digest") != _content(made):
        raise CheckpointError(f"{path} is damaged: its content is not what was written. {remedy}")
    return made


def _content(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
