"""The folder of a run: proved before anything is computed, closed to others, and never left with half a file.

`result.json` comes first, says that the run is unfinished, and is replaced with every arm that is done. What lies there
of an earlier run is never mixed with: it is refused, or goes away first. Nothing else that lies there is touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import define, field
from safetensors import SafetensorError

from vflair_core.attacks.evidence import FACTS, FILES
from vflair_core.errors import ExperimentError
from vflair_core.experiments.config import to_toml
from vflair_core.experiments.experiment import Experiment
from vflair_core.experiments.result import Result
from vflair_core.partition.checkpoint import DATA_FILE, MODEL_FILE, TOKENIZER

if TYPE_CHECKING:
    from vflair_core.communication.transcript import Transcript

RESULT, EXPERIMENT = "result.json", "experiment.toml"
KEY = "answer-key.json"  # beside the evidence that is kept, and never in reach of an attack
ARMS = ("undefended", "defended", "active-undefended", "active-defended")
EVIDENCE = tuple(f"evidence-{arm}" for arm in ARMS)
TRANSCRIPTS = ("transcript.safetensors", *(f"transcript-{arm}.safetensors" for arm in ARMS))
OF_RUN = (RESULT, EXPERIMENT, *TRANSCRIPTS, "cuts.json", "cuts.svg")
OF_ARM = (DATA_FILE, MODEL_FILE)
OF_EVIDENCE = (
    *("config.json", FACTS, KEY, "main.safetensors", "bypassed.safetensors"),
    *(file for file in FILES if file != TOKENIZER),
)
PART = ".part"  # what is being written
RUNS = re.compile(r"(seed|head)-\d+")  # folders of runs within the folder of several
LONGEST = f"seed-0000000000/{EVIDENCE[-1]}/{TOKENIZER}/special_tokens_map.json{PART}"


@define
class RunFolder:
    """Where one run writes. Make it with `claim`; from `begin` on its files are there."""

    path: Path
    experiment: Experiment
    arms: tuple[str, ...] = ()  # that are done
    _whole: RunFolder | None = None  # the folder of several runs, one of which is this
    _parts: list[RunFolder] = field(factory=list)  # their folders
    _made: list[Path] = field(factory=list)  # folders that were not there
    _begun: bool = False

    @classmethod
    def claim(cls, path: str | Path, experiment: Experiment, *, overwrite: bool) -> RunFolder:
        """Make the folder and see that a run can be written there, which changes nothing that lies there.

        Raises:
            ExperimentError: It cannot be made or written to, holds a run, or what is not a run's would be replaced.
        """
        made, runs = prove(Path(path)), [f"seed-{seed}" for seed in experiment.seeds]
        try:
            check_free(Path(path), runs, overwrite=overwrite)
        except ExperimentError:
            remove_empty(made)
            raise
        return cls(Path(path), experiment, made=made)

    def within(self, name: str, experiment: Experiment) -> RunFolder:
        """The folder of one of several runs."""
        self._parts.append(RunFolder(self.path / name, experiment, whole=self))
        return self._parts[-1]

    def begin(self) -> None:
        """Remove what an earlier run left, and say that this one is unfinished."""
        if self._whole is not None:
            self._whole.begin()
        if self._begun:
            return
        if self._whole is None:
            remove_run(self.path)
        self._made += make(self.path)
        self._begun = True
        e = self.experiment
        self.write(Result({}, {}, e.to_dict(), e.digest, finished=False))
        with aside(self.path / EXPERIMENT) as part:
            part.write_text(to_toml(e), encoding="utf-8")

    def write(self, result: Result) -> None:
        """Replace the result by what is known now."""
        with aside(self.path / RESULT) as part:
            result.to_json(part)
        self.arms = tuple(arm for arm in ARMS if arm in result.numbers)

    def write_transcript(self, arm: str, transcript: Transcript) -> None:
        """Write what crossed. That of the defended arm is the one to look at; those of other arms lie beside it."""
        last = "defended" if self.experiment.defenses else "undefended"
        name = TRANSCRIPTS[0] if arm == last else f"transcript-{arm}.safetensors"
        with aside(self.path / name) as part:
            transcript.save(part)

    def give_up(self) -> str:
        """Remove what there is of a run of which no arm is done; return what stays otherwise, as a sentence."""
        done = [*self.arms] if not self._parts else []
        done += [f"{part.path.name}/{arm}" for part in self._parts for arm in part.arms]
        if done:
            return f"What was finished is in {self.path}: {', '.join(done)}."
        if self._begun:
            remove_run(self.path)
        remove_empty(self._made)
        return ""


def read_finished(path: Path) -> tuple[bool, list[str]]:
    """Return whether the run in a folder was finished, and the arms that are done."""
    if not _is_result(path / RESULT):
        return False, []
    table = json.loads((path / RESULT).read_text(encoding="utf-8"))
    return table.get("finished", True), [arm for arm in ARMS if arm in table["numbers"]]


# -- before the run -----------------------------------------------------------------------------------------


def prove(path: Path) -> list[Path]:
    """Make a folder, see that files with long names can be written there, and return the folders that were not there.

    Raises:
        ExperimentError: It cannot be made or written to.
    """
    made: list[Path] = []
    try:
        made += make(path)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".vflair-") as file:
            file.write(bytes(4096))
            file.flush()
        with contextlib.suppress(FileNotFoundError):  # a name that is too long is another error
            (path / LONGEST).stat()
    except OSError as error:
        remove_empty(made)
        reason = "it is a file" if os.path.isfile(path) else error.strerror  # noqa: PTH113 - a path may be too long
        raise ExperimentError(
            f"Nothing can be written to {path}: {reason}. Give another folder (--out, out=). Nothing was run."
        ) from error
    return made


def make(path: Path) -> list[Path]:
    """Make a folder, and those it lies in, for nobody else; return those that were not there, the outermost first."""
    made: list[Path] = []
    for folder in reversed((path, *path.parents)):
        if not folder.exists():
            folder.mkdir(mode=0o700)
            folder.chmod(0o700)  # whatever the umask says
            made.append(folder)
    if not made and not any(path.iterdir()):
        with contextlib.suppress(PermissionError):  # somebody else's, and open to this process
            path.chmod(0o700)
    return made


def remove_empty(made: list[Path]) -> None:
    """Remove folders that were made, if nothing lies in them."""
    for folder in reversed(made):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def check_free(path: Path, runs: Sequence[str] = (), *, overwrite: bool) -> None:
    """See that a folder holds no run, or may lose it, and nothing else that a run, or `runs` within, would replace.

    Raises:
        ExperimentError: It does.
    """
    places = dict.fromkeys([path, *_runs_within(path), *(path / name for name in runs)])
    foreign = [each for place in places for each in _foreign(place)]
    if foreign:
        raise ExperimentError(
            f"{foreign[0]} is not of a run, and a run would replace it. Give another folder (--out, out=), or move it away."
        )
    files = files_of_run(path)
    if files and not overwrite:
        finished, arms = read_finished(path)
        state = "a run" if finished or not (path / RESULT).exists() else "an unfinished run"
        done = f" ({', '.join(arms)} done)" if arms else ""
        raise ExperimentError(
            f"{path} holds {state}{done}: {files[0].relative_to(path)} is there. Give another folder (--out, out=), or "
            "--overwrite (overwrite=True), which removes that run."
        )


def _foreign(path: Path) -> Iterator[Path]:
    """What a run would write over or through, and did not write."""
    if (path.is_symlink() and RUNS.fullmatch(path.name)) or path.is_file():
        yield path
        return
    ours = _is_result(path / RESULT)
    if (path / RESULT).exists() and not ours:
        yield path / RESULT
    if (path / EXPERIMENT).exists() and not ours:
        yield path / EXPERIMENT
    for name in (*ARMS, *EVIDENCE):
        folder = path / name
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            yield folder


def _is_result(path: Path) -> bool:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(table, dict) and {"numbers", "config_hash"} <= table.keys()


# -- what is a run's ------------------------------------------------------------------------------------------


def files_of_run(path: Path) -> list[Path]:
    """Return the files there that a run has written, those of runs within included; none if there is no such folder."""
    files = _named(path, OF_RUN)
    for name in ARMS:
        files += _named(path / name, OF_ARM) + _tokenizer(path / name)
    for name in EVIDENCE:
        files += _named(path / name, OF_EVIDENCE) + _tokenizer(path / name)
    for folder in _runs_within(path):
        files += files_of_run(folder)
    return files


def remove_run(path: Path) -> None:
    """Remove what runs have written there, and their folders where nothing else lies in them."""
    folders = {path, *_runs_within(path)}
    folders |= {folder / name for folder in folders for name in (*ARMS, *EVIDENCE)}
    for file in files_of_run(path):
        folders.add(file.parent)
        file.unlink()
    for folder in sorted(folders - {path}, key=lambda folder: -len(folder.parts)):
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()


def _named(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Files of these names, and of what was to become one."""
    if folder.is_symlink() and folder.name in (*ARMS, *EVIDENCE):
        return []
    parts = [f"{Path(name).stem}{PART}" for name in names] + [f"{name}{PART}" for name in names]
    each = [folder / name for name in dict.fromkeys((*names, *parts))]
    return [file for file in each if file.is_file() or file.is_symlink()]


