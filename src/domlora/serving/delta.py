"""What differs between two exported folders: rows of tables, and whole files. Sent in place of the new folder.

delta.json           of which folder and to which, by the sha256 of their manifests; of each tensor in ``tables.bin`` where
                     it begins, and which of its rows are which of the old file; and which files are those of the old folder
rows.safetensors     of each such tensor the rows that the old file does not have: ``N/at`` and ``N/rows``
files/               whole files that the old folder does not have
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from domlora.errors import BundleError
from domlora.files import new_folder, sha256_of
from domlora.serving.folder import MANIFEST, MIXED, PLAIN, TABLES, read_manifest
from domlora.serving.writing import link_all, link_one

__all__ = ["DELTA", "Written", "apply", "difference", "made_from", "write"]

DELTA = "delta.json"
_FORMAT = "domlora delta 1"
_ROWS, _FILES = "rows.safetensors", "files"
_SHIFTS = 64  # a table with more insertions in its middle than this is sent with more rows than need be
_CHUNK = 1 << 26  # bytes
_NONE = np.iinfo(np.int64).min


class _Tensor(NamedTuple):
    """A tensor in ``tables.bin``: where it is, and how many bytes a row of it has."""

    name: str
    offset: int
    size: int
    row: int


@dataclass(frozen=True, slots=True)
class Written:
    """What a delta was.

    Args:
        size_bytes: of it.
        of_bytes: of the new folder.
        rows, of_rows: of tables, sent and there are.
        files: sent whole.
    """

    size_bytes: int
    of_bytes: int
    rows: int
    of_rows: int
    files: tuple[str, ...]


def write(old: Path, new: Path, out: Path, *, overwrite: bool = False) -> Written:
    """Write what turns one exported folder into another. Needs ``onnx``, whose graphs say where rows begin.

    Args:
        old: a folder that the server has.
        new: the one that it is to have.
        out: where the delta will be.
        overwrite: replace a delta that is there.

    Raises:
        BundleError: one of the folders is damaged.
        DataError: ``out`` exists.
    """
    earlier, later = read_manifest(old), read_manifest(new)
    source, target = _mapped(old / TABLES), _mapped(new / TABLES)
    kept = {name for name, digest in later["files"].items() if earlier["files"].get(name) == digest}
    sent = sorted(later["files"].keys() - kept - {TABLES})
    known = {tensor.name: tensor for tensor in _tensors(old)}
    with new_folder(out, overwrite=overwrite, marker=DELTA) as fresh:
        rows: dict[str, NDArray[Any]] = {}
        tensors = []
        for number, tensor in enumerate([] if TABLES in kept else _tensors(new)):
            before = known.get(tensor.name, tensor)
            pieces, at, changed = difference(_rows_of(source, before), _rows_of(target, tensor))
            rows |= {f"{number}/at": at, f"{number}/rows": changed}
            places = [(before.offset + start * before.row, to, size) for start, to, size in pieces]
            tensors.append({**tensor._asdict(), "pieces": places})
        save_file(rows, fresh / _ROWS)
        for name in [*sent, MANIFEST]:
            (fresh / _FILES / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(new / name, fresh / _FILES / name)
        facts = {
            "from": sha256_of(old / MANIFEST),
            "to": sha256_of(new / MANIFEST),
            "kept": sorted(kept),
            "size": len(target),
            "tensors": tensors,
        }
        _seal(fresh, facts)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    whole = sum((new / name).stat().st_size for name in [*later["files"], MANIFEST])
    count = sum(len(each) for name, each in rows.items() if name.endswith("/at"))
    return Written(size, whole, count, sum(t["size"] // t["row"] for t in tensors), tuple(sent))


def apply(old: Path, delta: Path, out: Path) -> None:
    """Make the new folder from the old one and a delta; it is there when every file of it is what it was on the trainer.

    Raises:
        BundleError: the delta is damaged or of another folder, or what it gives is not what it says.
        DataError: ``out`` exists, or the disk is full.
    """
    facts = _read_facts(delta)
    if sha256_of(old / MANIFEST) != facts["from"]:
        raise BundleError(
            "a delta must be applied to the folder that it was made from, and this is another", received=old.name
        )
    with new_folder(out, marker=MANIFEST) as fresh:
        link_all(delta / _FILES, fresh)
        for name in facts["kept"]:
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            link_one(old / name, fresh / name)
        if TABLES not in facts["kept"]:
            _build(_mapped(old / TABLES), facts, delta, fresh / TABLES)
        if not (fresh / MANIFEST).is_file() or sha256_of(fresh / MANIFEST) != facts["to"]:
            raise BundleError("a delta must give the folder that it names, and gives another", received=delta.name)
        read_manifest(fresh)


def made_from(delta: Path) -> str:
    """The sha256 of the manifest of the folder that a delta is for.

    Raises:
        BundleError: no delta, or a damaged one.
    """
    return str(_read_facts(delta)["from"])


def _tensors(folder: Path) -> list[_Tensor]:
    """The tensors in ``tables.bin``, each place once."""
    import onnx  # here, so that a server that applies deltas needs none

    found: dict[int, _Tensor] = {}
    for each in onnx.load(folder / MIXED, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in each.external_data}
        if place:
            offset, size = int(place["offset"]), int(place["length"])
            found.setdefault(offset, _Tensor(each.name, offset, size, size // each.dims[0]))
    return [found[offset] for offset in sorted(found)]


def difference(
    before: NDArray[np.uint8], rows: NDArray[np.uint8]
) -> tuple[list[tuple[int, int, int]], NDArray[Any], NDArray[np.uint8]]:
    """Pieces (old row, new row, rows) of the old tensor, and the numbers and bytes of the rows that they do not give."""
    if before.shape[1] != rows.shape[1]:
        before = np.empty((0, rows.shape[1]), np.uint8)
    shift = _shifts(before, rows)
    pieces = _pieces(shift, len(before))
    given = np.zeros(len(rows), bool)
    for start, to, size in pieces:
        given[to : to + size] = shift[to : to + size] == start - to
    at = np.flatnonzero(~given).astype(np.int32 if len(rows) < 2**31 else np.int64)
    return pieces, at, rows[at]


def _shifts(before: NDArray[np.uint8], rows: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How far from each row its equal lies in the old tensor, or ``_NONE``. Rows keep their order, so shifts are few."""
    shift = np.full(len(rows), _NONE)
    _mark_equal(shift, before, rows, np.arange(len(rows)), 0)
    rest = np.flatnonzero(shift == _NONE)
    if not len(rest) or not len(before):
        return shift
    there, wanted = _hashes(before), _hashes(rows[rest])
    order = np.argsort(there, kind="stable")
    place = order[np.minimum(np.searchsorted(there[order], wanted), len(order) - 1)]
    found = there[place] == wanted
    values, counts = np.unique(place[found] - rest[found], return_counts=True)
    for value in values[np.argsort(-counts)][:_SHIFTS]:
        _mark_equal(shift, before, rows, rest[shift[rest] == _NONE], int(value))
    return shift


