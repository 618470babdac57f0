"""Open a data set as a table on disk: by its name on the hub, or from local files.

Everything ends as a memory-mapped Arrow table of the `datasets` library, in its cache folder. A local copy may have
the hub's layout (``sst2/train-00000-of-00001.parquet``) or the layout its authors gave it (``SST-2/train.tsv``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from vflair_core import TaskError

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]
BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}


@frozen
class Original:
    """Files that need more than a reader of tables.

    Args:
        find: Returns the files of a split, given a folder (or file) and the names the split may have.
        rows: Yields the rows of such files, in the hub's columns.
    """

    find: Callable[[Path, Sequence[str]], Sequence[Path]]
    rows: Callable[[Sequence[str]], Iterator[Row]]


@frozen
class Source:
    """Where a data set is and what its files look like.

    Args:
        hub: Its name on the hub.
        config: Its configuration there, also the name of a folder in a local copy.
        folders: Other names of that folder.
        csv: By ending, how its files differ from pandas' defaults, e.g. ``{".tsv": {"quoting": 3}}``.
        original: How its authors' files are read where they are not tables.
    """

    hub: str
    config: str | None = None
    folders: tuple[str, ...] = ()
    csv: Mapping[str, Mapping[str, Any]] = field(factory=dict)
    original: Original | None = None


@frozen
class Opened:
    """One split on disk.

    Attributes:
        table: Memory-mapped.
        sha256: Of the bytes of the local files, or of the hub's own checksums.
    """

    table: Dataset
    sha256: str


def open_split(source: Source, names: Sequence[str], data: str | Path | None) -> Opened:
    """Return the split that is called the first of `names` on the hub, and any of them in local files.

    Raises:
        TaskError: It cannot be found, downloaded or parsed.
    """
    if data is None:
        return _from_hub(source, names[0])
    place = Path(data).expanduser()
    if not place.exists():
        raise TaskError(
            f"data={str(data)!r} does not exist (looked in {Path.cwd()}). Give a folder or file that does, "
            f"or leave it out to load {source.hub!r} from the hub."
        )
    inner = [place / name for name in (source.config, *source.folders) if name]
    place = next((folder for folder in inner if folder.is_dir()), place)
    if source.original is not None:
        found = source.original.find(place, names)
        if found:
            return from_rows(source.original.rows, found)
    files = [place] if place.is_file() else files_of(place, names)
    if not files:
        inside = sorted(path.name for path in place.iterdir())[:8]
        raise TaskError(
            f"{place} has no file of the split {' or '.join(names)}; there are {', '.join(inside) or 'no files'}. "
            f"Name it {names[0]}.parquet, .jsonl, .csv or .tsv, or {names[0]}-00000-of-00001.parquet as on the hub."
        )
    return from_files(files, source.csv)


def files_of(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the files of the first of `names` that has any: ``train.csv``, ``train-….parquet``, ``train/….json``."""
    every = sorted(path for path in folder.rglob("*") if path.suffix in BUILDERS)
    for name in names:
        found = [
            path
            for path in every
            if path.stem == name or path.stem.startswith(f"{name}-") or path.parent.name == name
        ]
        if found:
            suffix = found[0].suffix
            return [path for path in found if path.suffix == suffix]
    return []


def from_files(files: Sequence[Path], csv: Mapping[str, Mapping[str, Any]] | None = None) -> Opened:
    """Convert csv, tsv, json, jsonl or parquet files to Arrow, once, and map them.

    Raises:
        TaskError: The ending is unknown, a file is empty or does not parse.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowException

    suffix = files[0].suffix
    if suffix not in BUILDERS:
        raise TaskError(
            f"{files[0]} cannot be read: a file ends in {', '.join(sorted(BUILDERS))}. Convert it to one of them."
        )
    for file in files:
        if not file.stat().st_size:
            raise TaskError(f"{file} is empty. Give a file with a header and at least one row.")
    options = dict((csv or {}).get(suffix, {}))
    if BUILDERS[suffix] == "csv":  # "NA" and "null" are words, only nothing is nothing
        options = {"keep_default_na": False, "na_values": [""]} | options
    if suffix == ".tsv":
        options = {"sep": "\t"} | options
    try:
        with quiet():
            table = load_dataset(
                BUILDERS[suffix], data_files=[str(file) for file in files], split="train", **options
            )
    except (DatasetGenerationError, ArrowException) as error:
        reason = str(error.__cause__ or error).strip()
        raise TaskError(
            f"{files[0]} does not parse as {suffix[1:]}: {reason}. Repair the file; nothing of it was kept."
        ) from error
    except ValueError as error:
        raise TaskError(f"{files[0]} has no rows ({error}). Give it at least one.") from error
    return Opened(table, digest_of(files))


def from_rows(rows: Callable[[Sequence[str]], Iterator[Row]], files: Sequence[Path]) -> Opened:
    """Write what `rows` yields of `files` to Arrow, once, and map it.

    Raises:
        TaskError: The rows cannot be read.
    """
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    digest = digest_of(files)
    try:
        with quiet():
            # The digest is an argument, so that a file that changed is not taken from the cache.
            table = Dataset.from_generator(
                _rows_of, gen_kwargs={"rows": rows, "files": [str(f) for f in files], "_": digest}
            )
    except DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, TaskError):
            raise cause from error
        raise TaskError(
            f"{files[0]} is not in the layout of this data set: {cause!r}. Check that it is the file as "
            "its authors distribute it, or one in the hub's columns."
        ) from error
    return Opened(table, digest)


def _rows_of(rows: Any, files: Any, _: Any) -> Iterator[Row]:
    # gen_kwargs of one element are not split: datasets shards lists only when asked for processes.
    yield from rows(files)


def _from_hub(source: Source, split: str) -> Opened:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        with quiet():
            table = load_dataset(source.hub, source.config, split=split)
    except (OSError, DatasetNotFoundError, ValueError) as error:
        raise TaskError(
            f"Cannot load the split {split!r} of {source.hub!r} from the hub: {error}. Connect to it, or give a "
            'local copy: options = { data = "FOLDER" }.'
        ) from error
    sums = repr(sorted((table.info.download_checksums or {}).items()))
    return Opened(table, hashlib.sha256(sums.encode()).hexdigest())


def digest_of(files: Sequence[Path]) -> str:
    """Return one sha256 of the bytes of several files."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep `datasets` from drawing progress bars; what was set before is put back."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()
