"""A user's own log: find its files, see what they are, and open them as one table."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from domlora.data.engine import Engine
from domlora.data.plan import Format, Source
from domlora.data.raw import RawTable
from domlora.data.reading.delimited import delimited_to_parquet, header_of
from domlora.data.reading.dialect import Dialect
from domlora.data.reading.json_lines import holds_key, json_columns, json_lines_to_parquet
from domlora.data.reading.text_files import Converted, common_columns, refuse_repeated
from domlora.errors import ConfigError, DataError, SchemaError, nearest
from domlora.files import sha256_of

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = [
    "Converted",
    "check_parquet",
    "delimited_to_parquet",
    "find_files",
    "format_of",
    "json_lines_to_parquet",
    "one_format",
    "open_log",
    "separator_of",
]

_FORMATS: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}


def open_log(
    engine: Engine, source: Source, folder: Path, columns: Sequence[str], progress: Progress | None = None
) -> RawTable:
    """The rows of one's own files. Text files are read once and become Parquet in the engine's work folder.

    Args:
        engine: where the table will be.
        source: which files, see :class:`domlora.data.plan.Source`.
        folder: what relative paths start from.
        columns: those that will be used; no others are in the table, but for the key.
        progress: shows a bar.

    Raises:
        ConfigError: the source does not say of what format the files are.
        DataError: files that are not there or cannot be used.
        SchemaError: a column that the files do not have.
    """
    paths = find_files(source.files, folder)
    wanted = list(dict.fromkeys([*columns, *source.key]))
    kind = one_format(paths, source.format)
    converted = Converted(paths, None, 0)
    if kind == "parquet":
        check_parquet(paths, wanted)
    elif kind == "csv":
        dialect = Dialect(source.separator or separator_of(paths[0]), encoding=source.encoding)
        _refuse_unknown(wanted, source.names or header_of(paths[0], dialect), paths[0])
        converted = delimited_to_parquet(
            paths,
            engine.work,
            names=source.names or None,
            separator=dialect.separator,
            encoding=source.encoding,
            columns=wanted,
            progress=progress,
        )
    else:
        _refuse_unknown_keys(wanted, paths)
        converted = json_lines_to_parquet(paths, engine.work, columns=wanted, progress=progress)
    return RawTable(
        name=", ".join(source.files),
        table=engine.read(converted.paths).select(*wanted),
        key=source.key,
        folder=folder,
        inputs={_label(path, folder): sha256_of(path) for path in paths},
        rejected=converted.rejected,
        rejected_rows=converted.rejected_rows,
    )


def find_files(patterns: Sequence[str], folder: Path) -> list[Path]:
    """Files by paths or globs (``*``, ``?``, ``[]``, ``**`` for folders at any depth), sorted, each once.

    Args:
        patterns: relative to ``folder``, or absolute; ``~`` is the home folder.
        folder: what relative ones start from.

    Raises:
        DataError: nothing found, or a folder.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        name = os.path.expanduser(pattern)
        whole = folder / name
        matches = [name] if os.path.lexists(whole) else glob.glob(name, root_dir=folder, recursive=True)
        paths = [folder / match for match in matches]
        if "**" in pattern or whole.name == "*":  # these match folders too, and mean what is in them
            paths = [path for path in paths if path.is_file()]
        if not paths:
            raise DataError("source.files must name files", received=pattern, next_step=_beside(whole))
        for path in paths:
            if path.is_dir():
                raise DataError(f"{path} is a folder", next_step=f"Name its files: {path}/*")
            found.setdefault(os.path.realpath(path), path)
    return sorted(found.values())


def format_of(path: Path, given: Format | None = None) -> Format:
    """What a file is: as given, or as its name says.

    >>> format_of(Path("log.tsv.gz")), format_of(Path("log.dat"), "csv")
    ('csv', 'csv')

    Raises:
        ConfigError: its name does not say.
    """
    if given is not None:
        return given
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    found = _FORMATS.get(suffixes[-1]) if suffixes else None
    if found is None and ".parquet" in suffixes[-2:]:  # such as .parquet.brotli
        found = "parquet"
    if found is None:
        raise ConfigError(
            f"the name of a file must end in one of {', '.join(_FORMATS)}, each also with .gz",
            received=str(path),
            next_step=f"Rename it, or set source.format to one of {', '.join(map(repr, get_args(Format)))}",
        )
    return found


