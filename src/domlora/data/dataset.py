"""A prepared folder → batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from domlora.data.batching import Pass, rows_in_memory
from domlora.data.shards import (
    DOMAIN_COLUMN,
    FORMAT,
    FORMAT_VERSION,
    LABEL_COLUMN,
    USER_COLUMN,
    WEIGHT_COLUMN,
    row_bytes,
    uninitialised,
)
from domlora.data.stream import WINDOW_BYTES, WINDOW_ROWS, Stream, damaged
from domlora.errors import ConfigError, DataError, SchemaError, nearest
from domlora.features.batch import Batch
from domlora.features.encode import UNKNOWN_DOMAIN, Encoder
from domlora.features.schema import FIRST_ID, Feature, Schema
from domlora.files import sha256_of

__all__ = [
    "DOMAIN_COLUMN",
    "FORMAT",
    "FORMAT_VERSION",
    "LABEL_COLUMN",
    "SPLITS",
    "USER_COLUMN",
    "WEIGHT_COLUMN",
    "Dataset",
]

SPLITS = ("train", "valid", "test")


class Dataset:
    """Encoded rows in the splits ``train``, ``valid`` and ``test``.

    Made by :meth:`open` from a folder that ``domlora prepare`` wrote, or by :meth:`from_batches` from tensors. A split that
    fits in memory is decoded once, when it is first read, and stays there; a larger one is read anew in each pass.

    Example:
        >>> from domlora.features.schema import Feature
        >>> import torch
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
        self._streams: dict[str, Stream] = {}
        self._streamed: set[str] = set()
        self._checked: set[Path] = set()
        self._digest = ""

    @classmethod
    def open(cls, folder: Path | str, *, memory_bytes: int = 2 << 30, in_memory: bool | None = None) -> Self:
        """A prepared folder. Checks that every file is there and that schema and vocabularies are the prepared ones.

        Args:
            folder: what ``domlora prepare`` wrote.
            memory_bytes: a split that takes more, decoded, is streamed: read from disk in each pass and shuffled a window
                of rows at a time, in about half a gigabyte whatever its size. The order of its rows, still a matter of
                seed and epoch alone, is then another than in memory.
            in_memory: whether all splits are kept in memory, or none; by default their sizes decide.

        Raises:
            DataError: the folder was not prepared, or a file is missing or damaged; the message names it.
        """
        folder = Path(folder)
        manifest = _manifest(folder)
        for name, facts in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                raise damaged("a file of the dataset is missing", path)
            if path.stat().st_size != facts["size_bytes"]:
                raise damaged(f"a file must have {facts['size_bytes']} bytes", path)
        for name in ("schema.json", "vocabularies.json"):
            _check_file(folder / name, manifest["files"][name]["sha256"])
        encoder = Encoder.open(folder)
        if encoder.fingerprint() != manifest["encoder_fingerprint"]:
            raise damaged("schema and vocabularies must be those of the manifest", folder / "schema.json")
        dataset = cls(encoder.schema, manifest, folder, encoder)
        bytes_of = {split: dataset.num_rows(split) * row_bytes(dataset.schema) for split in SPLITS}
        dataset._streamed = {
            s for s in SPLITS if in_memory is False or (in_memory is None and bytes_of[s] > memory_bytes)
        }
        return dataset

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
        dataset._read = {name: batches[name] if name in batches else uninitialised(schema, 0) for name in SPLITS}
        return dataset

    @cached_property
    def encoder(self) -> Encoder:
        """How raw rows become ids; see :meth:`from_batches` for a dataset in memory."""
        if self._encoder is not None:
            return self._encoder
        own = {f.name: _own_values(f, self.schema) for f in self.schema.features if f.has_vocabulary}
        return Encoder(self.schema, own)

    @cached_property
    def vectors(self) -> dict[str, Tensor]:
        """Pretrained vectors ``(num_ids, width)`` of the features that were prepared with some, in the order of their ids.

        Raises:
            DataError: a file is not the one that was prepared.
        """
        return {name: self._vectors(name) for name in self.manifest.get("vectors", {})}

    @property
    def trainable_vectors(self) -> frozenset[str]:
        """The features whose pretrained vectors are to be learned on."""
        return frozenset(name for name, facts in self.manifest.get("vectors", {}).items() if facts["trainable"])

    def num_rows(self, split: str) -> int:
        """Rows of a split, without reading them."""
        return int(self.manifest["splits"].get(_known_split(split), {"rows": 0})["rows"])

    def read(self, split: str) -> Batch:
        """All rows of a split in stored order, kept for the next call. Do not write into its tensors.

        Raises:
            DataError: a shard is missing or is not the file that was prepared.
        """
        if _known_split(split) not in self._read:
            self._read[split] = self._stream(split).read()
        return self._read[split]

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        seed: int | None = None,
        epoch: int = 0,
        sort_by_domain: bool = True,
        start: int = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> Iterator[Batch]:
        """The rows of a split, ``batch_size`` at a time; the last batch may be smaller.

        Args:
            split: ``train``, ``valid`` or ``test``.
            batch_size: rows a batch. 1024 is the paper's; larger is faster and needs a larger learning rate.
            seed: None keeps the stored order (itself shuffled once, by hash); a number at least 0 draws an order that
                depends on ``(seed, epoch)`` and nothing else.
            epoch: counts passes over the data.
            sort_by_domain: rows *inside* a batch are in order of domain (stable), because adapters compute one segment of
                rows a domain. Which rows form a batch does not change.
            start: batches to leave out at the beginning, without reading their rows where that can be helped. The others are
                those of the whole pass, bit for bit.
            shard: ``(worker, workers)``: each worker gets a stretch of the order, together they get every row once. Of ``R``
                rows a worker has ``R // workers`` or one more, and all have ``ceil(R // workers / batch_size)`` batches,
                so that none waits for another at the end: where the one row more would need a batch of its own, it makes
                the last batch one larger.

        Raises:
            ConfigError: a number out of range.
            DataError: fewer rows than workers; or, while reading, a file that is missing or not the one that was prepared.
        """
        asked = Pass(batch_size, seed, epoch, sort_by_domain, start, shard)
        asked.rows(self.num_rows(split))
        if split in self._streamed:
            return self._stream(split).batches(asked)
        return (batch for chunk in rows_in_memory(self.read(split), asked) for batch in chunk)

    def fingerprint(self) -> str:
        """A sha256 that two datasets share if and only if schema, encoding, rows and their order for a seed are the same."""
        if self._folder is not None:
            order = f"train in windows of {WINDOW_ROWS} rows, {WINDOW_BYTES} bytes" if "train" in self._streamed else ""
            return hashlib.sha256((self._folder / "manifest.json").read_bytes() + order.encode()).hexdigest()
        self._digest = self._digest or self._digest_of_rows()  # a model for each domain asks once a domain
        return self._digest

    def _digest_of_rows(self) -> str:
        digest = hashlib.sha256((self._encoder or self.schema).fingerprint().encode())
        for split in SPLITS:
            for name, column in self._read[split]._asdict().items():
                digest.update(f"{split}/{name}".encode())
                if column is not None:
                    digest.update(np.ascontiguousarray(column.numpy()).data)
        return digest.hexdigest()

    def _stream(self, split: str) -> Stream:
        assert self._folder is not None  # in memory, every split is there from the start
        if split not in self._streams:
            files = [self._folder / name for name in self.manifest["splits"][split]["files"]]
            self._streams[split] = Stream(files, self.schema, self.num_rows(split), partial(self._check, self._folder))
        return self._streams[split]

    def _check(self, folder: Path, path: Path) -> None:
        """A file is read through once before it is used, so that no reader of its format sees a flipped bit."""
        if path not in self._checked:
            _check_file(path, self.manifest["files"][path.relative_to(folder).as_posix()]["sha256"])
            self._checked.add(path)

    def _vectors(self, name: str) -> Tensor:
        assert self._folder is not None  # a dataset in memory has no vectors
        path = self._folder / "vectors" / f"{name}.safetensors"
        self._check(self._folder, path)
        feature = next(feature for feature in self.schema.features if feature.name == name)
        try:
            vectors = load_file(path)["vectors"]
        except (OSError, SafetensorError, KeyError) as error:
            raise damaged(f"vectors cannot be read ({error})", path) from error
        if tuple(vectors.shape) != (feature.num_ids, self.manifest["vectors"][name]["width"]):
            raise damaged(f"vectors of feature {name!r} must be one for each of {feature.num_ids} ids", path)
        return vectors


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
    ranges = [(f.name, batch.ids[:, slot], 0, f.num_ids) for slot, f in enumerate(schema.slots)]
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
        raise damaged(f"the manifest cannot be read ({error})", folder / "manifest.json") from error
    known = isinstance(manifest, dict) and (manifest.get("format"), manifest.get("format_version"))
    if known != (FORMAT, FORMAT_VERSION):
        raise damaged(f"the manifest must be that of a {FORMAT} of version {FORMAT_VERSION}", folder / "manifest.json")
    return manifest


def _check_file(path: Path, sha256: str) -> None:
    try:
        found = sha256_of(path)
    except OSError as error:
        raise damaged(f"a file of the dataset cannot be read ({error.strerror})", path) from error
    if found != sha256:
        raise damaged("a file must have the sha256 of the manifest", path)
