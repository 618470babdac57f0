"""Starts a process of an attack behind a fence: ``python -m vflair_core.attacks.fence MODULE FOLDER``.

Linux's Landlock, where the kernel has it, takes from the process what it does not need: it reads Python, its packages
and its own folder, writes there only, and sees into no other process, whoever it runs as. It is closed before
any plugin is imported, and cannot be opened again. Nothing of this asks for privileges. Where Linux has no Landlock,
the process that knows the truth shuts its own memory instead while attacks run; files stay open to them.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

Fence = Literal["landlock", "memory", "none"]

# linux/landlock.h; the numbers of the calls are the same on every architecture.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
VERSION, PATH_BENEATH = 1, 1
GET_DUMPABLE, SET_DUMPABLE, NO_NEW_PRIVILEGES = 3, 4, 38  # linux/prctl.h
CAPABILITIES_3 = 0x20080522  # linux/capability.h
READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read a file, list a folder
LIST = 1 << 3
WRITE = 1 << 1 | sum(1 << bit for bit in range(4, 13))  # write, remove, make whatever there is
TRUNCATE = 1 << 14  # since version 3
OF_FILES = 1 << 0 | 1 << 1 | 1 << 2 | TRUNCATE  # what can be allowed of a file, which is no folder
IMPORTED = "VFLAIR_IMPORTED"  # variable with the places of packages
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/sys")
DEVICES = "/dev"


class _Ruleset(ctypes.Structure):
    _fields_ = (("handled", ctypes.c_uint64),)


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def fence_here() -> Fence:
    """Which fence this machine has; "memory" keeps an attack out of the run's process, not out of files."""
    if sys.platform != "linux":
        return "none"
    return "landlock" if _version() > 0 else "memory"


@contextmanager
def unseen() -> Iterator[None]:
    """Let no other process look into this one meanwhile, where Landlock does not keep attacks out of it."""
    if fence_here() != "memory":
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    before = _check(libc.prctl(GET_DUMPABLE))
    _check(libc.prctl(SET_DUMPABLE, 0, 0, 0, 0))
    try:
        yield
    finally:
        _check(libc.prctl(SET_DUMPABLE, before, 0, 0, 0))


def close(folder: Path, plugins: tuple[Path, ...] = ()) -> None:
    """Leave this process its `folder`, Python with its packages, and files of `plugins`, if this machine has a fence.

    Raises:
        OSError: The kernel has Landlock and refuses.
    """
    version = _version()
    if version < 1:
        if sys.platform == "linux":
            _drop_privileges()
        return
    known = READ | WRITE | (TRUNCATE if version >= 3 else 0)
    size = ctypes.c_size_t(ctypes.sizeof(_Ruleset))
    ruleset = _call(CREATE_RULESET, ctypes.byref(_Ruleset(known)), size, 0)
    loaded: Iterable[str] = filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep))
    own = (*SYSTEM, *loaded, sys.prefix, sys.base_prefix)
    for place in (*map(Path, own), *_libraries(), *plugins):
        _allow(ruleset, place, READ & known)
    for entry in _entries():
        _allow(ruleset, entry, LIST)
    for place in (Path(DEVICES), folder):
        _allow(ruleset, place, known)
    _check(ctypes.CDLL(None, use_errno=True).prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    _call(RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    _drop_privileges()


def _drop_privileges() -> None:
    """Give up what root may do beyond its own files, such as to look at the memory of others."""
    if os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(CAPABILITIES_3, 0)
        nothing = (ctypes.c_uint32 * 6)()
        _check(ctypes.CDLL(None, use_errno=True).capset(header, nothing))


def _files_of(specs: Sequence[Mapping[str, Any]]) -> tuple[Path, ...]:
    """Plugins of one file, which are loaded from where they lie: ``"/a/file.py:attr"``."""
    places = (str(spec.get("target", "")).rpartition(":")[0] for spec in specs)
    return tuple(Path(place) for place in places if place.endswith(".py"))


def _entries() -> list[Path]:
    """Where modules are looked for, beside Python's own place."""
    own = (sys.prefix, sys.base_prefix)
    return [Path(entry) for entry in sys.path if entry and not entry.startswith(own)]


def _libraries() -> list[Path]:
    """Modules and packages there. What else lies beside them, results of runs for example, is not for attacks."""
    # What the parent has imported from elsewhere: packages that are installed editable, perhaps.
    found = [Path(place) for place in os.environ.get(IMPORTED, "").split(os.pathsep) if place]
    for entry in _entries():
        if entry.name in ("site-packages", "dist-packages"):
            found.append(entry)
            continue
        children = list(entry.iterdir()) if entry.is_dir() else [entry]
        found += [c for c in children if c.suffix in (".py", ".so", ".zip") or _is_package(c)]
    return found


def _is_package(path: Path) -> bool:
    return path.is_dir() and (path.suffix.endswith("-info") or any(path.glob("*.py")))


def _allow(ruleset: int, place: Path, rights: int) -> None:
    if not place.exists():
        return
    if not place.is_dir():
        rights &= OF_FILES
    handle = os.open(place, os.O_PATH | os.O_CLOEXEC)
    try:
        _call(ADD_RULE, ruleset, PATH_BENEATH, ctypes.byref(_Beneath(rights, handle)), 0)
    finally:
        os.close(handle)


def _version() -> int:
    """Of Landlock; 0 or less if the kernel has none, or another system runs here."""
    if sys.platform != "linux":
        return 0
    return int(ctypes.CDLL(None, use_errno=True).syscall(CREATE_RULESET, None, 0, VERSION))


def _call(number: int, *arguments: object) -> int:
    return _check(ctypes.CDLL(None, use_errno=True).syscall(number, *arguments))


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"The fence of the attack's process: {os.strerror(code)}")
    return result


def main(module: str, folder: str) -> None:
    """Close the fence, run ``module.main`` on `folder`, and end with what it returns."""
    job = json.loads((Path(folder) / "job.json").read_text())
    close(Path(folder), _files_of([*job["attacks"], *job["defenses"]]))
    sys.exit(importlib.import_module(module).main(Path(folder)))


if __name__ == "__main__":
    main(*sys.argv[1:])