def one_format(paths: Sequence[Path], given: Format | None = None) -> Format:
    """What all of some files are.

    Raises:
        DataError: they are of several formats.
    """
    formats = {format_of(path, given): path for path in paths}
    if len(formats) > 1:
        raise DataError(
            "the files of one log must be of one format",
            received={kind: str(path) for kind, path in formats.items()},
            next_step="Name only those of one format in source.files",
        )
    return next(iter(formats))


def separator_of(path: Path) -> str:
    """What separates fields by default: a tab in ``.tsv``, else a comma."""
    return "\t" if ".tsv" in [suffix.lower() for suffix in path.suffixes[-2:]] else ","


def check_parquet(paths: Sequence[Path], columns: Sequence[str] = ()) -> None:
    """Refuse Parquet files that do not make one table.

    Args:
        paths: the files.
        columns: those that will be used; nothing but values and lists of values may be in them.

    Raises:
        DataError: a file that is no Parquet or cut short, repeated names, no row, columns that differ between files, or a
            column that holds objects or bytes.
        SchemaError: a column that the files do not have.
    """
    rows, first = 0, _parquet_columns(paths[0])
    _refuse_unknown(columns, list(first), paths[0])
    for path in paths:
        found = _parquet_columns(path)
        common_columns(path, list(found), paths[0], list(first))
        for name, kind in found.items():
            if kind != first[name]:
                raise DataError(
                    f"column {name!r} of {path} must have the type it has in {paths[0]}, {first[name]}",
                    received=kind,
                    next_step="Cast it, or give the logs their own runs",
                )
        file = pq.ParquetFile(path)
        rows += file.metadata.num_rows
        for name in columns:
            _refuse_nested(path, file.schema_arrow.field(name))
    if not rows:
        raise DataError(f"{paths[0]} must have rows, and has none", next_step="Get the file again")


def _parquet_columns(path: Path) -> dict[str, str]:
    """Name → type as the file stores it, whatever wrote it."""
    try:
        if path.is_dir():
            raise DataError(f"{path} is a folder", next_step=f"Name its files: {path}/*.parquet")
        file = pq.ParquetFile(path)
    except OSError as error:
        said = error.strerror or error
        raise DataError(f"{path} cannot be read ({said})", next_step="Check the path and its permissions") from error
    except pa.ArrowException as error:
        what = "is empty" if not path.stat().st_size else "must be a whole Parquet file"
        raise DataError(f"{path} {what} ({str(error).splitlines()[0]})", next_step="Get it again") from error
    refuse_repeated(path, file.schema_arrow.names)
    leaves: dict[str, list[str]] = {}
    for place in range(len(file.schema)):
        leaf = file.schema.column(place)
        logical = "" if leaf.logical_type.type == "NONE" else f" ({leaf.logical_type})"
        inner = "" if leaf.max_repetition_level == 0 else " in lists"
        # a leaf of the list 'a' is a.list.element, and names may hold dots
        name = max((name for name in file.schema_arrow.names if f"{leaf.path}.".startswith(f"{name}.")), key=len)
        leaves.setdefault(name, []).append(f"{leaf.physical_type}{logical}{inner}")
    return {name: ", ".join(kinds) for name, kinds in leaves.items()}


def _refuse_nested(path: Path, field: pa.Field) -> None:
    kind = field.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    if pa.types.is_nested(kind):
        what, next_step = "values or lists of values", "Make its parts columns of their own first"
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        what, next_step = "text instead of bytes", "Cast it to text"
    else:
        return
    raise DataError(f"column {field.name!r} of {path} must hold {what}", received=str(field.type), next_step=next_step)


def _refuse_unknown(wanted: Sequence[str], known: Sequence[str], path: Path) -> None:
    for name in wanted:
        if name not in known:
            raise SchemaError(f"{path} has no such column", received=name, next_step=nearest(name, filter(None, known)))


def _refuse_unknown_keys(wanted: Sequence[str], paths: Sequence[Path]) -> None:
    """A key that the first lines do not have may come later, so the whole files are searched before it is refused."""
    known: dict[str, Any] = dict(json_columns(paths))
    for name in wanted:
        if name not in known and not any(key.startswith(f"{name}.") for key in known) and not holds_key(paths, name):
            _refuse_unknown([name], list(known), paths[0])


def _beside(path: Path) -> str:
    """What is there instead of a file that is not."""
    if not path.parent.is_dir():
        return f"There is no folder {path.parent}. In a TOML file, paths are relative to its own folder"
    names = [each.name for each in path.parent.iterdir() if each.is_file() and not each.name.startswith(".")]
    return f"In {path.parent}: {nearest(path.name, names)}"


def _label(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
