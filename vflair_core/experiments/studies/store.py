"""The store of a study: one SQLite file with what every piece of work found, and a folder beside it with what attacks read.

A piece that is there is never run again. One process writes; anybody may read meanwhile. Tables:

- ``pieces``: key, kind (public, arm, grades), about (what it is, JSON), found (JSON) or error with its trace, seconds,
  peak_memory_bytes, host and when it ended.
- ``cells``: the cells of the study as it was run last, in order: key, labels, plan and environment (JSON).

``PRAGMA user_version`` is the version of the schema; an older file is brought up to date when it is opened to write.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import frozen

from vflair_core.errors import ExperimentError

MIGRATIONS = (  # one for each version of the schema
    """
    CREATE TABLE pieces (
        key TEXT PRIMARY KEY, kind TEXT NOT NULL, about TEXT NOT NULL, found TEXT, error TEXT, trace TEXT,
        seconds REAL NOT NULL, peak_memory_bytes INTEGER NOT NULL, host TEXT NOT NULL, ended TEXT NOT NULL,
        CHECK ((found IS NULL) <> (error IS NULL))
    );
    CREATE TABLE cells (
        position INTEGER PRIMARY KEY, key TEXT NOT NULL, labels TEXT NOT NULL, plan TEXT NOT NULL,
        environment TEXT NOT NULL
    );
    """,
)
SQLITE = b"SQLite format 3\0"  # what every database begins with
PART, LIST = ".part", "files.json"  # what is being made; what there is in the folder of an arm
LARGE = 1 << 16  # bytes of a file that is kept once, however many folders hold it


@frozen
class Outcome:
    """What came of a piece: what it found, or why it failed. It was `lost` if files were missing that it reads."""

    found: dict[str, Any] | None = None
    lost: bool = False
    error: str = ""
    trace: str = ""
    seconds: float = 0.0
    peak_memory_bytes: int = 0


@frozen(eq=False)
class Store:
    """An open store. Make it with `opened`."""

    path: Path
    _database: sqlite3.Connection

    @property
    def folder(self) -> Path:
        """Where what attacks read lies."""
        return self.path.with_name(f"{self.path.stem}.files")

    def arm(self, key: str) -> Path:
        """The folder of an arm."""
        return self.folder / "arms" / key

    def trained(self, key: str) -> Path:
        """Where the weights of a training lie that several arms share, while one is left that needs them."""
        return self.folder / "trained" / key

    # -- pieces -------------------------------------------------------------------------------------------

    def found(self, key: str) -> dict[str, Any] | None:
        """What a piece found; None if it is not done."""
        row = self._one("SELECT found FROM pieces WHERE key = ? AND found IS NOT NULL", key)
        return None if row is None else json.loads(row[0])

    def error(self, key: str) -> str:
        """Why a piece failed; empty if it did not."""
        row = self._one("SELECT error FROM pieces WHERE key = ? AND error IS NOT NULL", key)
        return "" if row is None else str(row[0])

    def write(self, key: str, kind: str, about: Mapping[str, Any], outcome: Outcome) -> None:
        """Write what came of a piece, at once and for good."""
        found = None if outcome.found is None else json.dumps(outcome.found)
        error = (outcome.error, outcome.trace) if outcome.found is None else (None, None)
        with self._database:
            self._database.execute(
                "INSERT OR REPLACE INTO pieces VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(key, kind, json.dumps(about), found, *error),
                    *(outcome.seconds, outcome.peak_memory_bytes, socket.gethostname(), _now()),
                ),
            )

    def forget_failures(self) -> int:
        """Let what failed be tried again; return how many pieces that are."""
        with self._database:
            return self._database.execute("DELETE FROM pieces WHERE error IS NOT NULL").rowcount

    def seconds(self) -> Iterator[tuple[str, dict[str, Any], float]]:
        """Yield the kind of each finished piece, what it was about and how long it took."""
        rows = "SELECT kind, about, seconds FROM pieces WHERE found IS NOT NULL"
        for kind, about, seconds in self._database.execute(rows):
            yield kind, json.loads(about), seconds

    def measured(self, key: str) -> tuple[float, int]:
        """Seconds and peak memory in bytes of a piece that is there."""
        row = self._one("SELECT seconds, peak_memory_bytes FROM pieces WHERE key = ?", key)
        assert row is not None  # who asks has seen it
        return float(row[0]), int(row[1])

    # -- cells --------------------------------------------------------------------------------------------

    def set_cells(self, rows: Iterable[tuple[str, Any, Any, Any]]) -> None:
        """Replace the list of cells by rows of key, labels, plan and environment."""
        with self._database:
            self._database.execute("DELETE FROM cells")
            self._database.executemany(
                "INSERT INTO cells (key, labels, plan, environment) VALUES (?, ?, ?, ?)",
                [(key, *(json.dumps(each) for each in rest)) for key, *rest in rows],
            )

    def cells(self) -> list[tuple[str, dict[str, str], dict[str, Any], dict[str, Any]]]:
        """The cells in their order, each as key, labels, plan and environment."""
        rows = self._database.execute(
            "SELECT key, labels, plan, environment FROM cells ORDER BY position"
        )
        return [(key, *(json.loads(text) for text in rest)) for key, *rest in rows]  # type: ignore[misc]

    def take_in(self, other: Path) -> int:
        """Copy the pieces of another store that are done and not here; return how many. Their files are not copied.

        Raises:
            ExperimentError: It is no store, or of another version.
        """
        with opened(other, write=False) as source:
            rows = source._database.execute(  # noqa: SLF001 - of its own class
                "SELECT * FROM pieces WHERE found IS NOT NULL"
            ).fetchall()
        with self._database:
            marks = ", ".join("?" * 10)
            done = self._database.executemany(
                f"INSERT INTO pieces VALUES ({marks}) ON CONFLICT (key) DO UPDATE SET "  # noqa: S608 - no value is put in
                "found = excluded.found, error = NULL, trace = NULL WHERE pieces.found IS NULL",
                rows,
            )
        return done.rowcount

    def _one(self, query: str, key: str) -> Any:
        return self._database.execute(query, (key,)).fetchone()


@contextmanager
def opened(path: str | Path, *, write: bool) -> Iterator[Store]:
    """Open a store; to `write`, which makes one if there is none, only one process can.

    Raises:
        ExperimentError: There is none to read, it is no store, it is of a newer version, or another process writes to it.
    """
    path = Path(path)
    if not write and not path.is_file():
        raise ExperimentError(f"There is no study {path}: `vflair study FILE` makes one.")
    _check_is_ours(path)
    with contextlib.ExitStack() as stack:
        if write:
            stack.enter_context(_alone(path))
            _close_to_others(path)
        mode = "rwc" if write else "ro"
        try:
            place = f"{path.absolute().as_uri()}?mode={mode}"
            database = sqlite3.connect(place, uri=True, timeout=30)
            stack.callback(database.close)
            _up_to_date(database, path, write=write)
        except sqlite3.OperationalError as error:
            raise _unusable(path, error) from error
        except sqlite3.DatabaseError as error:
            raise ExperimentError(f"{path} is no study: {error}.") from error
        try:
            yield Store(path, database)
        except sqlite3.OperationalError as error:  # a disk that is full, a file that is gone
            raise _unusable(path, error) from error
        if write:  # one file again, that can be read where nothing can be written
            with contextlib.suppress(
                sqlite3.OperationalError
            ):  # somebody reads it: the next writer will
                database.execute("PRAGMA journal_mode = DELETE")


def _check_is_ours(path: Path) -> None:
    """See that a file that is there is a database, before anything is done to it or beside it."""
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            start = file.read(len(SQLITE))
    except OSError as error:
        raise ExperimentError(f"{path} cannot be read: {error.strerror}.") from error
    if start not in (b"", SQLITE):
        raise ExperimentError(
            f"{path} is no study, but another file. Give --db a file that a study made, or a new one."
        )


def _unusable(path: Path, error: sqlite3.OperationalError) -> ExperimentError:
    return ExperimentError(
        f"{path} cannot be read or written: {error}. What was finished before is in it; see that there is room on its disk, "
        "and give the same command again."
    )


def _close_to_others(path: Path) -> None:
    """Make the file and the folder beside it for nobody else to read: private texts are in both."""
    files = path.with_name(f"{path.stem}.files")
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
        files.mkdir(mode=0o700, exist_ok=True)
        files.chmod(0o700)
    except OSError as error:
        raise ExperimentError(
            f"{error.filename} cannot be written: {error.strerror}. Give another store (--db), a file."
        ) from error
    for left in files.glob(f"arms/*{PART}"):  # by a process that was killed
        shutil.rmtree(left)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock of the one process that writes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f"{path.name}.lock").open("a+")
    except OSError as error:
        raise ExperimentError(
            f"Nothing can be written to {path.parent}: {error.strerror}. Give another store (--db)."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise ExperimentError(
                f"Process {lock.read().strip() or 'of somebody else'} is running the study {path}. Wait for it, stop it "
                "(Ctrl-C lets it finish what it has begun), or use another store (--db)."
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _up_to_date(database: sqlite3.Connection, path: Path, *, write: bool) -> None:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    if version > len(MIGRATIONS):
        raise ExperimentError(
            f"{path} is of version {version}, and this vflair knows {len(MIGRATIONS)}: install a newer vflair-core."
        )
    if version == 0 and (tables or not write):
        raise ExperimentError(f"{path} is a database, but no study. Give another file (--db).")
    if not write:
        if version < len(MIGRATIONS):
            raise ExperimentError(f"{path} is of an older version: run `vflair study` on it once.")
        return
    database.execute("PRAGMA journal_mode = WAL")
    for number, migration in enumerate(MIGRATIONS[version:], start=version + 1):
        database.executescript(f"BEGIN; {migration} PRAGMA user_version = {number}; COMMIT;")


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


# -- files ------------------------------------------------------------------------------------------------------


def share_files(folder: Path, blobs: Path) -> None:
    """Keep large files of a folder once by their content: what another folder has too becomes a link to the same file.

    A file system that knows no links keeps copies.
    """
    blobs.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.stat().st_size < LARGE:
            continue
        with file.open("rb") as stream:
            blob = blobs / hashlib.file_digest(stream, "sha256").hexdigest()
        try:
            os.link(file, blob)
        except FileExistsError:
            part = file.with_name(f"{file.name}.link")
            try:
                os.link(blob, part)
            except OSError:
                return
            part.replace(file)
        except OSError:
            return


def list_files(folder: Path) -> None:
    """Write down what files there are in the folder of an arm, with their sizes."""
    each = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in each}
    (folder / LIST).write_text(json.dumps(sizes), encoding="utf-8")


def is_whole(folder: Path) -> bool:
    """Whether all files are there that an arm left."""
    if not (folder / LIST).is_file():
        return False
    sizes = json.loads((folder / LIST).read_text(encoding="utf-8"))
    files = {folder / name: size for name, size in sizes.items()}
    return all(file.is_file() and file.stat().st_size == size for file, size in files.items())


def drop_blobs(folder: Path) -> None:
    """Remove what is kept by its content and no arm has any more."""
    for blob in (folder / "blobs").glob("*"):
        if blob.stat().st_nlink == 1:
            blob.unlink()
