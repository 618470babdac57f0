"""Who may use a model party, and for what: a file with the digests of tokens, read again when it changes."""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import os
import re
import secrets
import stat
import threading
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from vflair_core.communication.remote.rights import RIGHTS, Client, Right
from vflair_core.errors import VflairError, alternatives
from vflair_core.events import events

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
KEYS = ("sha256", "rights", "expires")

log = events(__name__)


@frozen
class _Entry:
    client: Client
    sha256: str
    expires: dt.datetime | None


class Clients:
    """The clients in a file, as it is at the moment.

    A change of the file counts from the next message on. If it cannot be read then, the clients of before stay, and the
    log says why.

    Args:
        file: One line for each client, TOML: ``alice = {sha256 = "…", rights = ["infer"], expires = 2027-06-30}``.

    Raises:
        VflairError: The file is missing, readable by others than its owner, or has an entry that is none.
    """

    def __init__(self, file: str | Path) -> None:
        self._file = Path(file)
        self._lock = threading.Lock()
        self._seen = _state(self._file)
        self._entries = _read(self._file)

    def reload(self) -> None:
        """Read the file again, changed or not.

        Raises:
            VflairError: As when it was read first; the clients of before stay.
        """
        with self._lock:
            state = _state(self._file)
            self._entries = _read(self._file)
            self._seen = state

    def find(self, token: str) -> Client | None:
        """The client whose token this is, unless it has expired."""
        digest = digest_of(token)
        found = None
        for entry in self._now():  # all of them: how long it takes tells nothing
            if hmac.compare_digest(entry.sha256, digest):
                found = entry
        return found.client if found is not None and _holds(found) else None

    def named(self, name: str) -> Client | None:
        """The client of that name as the file knows it now, unless its token has expired."""
        return next((e.client for e in self._now() if e.client.name == name and _holds(e)), None)

    def __len__(self) -> int:
        return len(self._now())

    def _now(self) -> tuple[_Entry, ...]:
        with self._lock:
            state = _state(self._file)
            if state != self._seen:
                self._seen = state
                try:
                    self._entries = _read(self._file)
                except VflairError as error:
                    log.warning("clients_not_read", why=str(error), kept=len(self._entries))
                else:
                    log.info("clients_read", file=str(self._file), clients=len(self._entries))
            return self._entries


def new_token() -> str:
    """A token that nobody guesses: 256 bits, with a beginning that scanners for secrets can know."""
    return f"vflair_{secrets.token_urlsafe(32)}"


def digest_of(token: str) -> str:
    """What the file holds of a token. It needs no slow digest, for a token is no password."""
    return hashlib.sha256(token.encode()).hexdigest()


def entry_for(name: str, token: str, rights: Iterable[str], expires: dt.date | None = None) -> str:
    """The line of a client.

    Raises:
        VflairError: The name or a right cannot be one.
    """
    check_name(name)
    given = _rights(name, list(rights))
    listed = ", ".join(f'"{right}"' for right in RIGHTS if right in given)
    until = "" if expires is None else f", expires = {expires.isoformat()}"
    return f'"{name}" = {{sha256 = "{digest_of(token)}", rights = [{listed}]{until}}}'


def add_entry(file: Path, line: str) -> None:
    """Add the line of a client to a file, which is made if there is none.

    Raises:
        VflairError: The file has this client already, is none of clients, or cannot be written.
    """
    before = ""
    if file.exists():
        _read(file)
        before = file.read_text(encoding="utf-8").rstrip("\n") + "\n"
    (name,) = tomllib.loads(line)
    if name in tomllib.loads(before):
        raise VflairError(f"{file} has a client {name!r} already. Take its line out first.")
    aside = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    write_new(aside, f"{before}{line}\n")
    aside.replace(file)  # whole at any time, for a server that reads it


