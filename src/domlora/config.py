"""TOML to validated options; an unknown key is refused with the nearest valid one.

The options are the dataclasses of the rooms that use them, so each is defined, documented and checked in one place.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from domlora.data.plan import Plan
from domlora.data.sources import presets
from domlora.errors import ConfigError, DomloraError, nearest
from domlora.training.stages import Recipe

__all__ = ["Config", "load_config", "load_plan", "merged", "parse", "read_toml", "with_settings"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Config:
    """One model and how it is trained.

    Args:
        model: ``name`` and options of ``build_model``.
        train: adapters, and one stage for each way of training.
    """

    model: dict[str, Any] = field(default_factory=lambda: {"name": "mlp"})
    train: Recipe = field(default_factory=Recipe)


def load_config(path: Path | None, settings: Sequence[str] = ()) -> Config:
    """Read a TOML file (none for all defaults) and apply ``key.sub=value`` settings on top.

    Raises:
        ConfigError: unreadable file, unknown key, or a value of the wrong type or range.
    """
    table = merged({"model": Config().model}, {} if path is None else read_toml(path))
    return parse(Config, with_settings(table, settings))


def load_plan(source: str, settings: Sequence[str] = ()) -> Plan:
    """The plan of a published data set by its name, or of one's own log by the path of a TOML file.

    Raises:
        ConfigError: no such name or file, unknown key, or a value of the wrong type or range.
    """
    known = presets()
    path = known.get(source) or Path(source)
    if source not in known and path.suffix != ".toml":
        raise ConfigError(
            "a source is the name of a data set or a TOML file of one's own",
            received=source,
            next_step=nearest(source, known),
        )
    return parse(Plan, with_settings(read_toml(path), settings))


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as nested tables.

    Raises:
        ConfigError: the file is missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"a configuration must be a TOML file ({error})", received=str(path)) from error


def with_settings(table: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """``table`` with each ``key.sub=value`` put in; values are TOML, and what is not TOML is text.

    >>> with_settings({"model": {"name": "mlp"}}, ["model.dropout=0.1", "model.name=dcn"])
    {'model': {'name': 'dcn', 'dropout': 0.1}}
    """
    result = dict(table)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError("a setting must look like key.sub=value", received=setting)
        nested: Any = _value(text)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        result = merged(result, nested)
    return result


def merged(table: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """``table`` with the entries of ``other`` on top, sub-table by sub-table."""
    result = dict(table)
    for key, value in other.items():
        both_tables = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both_tables else value
    return result


def parse(kind: type[T], table: Mapping[str, Any]) -> T:
    """``table`` as the dataclass ``kind``, every key known and every value of its type.

    Raises:
        ConfigError: the key is named with its path and the nearest valid one.
    """
    _check_keys(kind, table, "")
    try:  # strict, so that true is no number and "32" neither; as JSON, where a list may become a tuple
        return TypeAdapter(kind).validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or kind.__name__.lower()
        own = first.get("ctx", {}).get("error")
        if isinstance(own, DomloraError):  # a dataclass that checked its own values
            raise ConfigError(f"{where}: {str(own).removesuffix('.')}") from error
        raise ConfigError(f"{where}: {first['msg']}", received=first["input"]) from error


def _check_keys(kind: Any, table: Mapping[str, Any], path: str) -> None:
    hints = get_type_hints(kind)
    known = [entry.name for entry in fields(kind)]
    for key, value in table.items():
        if key not in known:
            where = f" in [{path}]" if path else ""
            raise ConfigError(f"unknown key{where}", received=key, next_step=nearest(key, known))
        inner, where = _dataclass_in(hints[key]), f"{path}.{key}" if path else key
        named = get_origin(hints[key]) is dict and isinstance(value, Mapping)
        items = value.items() if named else [("", item) for item in (value if isinstance(value, list) else [value])]
        for name, item in items:
            if inner is not None and isinstance(item, Mapping):
                _check_keys(inner, item, f"{where}.{name}" if named else where)


def _dataclass_in(hint: Any) -> Any:
    """The dataclass in ``X``, ``X | None``, ``tuple[X, ...]`` or ``dict[str, X]``, if there is one."""
    if is_dataclass(hint):
        return hint
    if get_origin(hint) in (Union, UnionType, tuple, list, dict):
        return next((a for a in get_args(hint) if is_dataclass(a)), None)
    return None


def _value(text: str) -> Any:
    try:
        read = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return read["value"] if len(read) == 1 else text
