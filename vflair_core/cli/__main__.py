"""The door of the program: ``vflair``, or ``python -m vflair_core.cli``. Without the extra `cli` it says what to install."""

from __future__ import annotations

import importlib.util
import sys

NEEDED = ("cyclopts", "rich")  # what the extra `cli` brings


def main() -> None:
    """Run the program on the words it was called with."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"vflair: The program needs {' and '.join(missing)}, not installed here. Install the extra: "
            "python -m pip install 'vflair-core[cli]'.\n"
        )
        sys.exit(1)
    from vflair_core.cli.main import main as run_program

    run_program()


if __name__ == "__main__":
    main()
