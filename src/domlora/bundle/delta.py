"""What differs between two bases: rows of tables, and whole tensors.

delta.safetensors   NAME/ids and NAME/rows of a table, NAME of any other tensor that changed
delta.json          the fingerprints of the base it is for and of the one it gives; of each table its new length, and
                    which rows of the old one are which of the new
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from domlora.errors import BundleError

__all__ = ["DELTA", "Delta", "applied", "delta_of", "read_delta", "write_delta"]

DELTA = "delta.safetensors"
_FACTS = "delta.json"
Pieces = Sequence[tuple[int, int, int]]  # rows old:old+length of the old table are rows new:new+length of the new


@dataclass(frozen=True, slots=True)
class Delta:
    """Tensors by the names above, and of each table its new length and its pieces."""

    tensors: Mapping[str, Tensor]
    tables: Mapping[str, tuple[int, Pieces]]

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def delta_of(old: Mapping[str, Tensor], new: Mapping[str, Tensor], pieces: Mapping[str, Pieces]) -> Delta | None:
    """What turns one base into another, or None for bases whose tensors have other names.

    Bits count, so that -0.0 is not 0.0, and NaN is NaN.

    Args:
        old, new: states as :func:`domlora.adapters.bank.base_state` gives them.
        pieces: of each table. They make a delta small; it is right whatever they say.

    Example:
        >>> old, new = {"table": torch.zeros(3, 2)}, {"table": torch.zeros(4, 2)}
        >>> new["table"][3] = 1.0
        >>> delta = delta_of(old, new, {"table": [(0, 0, 3)]})
        >>> delta.tensors["table/ids"].tolist()
        [3]
        >>> bool((applied(old, delta)["table"] == new["table"]).all())
        True
    """
    if old.keys() != new.keys():
        return None
    tensors: dict[str, Tensor] = {}
    tables: dict[str, tuple[int, Pieces]] = {}
    for name, tensor in new.items():
        tensor = tensor.detach().cpu().contiguous()
        if name in pieces and old[name].dtype == tensor.dtype and old[name].shape[1:] == tensor.shape[1:]:
            kept = _fitting(pieces[name], len(old[name]), len(tensor))
            ids = _other_rows(_moved(old[name], len(tensor), kept), tensor)
            if len(ids) or len(tensor) != len(old[name]) or not _in_place(kept, len(tensor)):
                tensors |= {f"{name}/ids": ids, f"{name}/rows": tensor[ids]}
                tables[name] = len(tensor), kept
        elif old[name].dtype != tensor.dtype or old[name].shape != tensor.shape or _differ(old[name], tensor):
            tensors[name] = tensor.clone()
    return Delta(tensors, tables)


def applied(old: Mapping[str, Tensor], delta: Delta) -> dict[str, Tensor]:
    """The new base; tensors that did not change are those of the old one.

    Raises:
        BundleError: a delta of a base with other tables.
    """
    new, rest = dict(old), dict(delta.tensors)
    try:
        for name, (length, pieces) in delta.tables.items():
            ids, rows = rest.pop(f"{name}/ids"), rest.pop(f"{name}/rows")
            new[name] = _moved(old[name], length, pieces).index_copy_(0, ids.long(), rows)
        if not rest.keys() <= new.keys():
            raise KeyError(*sorted(rest.keys() - new.keys())[:3])
    except (KeyError, RuntimeError, IndexError) as error:
        raise BundleError(f"a delta must fit the base before it ({error})") from error
    return new | rest


def write_delta(delta: Delta, folder: Path, *, old: str, new: str) -> None:
    """Write it, with the fingerprints of its two bases, into a folder that is there."""
    tables = {
        name: {"length": length, "pieces": [list(piece) for piece in pieces]}
        for name, (length, pieces) in delta.tables.items()
    }
    save_file(dict(delta.tensors), folder / DELTA)
    text = json.dumps({"from": old, "to": new, "tables": tables}, indent=1, sort_keys=True)
    (folder / _FACTS).write_text(text, encoding="utf-8")


def read_delta(folder: Path, *, old: str, new: str) -> Delta:
    """Read what :func:`write_delta` wrote.

    Raises:
        BundleError: it is not whole, or belongs to other bases.
    """
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        if (facts["from"], facts["to"]) != (old, new):
            raise BundleError(
                "a delta must stand behind its own base, and this one belongs to another base", received=folder.name
            )
        tables = {
            name: (int(table["length"]), [(int(a), int(b), int(size)) for a, b, size in table["pieces"]])
            for name, table in facts["tables"].items()
        }
        return Delta(load_file(folder / DELTA), tables)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"a delta must be whole ({error})", received=folder.name) from error


def _fitting(pieces: Pieces, old: int, new: int) -> Pieces:
    """As much of each piece as both tables have: a table may have become shorter."""
    cut = [(start, to, min(size, old - start, new - to)) for start, to, size in pieces]
    return [piece for piece in cut if piece[2] > 0]


def _moved(old: Tensor, length: int, pieces: Pieces) -> Tensor:
    """A new table with the rows of the old one that it keeps; all others are zeros."""
    new = old.new_zeros(length, *old.shape[1:])
    for start, to, size in pieces:
        if min(start, to, size) < 0 or start + size > len(old) or to + size > length:
            raise IndexError(f"rows {start} to {start + size} of {len(old)}")
        new[to : to + size] = old[start : start + size]
    return new


def _other_rows(one: Tensor, two: Tensor) -> Tensor:
    """Numbers of the rows whose bits differ, in as few bytes as the length allows."""
    ids = (_bits(one) != _bits(two)).any(1).nonzero().squeeze(1)
    return ids.to(torch.int32 if len(two) < 2**31 else torch.int64)


def _differ(one: Tensor, two: Tensor) -> bool:
    return not torch.equal(_bits(one.reshape(1, -1)), _bits(two.reshape(1, -1)))


def _bits(tensor: Tensor) -> Tensor:
    """Each row as integers."""
    rows = tensor.detach().cpu().contiguous().reshape(len(tensor), tensor[0].numel() if len(tensor) else 0)
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return rows.view(widths[tensor.element_size()])


def _in_place(pieces: Pieces, length: int) -> bool:
    return all(start == to for start, to, _ in pieces) and sum(size for *_, size in pieces) == length
