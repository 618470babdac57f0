"""The public source: docstrings of the standard library, read from its files and never imported."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from vflair_core import TaskError

# A fixed list, so that the text depends on the version of Python alone. Each exists from 3.11 on.
MODULES = """
    _pydecimal abc argparse ast asyncio base64 bdb bz2 calendar cmd code codecs collections
    concurrent configparser contextlib dataclasses datetime difflib dis doctest email enum
    filecmp fileinput fractions ftplib functools getopt graphlib gzip heapq http imaplib
    importlib inspect ipaddress json logging lzma mimetypes multiprocessing optparse os pathlib
    pdb pickle pickletools pkgutil platform poplib pstats queue random re sched selectors
    shelve shutil smtplib socket socketserver ssl statistics string subprocess tarfile tempfile
    textwrap threading timeit tokenize traceback typing unittest urllib uuid wave weakref
    wsgiref xml xmlrpc zipfile
""".split()
MIN_CHARACTERS = 80
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def docstrings() -> tuple[str, ...]:
    """Return the distinct docstrings in one shuffled order, so that any prefix is a fair sample."""
    found = dict.fromkeys(
        docstring
        for module in MODULES
        for path in _files(module)
        for docstring in _docstrings_in(path)
        if len(docstring) >= MIN_CHARACTERS
    )
    shuffled = list(found)
    random.Random(0).shuffle(shuffled)
    return tuple(shuffled)


def _files(module: str) -> list[Path]:
    library = Path(sysconfig.get_path("stdlib"))
    package = library / module
    files = [path for path in package.rglob("*.py") if not _is_test(path.relative_to(package))]
    if (library / f"{module}.py").is_file():
        files.append(library / f"{module}.py")
    if not files:
        raise TaskError(
            f"Cannot read the docstrings of {module!r}: {library} has no source file of it. "
            "The public text needs a Python whose standard library is installed as .py files."
        )
    return sorted(files)


def _is_test(path: Path) -> bool:
    return not {"test", "tests"}.isdisjoint(path.parts)


def _docstrings_in(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, _DOCUMENTED) and (docstring := ast.get_docstring(node)):
            yield docstring
