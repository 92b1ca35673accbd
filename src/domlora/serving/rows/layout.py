"""What an exported folder says of tables that are not in it. Needs numpy alone.

manifest.json        ``remote``: the tables, see :class:`RemoteTable`
lookups.onnx         ids to the rows that they need of each table
fallback.safetensors the rows of padding and of out-of-vocabulary values, for when a row cannot be had
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from domlora.errors import DomloraError

__all__ = ["FALLBACK", "LOOKUPS", "RemoteTable", "Rows", "RowsMissingError", "Source", "digest_of"]

LOOKUPS, FALLBACK = "lookups.onnx", "fallback.safetensors"
Rows = NDArray[np.int64]


class RowsMissingError(DomloraError):
    """Rows of a table cannot be had now, and the policy is not to answer without them."""


class RemoteTable(NamedTuple):
    """Weights of a model that are read at the same rows, side by side: one row of them is what is kept and asked for.

    Args:
        name: of the first weight.
        num_rows: of each.
        columns: each weight and its width; inputs of the graphs.
        at: further inputs: where in what was fetched the rows of a batch lie.
        sha256: of the shape and all rows; two tables of one name and other numbers have another one.
    """

    name: str
    num_rows: int
    columns: Mapping[str, int]
    at: Sequence[str]
    sha256: str = ""

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return sum(self.columns.values())

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Self:
        """From a manifest."""
        return cls(**told)


class Source(Protocol):
    """Where rows come from."""

    strict: bool
    """Whether a row that cannot be had is an error, and no fallback."""

    def check(self, tables: Sequence[RemoteTable]) -> None:
        """Look whether it has these tables; BundleError for one that it has not."""
        ...

    def fetch(self, wanted: Sequence[tuple[RemoteTable, Rows]]) -> list[list[bytes | None]]:
        """The float32 bytes of each row of each table; None for one that cannot be had now."""
        ...

    def degraded(self, num_rows: int) -> None:
        """Be told that so many rows of a request were answered with fallbacks."""
        ...


def digest_of(num_rows: int, width: int) -> Any:
    """A sha256 that has seen the shape; the bytes of the rows come next.

    >>> digest_of(4, 2).hexdigest() == digest_of(2, 4).hexdigest()
    False
    """
    return hashlib.sha256(json.dumps([num_rows, width]).encode())
