"""Rows cut by domain, once for all workers.

One pass reads the training and validation rows and writes them in pieces of ``PIECE_BYTES``. Inside a piece rows are sorted
by domain, in stored order otherwise, and the piece tells where each domain begins. A worker maps the pieces into memory and
reads of each the stretch of its domain: no pass over the data for every domain, and memory that does not grow with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from domlora.data.shards import row_bytes, uninitialised
from domlora.errors import DataError
from domlora.features.batch import Batch
from domlora.features.schema import Schema
from domlora.files import new_folder, sha256_of
from domlora.training.rows import OneDomain, Rows

__all__ = ["PIECE_BYTES", "CutDomain", "CutRows", "cut"]

PIECE_BYTES = 1 << 28
"""Decoded rows of one file; about three times as much is in memory while they are cut."""
_MANIFEST, _SPLITS, _READ_ROWS = "manifest.json", ("train", "valid"), 1 << 16


def cut(data: Rows, folder: Path, fingerprint: str) -> None:
    """Write the rows of all known domains to ``folder``, unless it holds the ones of that fingerprint already.

    Args:
        fingerprint: of the data; rows of another one are replaced.

    Raises:
        DataError: rows that are there are damaged, or the disk is full or cannot be written.
    """
    if _is_there(folder, fingerprint):
        return
    with new_folder(folder, overwrite=True) as fresh:
        files: dict[str, dict[str, str]] = {split: {} for split in _SPLITS}
        for split in _SPLITS:
            for number, piece in enumerate(_pieces(data, split)):
                name = f"{split}-{number:05d}.safetensors"
                save_file(_sorted_by_domain(piece, data.schema), fresh / name)
                files[split][name] = sha256_of(fresh / name)
        (fresh / _MANIFEST).write_text(json.dumps({"data": fingerprint, "files": files}, indent=1), encoding="utf-8")


class CutRows:
    """What :func:`cut` wrote, mapped into memory.

    Args:
        folder: the one that it wrote.
        schema: of the data.

    Example:
        >>> import tempfile
        >>> from domlora.data.synthetic import World
        >>> data = World(num_domains=3).dataset(1000, seed=1)[0]
        >>> with tempfile.TemporaryDirectory() as there:
        ...     cut(data, Path(there) / "rows", data.fingerprint())
        ...     rows = CutRows(Path(there) / "rows", data.schema)
        ...     mine = rows.read("valid", 2)
        >>> bool((mine.label == OneDomain(data, 2).read("valid").label).all())
        True
    """

    def __init__(self, folder: Path, schema: Schema) -> None:
        self.folder, self.schema = folder, schema
        files = _manifest(folder)["files"]
        self._files = {split: [self._opened(name) for name in files[split]] for split in _SPLITS}
        self._bounds = {split: [file.get_tensor("bounds").numpy() for file in self._files[split]] for split in _SPLITS}

    @cached_property
    def num_rows(self) -> Any:
        """Training rows of each domain ``(D,)``."""
        none = np.zeros(self.schema.num_domains, dtype=np.int64)
        return sum((np.diff(bounds) for bounds in self._bounds["train"]), start=none)

    def read(self, split: str, domain: int) -> Batch:
        """All rows of a domain in stored order, copied."""
        parts = [
            {name: file.get_slice(name)[first:last] for name in file.keys() if name != "bounds"}  # noqa: SIM118
            for file, bounds in zip(self._files[split], self._bounds[split], strict=True)
            if (first := int(bounds[domain])) < (last := int(bounds[domain + 1]))
        ]
        if not parts:
            return uninitialised(self.schema, 0)._replace(user=None)
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        number = torch.full((len(columns["label"]),), domain)
        return Batch(columns["ids"].long(), columns["dense"], number, columns["label"], columns.get("weight"))

    def _opened(self, name: str) -> Any:
        try:
            return safe_open(self.folder / name, "pt")
        except (OSError, SafetensorError) as error:
            raise _damaged(f"rows that were cut cannot be read ({error})", self.folder) from error


class CutDomain(OneDomain):
    """The rows of one domain, as :class:`~domlora.training.rows.OneDomain` gives them, read where they were cut.

    Users are left out: no model and no validation reads them.
    """

    def __init__(self, rows: CutRows, domain: int) -> None:
        self.rows, self.domain = rows, domain
        self._picked: dict[str, Batch] = {}

    @property
    def schema(self) -> Schema:
        return self.rows.schema

    def read(self, split: str) -> Batch:
        if split not in self._picked:
            self._picked[split] = self.rows.read(split, self.domain)
        return self._picked[split]


def _pieces(data: Rows, split: str) -> Iterator[list[Batch]]:
    """The rows of a split, as many at a time as fit in a piece."""
    most = max(PIECE_BYTES // row_bytes(data.schema), 1)
    piece: list[Batch] = []
    for batch in data.batches(split, min(_READ_ROWS, most)):
        if piece and sum(each.num_rows for each in piece) + batch.num_rows > most:
            yield piece
            piece = []
        piece.append(batch)
    if piece:
        yield piece


def _sorted_by_domain(piece: Sequence[Batch], schema: Schema) -> dict[str, Tensor]:
    """Columns of the rows of known domains, and where each domain begins ``(D + 1,)``."""
    domain = np.concatenate([batch.domain.numpy() for batch in piece])
    if schema.num_domains < 1 << 15:
        domain = domain.astype(np.int16)  # numpy sorts 16 bits by radix, several times faster
    order = np.argsort(domain, kind="stable")
    bounds = np.searchsorted(domain[order], np.arange(schema.num_domains + 1))
    rows = torch.from_numpy(order[bounds[0] :])
    columns = {"bounds": torch.from_numpy(bounds - bounds[0])}
    for name in ("ids", "dense", "label", *(["weight"] if schema.weight is not None else [])):
        columns[name] = torch.cat([getattr(batch, name) for batch in piece]).index_select(0, rows)
    if all(feature.num_ids < 1 << 31 for feature in schema.slots):
        columns["ids"] = columns["ids"].int()
    return columns


def _is_there(folder: Path, fingerprint: str) -> bool:
    """Whether the rows are cut already; each byte of them is read once to see that it is the one that was written."""
    if not folder.exists():
        return False
    manifest = _manifest(folder)
    if manifest["data"] != fingerprint:
        return False
    for files in manifest["files"].values():
        for name, sha256 in files.items():
            if not (folder / name).is_file() or sha256_of(folder / name) != sha256:
                raise _damaged("rows that were cut must have the sha256 of their manifest", folder / name)
    return True


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(f"rows that were cut must have their manifest ({error})", folder) from error
    return manifest


def _damaged(rule: str, path: Path) -> DataError:
    return DataError(rule, received=str(path), next_step="Remove the folder, and rows are cut again")
