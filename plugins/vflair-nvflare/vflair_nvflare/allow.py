"""Lets jobs of vflair run at a site: ``python -m vflair_nvflare.allow FOLDER...``, where FOLDER is a site's startup kit.

NVFlare builds only components that a site allows. This adds the package to the list in ``local/resources.json``, of which
``resources.json.default`` is the beginning. The site must be started anew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vflair_core import ProtocolError

LIST, PACKAGE = "class_allow_list", "vflair_nvflare."  # with a full stop: all of the package


def allow(folder: str | Path) -> Path:
    """Add the package to the site's list, and return the file.

    Args:
        folder: With ``startup`` and ``local``, at a site or at the server.

    Raises:
        ProtocolError: It is no startup kit, or its resources cannot be read.
    """
    local = Path(folder) / "local"
    own, default = local / "resources.json", local / "resources.json.default"
    source = own if own.exists() else default
    if not source.exists():
        raise ProtocolError(
            f"{folder} has no {source.relative_to(folder)}: give the folder of a site or of the server, in which "
            "'startup' and 'local' are."
        )
    try:
        resources = json.loads(source.read_text())
    except ValueError as error:
        raise ProtocolError(f"{source} is no JSON: {error}") from error
    allowed = resources.setdefault(LIST, [])
    if PACKAGE not in allowed and "*" not in allowed:
        allowed.append(PACKAGE)
    own.write_text(json.dumps(resources, indent=2) + "\n")
    return own


def main(folders: list[str]) -> None:
    """Do it for each folder."""
    if not folders:
        raise SystemExit(__doc__)
    for folder in folders:
        try:
            print(f"{allow(folder)} allows {PACKAGE}")  # noqa: T201 - this is a program
        except ProtocolError as error:
            raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main(sys.argv[1:])