def _mark_equal(
    shift: NDArray[np.int64], before: NDArray[np.uint8], rows: NDArray[np.uint8], which: NDArray[Any], value: int
) -> None:
    """Note this shift for those of the rows that equal the old ones so far away."""
    which = which[(which + value >= 0) & (which + value < len(before))]
    step = max(_CHUNK // max(rows.shape[1], 1), 1)
    for start in range(0, len(which), step):
        part = which[start : start + step]
        shift[part[(rows[part] == before[part + value]).all(1)]] = value


def _pieces(shift: NDArray[np.int64], length: int) -> list[tuple[int, int, int]]:
    """Runs of rows of one shift; rows without one lie inside of runs where they can, so that runs are few."""
    known = shift != _NONE
    if not known.any():
        return []
    last = np.maximum.accumulate(np.where(known, np.arange(len(shift)), -1))
    filled = shift[np.where(last < 0, np.argmax(known), last)]
    starts = np.flatnonzero(np.r_[True, filled[1:] != filled[:-1]])
    pieces = []
    for start, end in zip(starts, [*starts[1:], len(shift)], strict=True):
        by = int(filled[start])
        low, high = max(int(start), -by), min(int(end), length - by)
        if high > low:
            pieces.append((low + by, low, high - low))
    return pieces


def _hashes(rows: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """A number for each row that unequal rows hardly share; whether rows are equal is looked at anyway."""
    weights = np.random.default_rng(0).integers(1, 2**63, rows.shape[1], dtype=np.uint64) | np.uint64(1)
    step = max(_CHUNK // (8 * max(rows.shape[1], 1)), 1)
    parts = [(rows[start : start + step] * weights).sum(1) for start in range(0, len(rows), step)]
    return np.concatenate(parts)


def _build(source: NDArray[np.uint8], facts: Mapping[str, Any], delta: Path, place: Path) -> None:
    """Write the new ``tables.bin``, some rows at a time: a full disk is an error then, where a mapped file would kill."""
    try:
        rows = load_file(delta / _ROWS)
        with place.open("wb") as out:
            for number, told in enumerate(facts["tensors"]):
                tensor = _Tensor(*(told[name] for name in _Tensor._fields))
                out.seek(tensor.offset)
                for part in _rebuilt(source, told["pieces"], tensor, rows[f"{number}/at"], rows[f"{number}/rows"]):
                    out.write(part.data)
            out.truncate(facts["size"])
    except (SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
        raise BundleError(f"a delta must be whole ({type(error).__name__})", received=delta.name) from error


def _rebuilt(
    source: NDArray[np.uint8], pieces: Sequence[Sequence[int]], tensor: _Tensor, at: NDArray[Any], rows: NDArray[Any]
) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a tensor, some rows at a time."""
    count, step = tensor.size // tensor.row, max(_CHUNK // tensor.row, 1)
    for low in range(0, count, step):
        high = min(low + step, count)
        part = np.zeros((high - low, tensor.row), np.uint8)
        for offset, to, size in pieces:
            first, last = max(low, to), min(high, to + size)
            if first < last:
                begin, end = offset + (first - to) * tensor.row, offset + (last - to) * tensor.row
                part[first - low : last - low] = source[begin:end].reshape(-1, tensor.row)
        start, stop = np.searchsorted(at, (low, high))
        part[at[start:stop] - low] = rows[start:stop]
        yield part


def _rows_of(file: NDArray[np.uint8], tensor: _Tensor) -> NDArray[np.uint8]:
    return file[tensor.offset : tensor.offset + tensor.size].reshape(-1, tensor.row)


def _mapped(file: Path) -> NDArray[np.uint8]:
    """A file's bytes; one of none cannot be mapped."""
    return np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8)


def _seal(folder: Path, facts: Mapping[str, Any]) -> None:
    whole = {**facts, "format": _FORMAT, "rows": sha256_of(folder / _ROWS)}
    text = json.dumps({**whole, "sha256": _digest(whole)}, indent=1, sort_keys=True)
    (folder / DELTA).write_text(text, encoding="utf-8")


def _read_facts(delta: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((delta / DELTA).read_bytes())
        if facts.pop("sha256") != _digest(facts) or facts["format"] != _FORMAT:
            raise ValueError(f"another sha256 than it says, or a format that is not {_FORMAT!r}")
        if not all(PLAIN.fullmatch(name) for name in facts["kept"]):
            raise ValueError("it names files that no export has")
        if (delta / _ROWS).is_symlink() or sha256_of(delta / _ROWS) != facts["rows"]:
            raise ValueError(f"{_ROWS} is damaged: its sha256 is another")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(
            f"a delta must be whole ({error})", received=delta.name, next_step="Write it with: domlora store delta"
        ) from error
    return facts


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, allow_nan=False).encode()).hexdigest()
