"""A site in a job: what a party's function is told, and where it finds and leaves its own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from vflair_core import ProtocolError, alternatives


@frozen
class Site:
    """One site of a job.

    Attributes:
        name: As the project names it.
        folder: Of this site and job alone, in NVFlare's workspace at the site. What is saved there stays there.
        options: What the job gives the functions, the same at every site: everybody in the project can read it.
    """

    name: str
    folder: Path
    options: Mapping[str, Any]


def site_of(context: Any, options: Mapping[str, Any] | None) -> Site:
    """The site at which a component runs, with its folder."""
    workspace = context.get_workspace()
    folder = Path(workspace.get_run_dir(context.get_job_id())) / "vflair"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Site(context.get_identity_name(), folder, dict(options or {}))


def function_of(path: str) -> Callable[..., Any]:
    """Find the function that a job names as ``module:function``.

    Raises:
        ProtocolError: It does not exist at this site.
    """
    module, _, name = path.partition(":")
    if not module or not name.isidentifier():
        raise ProtocolError(f"A function is named as 'module:function', not {path!r}.")
    try:
        home = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ProtocolError(
            f"{path!r} was asked for, and this site has no module {error.name!r}. Install it here, or give its file to "
            f"split_job(code=[...]). Python looks in: {', '.join(sys.path[:5])}."
        ) from error
    found = getattr(home, name, None)
    if not callable(found):
        functions = [n for n, value in vars(home).items() if callable(value) and n[:1] != "_"]
        raise ProtocolError(
            f"Module {module!r} has no function {name!r}.{alternatives(name, functions)}"
        )
    made: Callable[..., Any] = found
    return made
