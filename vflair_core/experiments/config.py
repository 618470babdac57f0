"""Experiments as TOML files, read with errors that say where, what, and what was perhaps meant."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import attrs
import cattrs
from cattrs import Converter
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError, IterableValidationError

from vflair_core.errors import ExperimentError, VflairError, alternatives
from vflair_core.experiments.experiment import Experiment

Kind = TypeVar("Kind")


def read_experiment(path: str | Path, overrides: Iterable[str] = ()) -> Experiment:
    """Read an experiment from a TOML file; `overrides` are ``"train.steps=10"``, values in TOML.

    Raises:
        ExperimentError: The file does not exist, is not TOML, or does not describe an experiment; every
            mistake is listed with its key.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # with a byte order mark or not
    except FileNotFoundError as error:
        raise ExperimentError(f"There is no experiment file {path}.") from error
    except OSError as error:
        raise ExperimentError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ExperimentError(f"{path} is not text in UTF-8: {error}. Save it as UTF-8.") from error
    except tomllib.TOMLDecodeError as error:
        raise ExperimentError(f"{path} is not TOML: {error}.") from error
    for each in overrides:
        override(table, each)
    return experiment_from(table)


def experiment_from(table: Mapping[str, Any]) -> Experiment:
    """Build an experiment from nested tables.

    Raises:
        ExperimentError: As for `read_experiment`.
    """
    return structured(table, Experiment, "The experiment")


def structured(table: Mapping[str, Any], kind: type[Kind], what: str) -> Kind:
    """Build a record of this kind from nested tables; `what` names it in errors.

    Raises:
        ExperimentError: A key does not exist or is needed, or a value does not fit; every mistake is listed with its key.
    """
    if not isinstance(table, Mapping):
        raise ExperimentError(f"{what} is {table!r}: give a table of keys.")
    try:
        return _converter().structure(table, kind)
    except (ClassValidationError, IterableValidationError) as error:
        mistakes = "\n".join(f"  {line}" for line in _explain(error, ""))
        raise ExperimentError(f"{what} does not fit:\n{mistakes}") from error


def to_toml(experiment: Experiment) -> str:
    """Write an experiment so that `read_experiment` reads it back."""
    return "\n".join(_toml_lines(experiment.to_dict(), "")) + "\n"


@cache
def _converter() -> Converter:
    """What structures tables: one for all, since it compiles a function for each kind of record."""
    converter = Converter(forbid_extra_keys=True, detailed_validation=True)
    for kind in (int, float, str, bool):
        converter.register_structure_hook(kind, _exactly)
    converter.register_structure_hook_func(_is_choice, _one_of)
    converter.register_structure_hook_func(
        lambda t: t == Mapping[str, Any], lambda value, _: _table(value)
    )
    converter.register_structure_hook_func(
        lambda t: t == str | tuple[str, ...],
        lambda value, _: (
            value if isinstance(value, str) else tuple(_exactly(item, str) for item in value)
        ),
    )
    return converter


def _exactly(value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {value!r}")
    return value


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"expected a table of keys, got {value!r}")
    return dict(value)


def _is_choice(kind: Any) -> bool:
    origin: Any = get_origin(kind)
    return origin is Literal


def _one_of(value: Any, kind: Any) -> Any:
    possible = get_args(kind)
    if value not in possible or type(value) is not type(possible[possible.index(value)]):
        raise ValueError(f"there is no {value!r}.{alternatives(str(value), possible)}")
    return value


def override(table: Any, text: str) -> None:
    """Set one key of nested tables by ``"train.steps=10"``; the value is TOML, a bare word is text.

    Raises:
        ExperimentError: It is no such line, or there is no such table.
    """
    key, equals, text = text.partition("=")
    if not equals:
        raise ExperimentError(f"{key!r} is not key=value; write e.g. -o train.steps=10.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a text
    try:
        *path, last = [_step(part) for part in key.strip().split(".")]
        for part in path:
            table = table[part] if isinstance(table, list) else table.setdefault(part, {})
        table[last] = value
    except (TypeError, IndexError, AttributeError, KeyError) as error:
        raise ExperimentError(f"{key!r} cannot be set: there is no such table or entry.") from error


def _step(part: str) -> Any:
    """Part of a dotted key: a number for an entry of a list."""
    return int(part) if part.isdecimal() else part


def _explain(error: BaseException, where: str) -> list[str]:
    if isinstance(error, (ClassValidationError, IterableValidationError)):
        lines = []
        for inner in error.exceptions:
            notes = getattr(inner, "__notes__", [])
            lines += _explain(inner, where + "".join(_place(note) for note in notes))
        return lines
    key = where.lstrip(".") or "the file"
    match error:
        case ForbiddenExtraKeysError():
            known = [attribute.name for attribute in attrs.fields(error.cl)]
            return [
                f"{f'{where}.{name}'.lstrip('.')}: there is no such key.{alternatives(name, known)}"
                for name in sorted(error.extra_fields)
            ]
        case KeyError():
            return [f"{key}: this key is needed."]
        case TypeError() if "is not iterable" in str(error):
            return [f"{key}: expected a list."]
        case VflairError() | ValueError() | TypeError():
            return [f"{key}: {error}"]
        case AttributeError():
            return [f"{key}: expected a table of keys."]
        case _:
            return [f"{key}: {type(error).__name__}: {error}"]


def _place(note: Any) -> str:
    if isinstance(note, cattrs.AttributeValidationNote):
        return f".{note.name}"
    return f".{note.index}" if isinstance(note, cattrs.IterableValidationNote) else ""


def _toml_lines(table: Mapping[str, Any], prefix: str) -> list[str]:
    given = {k: v for k, v in table.items() if v is not None}
    plain = {k: v for k, v in given.items() if not isinstance(v, Mapping) and not _is_tables(v)}
    lines = [f"{key} = {_toml(value)}" for key, value in plain.items()]
    for key, value in given.items():
        if _is_tables(value):
            for item in value:
                lines += ["", f"[[{prefix}{key}]]", *_toml_lines(item, f"{prefix}{key}.")]
        elif isinstance(value, Mapping):
            lines += ["", f"[{prefix}{key}]", *_toml_lines(value, f"{prefix}{key}.")]
    return lines


def _is_tables(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping)


def _toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            import json

            return json.dumps(value, ensure_ascii=False)
        case list() | tuple():
            return f"[{', '.join(_toml(item) for item in value)}]"
        case _:
            return repr(value)
