"""Run two experiments with a tracker in a process of their own, one of which fails, and print whom the process called.

python tests/support/tracked_runs.py TRACKER OUT
"""

from __future__ import annotations

import json
import socket
import sys

from support.paths import SAMPLE_PLUGIN, SECRET_WORDS
from support.secret_words import SECRET
from support.small_models import LLAMA
from vflair_core import plugin_manager, run
from vflair_core.experiments.config import experiment_from

EXPERIMENT = {
    "task": {"name": "secret-words", "options": {"examples": 20, "note": SECRET}},
    "model": {"config": LLAMA, "vocab_size": 300},
    "partition": {"head": 1, "tail": 1},
    "train": {"steps": 4, "evaluate_every": 2, "batch_size": 4, "learning_rate": 0.01},
    "victims": {"count": 4, "bypass": 2, "queries": 2},
    "attacks": [{"name": "first-row", "knowledge": "K1"}, {"name": "first-row", "knowledge": "K4"}],
    "defenses": [{"name": "shift", "options": {"by": 2.0}}],
    "isolation": "inline",
}


def main() -> None:
    tracker, out = sys.argv[1:]
    called = []

    def listen(event, arguments):
        if event == "socket.getaddrinfo":
            called.append(str(arguments[0]))
        if event == "socket.connect" and arguments[0].family != socket.AF_UNIX:
            called.append(str(arguments[1]))

    sys.addaudithook(listen)
    files = [tracker, SAMPLE_PLUGIN, SECRET_WORDS]
    plugins = plugin_manager(files, entry_point_group="vflair.none")
    run(experiment_from(EXPERIMENT), plugins=plugins, out=out, strict=True)
    breaking = {**EXPERIMENT, "task": {"name": "secret-words", "options": {"broken": 3}}}
    words = ""
    try:
        run(experiment_from(breaking), plugins=plugins, strict=True)
    except Exception as error:  # noqa: BLE001 - what it was the test says
        words = repr(error)
    print(json.dumps({"called": called, "error": words}))  # noqa: T201


if __name__ == "__main__":
    main()