def write_new(file: Path, text: str) -> None:
    """Write a new file that only its owner may read.

    Raises:
        VflairError: There is one, or it cannot be written.
    """
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise VflairError(f"{file} cannot be written: {error.strerror}.") from error
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)


def check_name(name: str) -> None:
    """Refuse what cannot name a client.

    Raises:
        VflairError: It has other signs than letters, digits, dots, dashes and underscores, or more than 64.
    """
    if not NAME.fullmatch(name):
        raise VflairError(
            f"{name!r:.80} cannot be the name of a client: it has 1 to 64 letters, digits, dots, dashes and underscores, "
            "the first of them a letter or digit."
        )


def check_private(file: Path, what: str) -> None:
    """Refuse a file that others than its owner can read or change.

    What belongs to root may be read by a group, as service managers hand it over.

    Raises:
        VflairError: It is missing, or open to others.
    """
    try:
        facts = file.stat()
    except OSError as error:
        raise VflairError(f"{what} cannot be read: {file}: {error.strerror}.") from error
    if not stat.S_ISREG(facts.st_mode):
        raise VflairError(f"{what} cannot be read: {file} is no file.")
    allowed = 0o740 if facts.st_uid == 0 and os.geteuid() != 0 else 0o700
    if facts.st_mode & 0o777 & ~allowed:
        raise VflairError(
            f"{what} {file} is open to others than its owner (mode {facts.st_mode & 0o777:04o}). Close it: "
            f"chmod 600 {file}"
        )


def _state(file: Path) -> tuple[int, ...] | None:
    """What changes when a file does; None where there is none."""
    try:
        facts = file.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_mode


def _read(file: Path) -> tuple[_Entry, ...]:
    check_private(file, "The file of clients")
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise VflairError(f"The file of clients {file} cannot be read: {error}") from error
    entries = tuple(_entry(file, name, facts) for name, facts in table.items())
    if len({entry.sha256 for entry in entries}) < len(entries):
        raise VflairError(f"Two clients in {file} have the same token. Make one for each.")
    return entries


def _entry(file: Path, name: str, facts: Any) -> _Entry:
    check_name(name)
    where = f"{file}, client {name}"
    if not isinstance(facts, Mapping):
        raise VflairError(f"{where}: write {name} = {{sha256 = …, rights = […]}}.")
    for key in facts:
        if key not in KEYS:
            raise VflairError(f"{where}: there is no {key!r}.{alternatives(key, KEYS)}")
    digest = facts.get("sha256")
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise VflairError(
            f"{where}: sha256 must be the digest of its token, 64 hexadecimal digits, never the token itself. "
            f"`vflair token new {name}` makes both."
        )
    client = Client(name, _rights(where, facts.get("rights")))  # type: ignore[arg-type]
    return _Entry(client, digest, _instant(where, facts.get("expires")))


def _rights(where: str, rights: Any) -> frozenset[Right]:
    if not isinstance(rights, list) or not rights:
        raise VflairError(f"{where}: rights must be a list of {', '.join(RIGHTS)}.")
    for right in rights:
        if right not in RIGHTS:
            raise VflairError(
                f"{where}: there is no right {right!r}.{alternatives(str(right), RIGHTS)}"
            )
    found: set[Right] = {"infer", *rights}  # without the first nothing can be done at all
    return frozenset(found)


def _instant(where: str, expires: Any) -> dt.datetime | None:
    """When a token ends: a moment, or the end of a day (UTC)."""
    if expires is None:
        return None
    if isinstance(expires, dt.datetime):
        return expires if expires.tzinfo else expires.replace(tzinfo=dt.UTC)
    if isinstance(expires, dt.date):
        day = dt.datetime.combine(expires, dt.time(), dt.UTC)
        return day + dt.timedelta(days=1)
    raise VflairError(f"{where}: expires must be a date, as 2027-06-30, without quotes.")


def _holds(entry: _Entry) -> bool:
    return entry.expires is None or dt.datetime.now(dt.UTC) < entry.expires