def _tokenizer(folder: Path) -> list[Path]:
    """The files of the tokenizer that was saved into a folder, in one of its own."""
    own = [folder / TOKENIZER, folder / f"{TOKENIZER}{PART}"]
    return [file for each in own if each.is_dir() for file in each.iterdir() if file.is_file()]


def _runs_within(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    within = (each for each in path.iterdir() if RUNS.fullmatch(each.name))
    return [each for each in within if each.is_dir() and not each.is_symlink()]


# -- writing --------------------------------------------------------------------------------------------------


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Yield where to write a file that then takes its place, whole, for nobody else to read.

    Raises:
        ExperimentError: It cannot be written, as on a full disk; what was there is there still.
    """
    part = path.with_name(f"{path.name}{PART}")
    try:
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        yield part
        part.chmod(0o600)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise _unwritable(path, error) from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def closed(folder: Path) -> Iterator[Path]:
    """Make a folder of a run, let it be filled, and close all that is in it to others.

    Raises:
        ExperimentError: It cannot be written, as on a full disk.
    """
    try:
        make(folder)
        folder.chmod(0o700)
        yield folder
        for place, _, files in os.walk(folder):
            Path(place).chmod(0o700)
            for file in files:
                Path(place, file).chmod(0o600)
    except (OSError, SafetensorError) as error:
        raise _unwritable(folder, error) from error


def _unwritable(path: Path, error: Exception) -> ExperimentError:
    reason = str(error)
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror + (f": {error.filename}" if error.filename else "")
    return ExperimentError(f"{path} cannot be written: {reason}.")
