"""The process that holds what an attack is granted: its device, its environment, and why it failed."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from typing import IO, Any, Literal

import torch
from attrs import frozen

from vflair_core.attacks.fence import IMPORTED, unseen
from vflair_core.attacks.fork_server import Forked, ForkServer
from vflair_core.errors import ExperimentError

Isolation = Literal["process", "inline"]
FENCE = "vflair_core.attacks.fence"
FORK_SERVER = ForkServer()


def attack_device(asked: str) -> torch.device:
    """The device that a name means here; "auto" is CUDA where torch has it, else the CPU.

    Raises:
        ExperimentError: torch does not know such a device, or it is not there.
    """
    if asked == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = None
    if device is None or (device.index or 0) >= _count(device.type):
        what = "torch knows no such device" if device is None else "it is not there"
        raise ExperimentError(
            f"Attacks were asked to compute on {asked!r}, and {what}. Possible here: auto, "
            f"{', '.join(_there())}. Set attack_device (or --device) to one of these."
        )
    return device


def hint_of(device: str, error: str) -> str:
    """What to do if an attack that moves no tensors failed because its models were on another `device`."""
    if device == "cpu" or "device" not in error:
        return ""
    return f' Its models were on {device}: if it moves no tensors to them, set attack_device = "cpu" (--device cpu).'


def _count(kind: str) -> int:
    """How many devices of a kind are there; 0 of a kind that does not compute."""
    module: Any = getattr(torch, kind, None)
    return int(module.device_count()) if hasattr(module, "device_count") else 0


def _there() -> list[str]:
    kinds = [kind for kind in ("cuda", "xpu", "mps") if _count(kind)]
    return ["cpu", *(f"{kind}:{n}" for kind in kinds for n in range(_count(kind)))]


KEPT = (
    "PATH",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "HOME",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "HF_HUB_OFFLINE",
    "CUDA_VISIBLE_DEVICES",  # a device has the same number here and there
    "CUDA_DEVICE_ORDER",
)


def environment() -> dict[str, str]:
    """What such a process needs of this one's environment, and nothing else of it."""
    here = os.pathsep.join(path for path in sys.path if path)
    return {name: os.environ[name] for name in KEPT if name in os.environ} | {"PYTHONPATH": here}


def _imported() -> str:
    """Where packages lie that this process has imported, beside Python's own: an attack may need them."""
    own = (sys.prefix, sys.base_prefix)
    places: list[str] = []
    for name, module in list(sys.modules.items()):
        if "." not in name and name != "__main__":
            one = [file] if (file := getattr(module, "__file__", None)) else []
            places += [str(place) for place in getattr(module, "__path__", one)]
    return os.pathsep.join(sorted({place for place in places if not place.startswith(own)}))


@contextmanager
def started(module: str, folder: Path) -> Iterator[Popen[bytes] | Forked]:
    """Run ``module.main(folder)`` in a process in that folder, fenced, with a bare environment; wait for its end on the way out."""
    bare = {**environment(), "TMPDIR": str(folder), IMPORTED: _imported()}
    with (folder / "stderr.txt").open("w") as errors, unseen():
        process = _start(module, folder, bare, errors)
        assert process.stdin is not None  # pipes were asked for
        assert process.stdout is not None
        with process.stdout:
            try:
                yield process
            except BaseException:
                process.kill()  # nobody will read what it finds
                raise
            finally:
                process.stdin.close()  # at which who serves ends
                process.wait()


def _start(
    module: str, folder: Path, environment: dict[str, str], errors: IO[str]
) -> Popen[bytes] | Forked:
    if sys.platform == "linux":  # where a fork of a process that has imported much is safe
        return FORK_SERVER.start(FENCE, module, folder, environment, errors)
    command = [sys.executable, "-m", FENCE, module, str(folder)]
    return Popen(  # noqa: S603 - our own module
        command, stdin=PIPE, stdout=PIPE, stderr=errors, cwd=folder, env=environment
    )


@frozen
class Failure:
    """Why such a process ended: the error, and its traceback if it was raised in Python."""

    error: str
    traceback: str | None


def failure_in(folder: Path, code: int) -> Failure:
    """Read what a process that ended with `code` left in its folder."""
    report = folder / "error.json"
    if report.exists():
        return Failure(**json.loads(report.read_text()))
    said = (folder / "stderr.txt").read_text()[-2000:]
    return Failure(f"its process ended with code {code}: {said}", None)


def reporting(folder: Path, body: Callable[[], None]) -> int:
    """Run the body of such a process with the threads of its job; return its code, and leave the error for the parent."""
    torch.set_num_threads(json.loads((folder / "job.json").read_text())["threads"])
    try:
        body()
    except Exception as error:  # noqa: BLE001 - the parent raises it by name
        report = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        (folder / "error.json").write_text(json.dumps(report))
        return 1
    return 0
