"""A prepared folder → batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from domlora.errors import ConfigError, DataError, SchemaError, nearest
from domlora.features.batch import Batch
from domlora.features.encode import UNKNOWN_DOMAIN, Encoder
from domlora.features.schema import FIRST_ID, Feature, Schema

__all__ = ["DOMAIN_COLUMN", "FORMAT", "FORMAT_VERSION", "LABEL_COLUMN", "SPLITS", "USER_COLUMN", "Dataset"]

FORMAT, FORMAT_VERSION = "domlora-dataset", 1
SPLITS = ("train", "valid", "test")
DOMAIN_COLUMN, LABEL_COLUMN, USER_COLUMN = "__domain", "__label", "__user"
"""Columns of a shard beside one for each feature under the feature's own name."""

_GATHER_ROWS = 1 << 16
"""Rows picked from a split at once: enough to hide the cost of a call, few enough to stay in the cache."""


class Dataset:
    """Encoded rows in the splits ``train``, ``valid`` and ``test``.

    Made by :meth:`open` from a folder that ``domlora prepare`` wrote, or by :meth:`from_batches` from tensors. A split is
    decoded once, when it is first read, and stays in memory.

    Example:
        >>> from domlora.features.schema import Feature
        >>> schema = Schema((Feature("item", num_ids=5),), domains=("app", "web"))
        >>> column = torch.arange(4)
        >>> rows = Batch(column[:, None] + 1, torch.zeros(4, 0), column % 2, (column > 1).float())
        >>> dataset = Dataset.from_batches(schema, {"train": rows})
        >>> [batch.domain.tolist() for batch in dataset.batches("train", 3)]
        [[0, 0, 1], [1]]
        >>> dataset.encoder.encode({"item": ["4"], "domain": ["web"]}).ids.tolist()  # an id is its own raw value
        [[4]]
    """

    def __init__(self, schema: Schema, manifest: dict[str, Any], folder: Path | None, encoder: Encoder | None) -> None:
        self.schema = schema
        self.manifest = manifest
        self._folder = folder
        self._encoder = encoder
        self._read: dict[str, Batch] = {}

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """A prepared folder. Checks that every file is there and that schema and vocabularies are the prepared ones.

        Raises:
            DataError: the folder was not prepared, or a file is missing or damaged; the message names it.
        """
        folder = Path(folder)
        manifest = _manifest(folder)
        for name, facts in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                raise _damaged("a file of the dataset is missing", path)
            if path.stat().st_size != facts["size_bytes"]:
                raise _damaged(f"a file must have {facts['size_bytes']} bytes", path)
        for name in ("schema.json", "vocabularies.json"):
            _checked_bytes(folder, name, manifest)
        encoder = Encoder.open(folder)
        if encoder.fingerprint() != manifest["encoder_fingerprint"]:
            raise _damaged("schema and vocabularies must be those of the manifest", folder / "schema.json")
        return cls(encoder.schema, manifest, folder, encoder)

    @classmethod
    def from_batches(cls, schema: Schema, batches: Mapping[str, Batch], encoder: Encoder | None = None) -> Self:
        """A dataset in memory, such as a synthetic world.

        Args:
            schema: what the columns of the batches mean.
            batches: split → all its rows; a split that is left out is empty.
            encoder: how raw rows become these ids. By default an id is its own raw value (the text ``"7"`` becomes id 7),
                but for a feature that is the domain column itself, whose ids are the domains in order.

        Raises:
            SchemaError: batches and schema do not agree in shape or range.
        """
        for name, batch in batches.items():
            _known_split(name)
            _check_batch(schema, batch, name)
        splits = {name: {"rows": batch.num_rows} for name, batch in batches.items()}
        dataset = cls(schema, {"splits": splits}, None, encoder)
        dataset._read = {name: batches[name] if name in batches else _empty(schema) for name in SPLITS}
        return dataset

    @cached_property
    def encoder(self) -> Encoder:
        """How raw rows become ids; see :meth:`from_batches` for a dataset in memory."""
        if self._encoder is not None:
            return self._encoder
        return Encoder(self.schema, {f.name: _own_values(f, self.schema) for f in self.schema.categorical})

    def num_rows(self, split: str) -> int:
        """Rows of a split, without reading them."""
        return int(self.manifest["splits"].get(_known_split(split), {"rows": 0})["rows"])

    def read(self, split: str) -> Batch:
        """All rows of a split in stored order, kept for the next call. Do not write into its tensors.

        Raises:
            DataError: a shard is missing or is not the file that was prepared.
        """
        if _known_split(split) not in self._read:
            self._read[split] = self._decode(split)
        return self._read[split]

    def batches(
        self, split: str, batch_size: int, *, seed: int | None = None, epoch: int = 0, sort_by_domain: bool = True
    ) -> Iterator[Batch]:
        """The rows of a split, ``batch_size`` at a time; the last batch may be smaller.

        Args:
            split: ``train``, ``valid`` or ``test``.
            batch_size: rows a batch. 1024 is the paper's; larger is faster and needs a larger learning rate.
            seed: None keeps the stored order (itself shuffled once, by hash); a number at least 0 draws a permutation that
                depends on ``(seed, epoch)`` and nothing else.
            epoch: counts passes over the data.
            sort_by_domain: rows *inside* a batch are in order of domain (stable), because adapters compute one segment of
                rows a domain. Which rows form a batch does not change.

        Raises:
            ConfigError: ``batch_size`` below 1, or a negative seed or epoch.
        """
        for name, value, least in (("batch_size", batch_size, 1), ("seed", seed or 0, 0), ("epoch", epoch, 0)):
            if value < least:
                raise ConfigError(f"{name} must be at least {least}", received=value)
        return self._batches(self.read(split), batch_size, seed, epoch, sort_by_domain)

    @staticmethod
    def _batches(rows: Batch, batch_size: int, seed: int | None, epoch: int, sort_by_domain: bool) -> Iterator[Batch]:
        order = None if seed is None else np.random.default_rng((seed, epoch)).permutation(rows.num_rows)
        if sort_by_domain:
            order = _sorted_inside(rows.domain.numpy(), order, batch_size)
        chunk_rows = max(_GATHER_ROWS // batch_size, 1) * batch_size
        for start in range(0, rows.num_rows, chunk_rows):
            stop = min(start + chunk_rows, rows.num_rows)
            # picked in one go for many batches: a call a batch costs more than the copy
            chunk = rows.take(slice(start, stop)) if order is None else _pick(rows, torch.from_numpy(order[start:stop]))
            for first in range(0, stop - start, batch_size):
                yield chunk.take(slice(first, first + batch_size))

    def fingerprint(self) -> str:
        """A sha256 that two datasets share if and only if schema, encoding and rows are the same."""
        if self._folder is not None:
            return hashlib.sha256((self._folder / "manifest.json").read_bytes()).hexdigest()
        digest = hashlib.sha256((self._encoder or self.schema).fingerprint().encode())
        for split in SPLITS:
            for name, column in self._read[split]._asdict().items():
                digest.update(f"{split}/{name}".encode())
                if column is not None:
                    digest.update(np.ascontiguousarray(column.numpy()).data)
        return digest.hexdigest()

    def _decode(self, split: str) -> Batch:
        """Shards → tensors."""
        assert self._folder is not None  # in memory, every split is there from the start
        files = self.manifest["splits"][split]["files"]
        shards = [pq.read_table(pa.BufferReader(_checked_bytes(self._folder, name, self.manifest))) for name in files]
        if not shards:
            return _empty(self.schema)
        table = pa.concat_tables(shards)
        batch = Batch(
            ids=_stack(table, [f.name for f in self.schema.categorical], torch.int64),
            dense=_stack(table, [f.name for f in self.schema.numeric], torch.float32),
            domain=_column(table, DOMAIN_COLUMN).to(torch.int64),
            label=_column(table, LABEL_COLUMN).to(torch.float32),
            user=_column(table, USER_COLUMN).to(torch.int64) if self.schema.user is not None else None,
        )
        if batch.num_rows != self.num_rows(split):
            raise _damaged(f"split {split!r} must have {self.num_rows(split)} rows", self._folder)
        return batch


def _sorted_inside(domain: NDArray[np.int64], order: NDArray[np.int64] | None, batch_size: int) -> NDArray[np.int64]:
    """``order`` with the rows of each batch sorted by domain, equal ones left in place; all batches at once."""
    order = np.arange(len(domain)) if order is None else order
    if len(domain) == 0 or domain.max() < 2**15:
        domain = domain.astype(np.int16)  # numpy sorts 16 bits by radix, several times faster
    full = len(order) // batch_size * batch_size
    batches = order[:full].reshape(-1, batch_size), order[full:].reshape(1, -1)
    return np.concatenate([_sort_rows(domain, rows) for rows in batches])


def _sort_rows(domain: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    ranks = np.argsort(domain[rows], axis=1, kind="stable")  # (batches, batch_size)
    return np.take_along_axis(rows, ranks, axis=1).ravel()


def _pick(rows: Batch, order: Tensor) -> Batch:
    return rows._replace(**{k: v.index_select(0, order) for k, v in rows._asdict().items() if v is not None})


def _stack(table: pa.Table, names: list[str], dtype: torch.dtype) -> Tensor:
    """Columns side by side: ``(B, len(names))``."""
    stacked = torch.empty(table.num_rows, len(names), dtype=dtype)
    for position, name in enumerate(names):
        stacked[:, position] = _column(table, name)
    return stacked


def _column(table: pa.Table, name: str) -> Tensor:
    # torch wants memory that may be written; only then is the column copied
    return torch.from_numpy(np.require(table.column(name).to_numpy(), requirements="W"))


def _empty(schema: Schema) -> Batch:
    return Batch(
        ids=torch.empty(0, schema.num_slots, dtype=torch.int64),
        dense=torch.empty(0, schema.num_dense),
        domain=torch.empty(0, dtype=torch.int64),
        label=torch.empty(0),
        user=torch.empty(0, dtype=torch.int64) if schema.user is not None else None,
    )


def _own_values(feature: Feature, schema: Schema) -> tuple[str, ...]:
    """The words of a feature whose ids are their own raw values."""
    if feature.name == schema.domain and feature.num_ids == FIRST_ID + schema.num_domains:
        return schema.domains
    return tuple(str(number) for number in range(FIRST_ID, feature.num_ids))


def _check_batch(schema: Schema, batch: Batch, split: str) -> None:
    rows = batch.num_rows
    expected: dict[str, tuple[int, ...]] = {"ids": (rows, schema.num_slots), "dense": (rows, schema.num_dense)}
    for name, column in batch._asdict().items():
        if column is not None and tuple(column.shape) != expected.get(name, (rows,)):
            raise SchemaError(
                f"{name} of split {split!r} must have the shape {expected.get(name, (rows,))}",
                received=tuple(column.shape),
            )
    ranges = [(f.name, batch.ids[:, slot], 0, f.num_ids) for slot, f in enumerate(schema.categorical)]
    for name, column, least, end in [*ranges, ("domain", batch.domain, UNKNOWN_DOMAIN, schema.num_domains)]:
        if rows and not (column.min() >= least and column.max() < end):
            raise SchemaError(
                f"{name} of split {split!r} must lie between {least} and {end - 1}",
                received=(int(column.min()), int(column.max())),
            )


def _known_split(split: str) -> str:
    if split not in SPLITS:
        raise ConfigError("unknown split", received=split, next_step=nearest(str(split), SPLITS))
    return split


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            "a dataset is a folder that was prepared", received=str(folder), next_step="Run domlora prepare first"
        ) from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _damaged(f"the manifest cannot be read ({error})", folder / "manifest.json") from error
    known = isinstance(manifest, dict) and (manifest.get("format"), manifest.get("format_version"))
    if known != (FORMAT, FORMAT_VERSION):
        raise _damaged(f"the manifest must be that of a {FORMAT} of version {FORMAT_VERSION}", folder / "manifest.json")
    return manifest


def _checked_bytes(folder: Path, name: str, manifest: Mapping[str, Any]) -> bytes:
    """A file's content, if it is the one that was prepared: no reader of Parquet or JSON sees a flipped bit."""
    path = folder / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _damaged(f"a file of the dataset cannot be read ({error.strerror})", path) from error
    if hashlib.sha256(content).hexdigest() != manifest["files"][name]["sha256"]:
        raise _damaged("a file must have the sha256 of the manifest", path)
    return content


def _damaged(rule: str, path: Path) -> DataError:
    return DataError(rule, received=str(path), next_step="Prepare the dataset again")
