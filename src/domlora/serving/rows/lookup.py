"""From the ids of a batch to what its graph takes in place of tables. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from domlora.errors import BundleError
from domlora.features.schema import OOV_ID
from domlora.serving.rows.layout import FALLBACK, RemoteTable, Rows, RowsMissingError, Source

__all__ = ["Lookup"]

_Known = dict[int, bytes]


class Lookup:
    """The distinct rows of a batch, and where in them each of its rows lies.

    A row that cannot be had is that of an out-of-vocabulary value of its feature, which is in the exported folder; or it is
    an error, if the source is strict.

    Args:
        session: of ``lookups.onnx``.
        tables: that the graph does not hold.
        folder: of the export.
        source: of rows; None to refuse every batch.

    Raises:
        BundleError: the fallback rows are not readable.
    """

    def __init__(self, session: Any, tables: Sequence[RemoteTable], folder: Path, source: Source | None) -> None:
        self._session, self._tables, self._source = session, tables, source
        self._names = [name for table in tables for name in table.at]
        try:
            kept = load_file(folder / FALLBACK)
            self._kept = [_known(kept[f"{table.name}.at"], kept[f"{table.name}.rows"]) for table in tables]
        except (OSError, SafetensorError, KeyError) as error:
            raise BundleError("fallback rows must be readable", received=str(folder)) from error

    def __call__(self, ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """What the graph takes, by the names of its inputs.

        Raises:
            BundleError: there is no source.
            RowsMissingError: a row cannot be had, and the source is strict.
        """
        at, wanted = self._wanted(ids)
        found = self._fetch(wanted)
        fed: dict[str, NDArray[Any]] = {}
        for table, numbers, values, kept in zip(self._tables, wanted, found, self._kept, strict=True):
            if None in values:
                numbers, values = self._without(table, ids, at, (numbers, values, kept))
            fed |= _inputs(table, numbers, values, at)
        return fed

    def warm(self, ids: NDArray[np.int64]) -> None:
        """Fetch what a batch needs in one go, before its parts ask one after the other."""
        self._fetch(self._wanted(ids)[1])

    def _wanted(self, ids: NDArray[np.int64]) -> tuple[dict[str, Rows], list[Rows]]:
        at = dict(zip(self._names, self._session.run(self._names, {"ids": ids}), strict=True))
        return at, [np.unique(np.concatenate([at[name].ravel() for name in table.at])) for table in self._tables]

    def _fetch(self, wanted: list[Rows]) -> list[list[bytes | None]]:
        if self._source is None:
            raise BundleError(
                "tables of this export lie elsewhere, and nobody said where",
                received=[table.name for table in self._tables],
                next_step="Serve it with --rows redis://HOST:PORT",
            )
        return self._source.fetch(list(zip(self._tables, wanted, strict=True)))

    def _without(
        self,
        table: RemoteTable,
        ids: NDArray[np.int64],
        at: dict[str, Rows],
        found: tuple[Rows, list[bytes | None], _Known],
    ) -> tuple[Rows, list[bytes | None]]:
        """Put fallback rows in the places of missing ones, in ``at``."""
        numbers, values, kept = found
        known = {number: value for number, value in zip(numbers.tolist(), values, strict=True) if value is not None}
        missing = np.setdiff1d(numbers, [*known, *kept])
        assert self._source is not None
        if len(missing) and self._source.strict:
            raise RowsMissingError(
                f"rows of table {table.name!r} cannot be had now",
                received=f"{len(missing)} rows",
                next_step="Try again later",
            )
        known |= kept
        other = self._session.run(list(table.at), {"ids": np.full_like(ids, OOV_ID)})
        bad = [np.isin(at[name], missing) for name in table.at]
        for name, places, instead in zip(table.at, bad, other, strict=True):
            at[name] = np.where(places, instead, at[name])
        if len(missing):
            hurt = np.concatenate([places.reshape(len(ids), -1) for places in bad], axis=1).any(axis=1)
            self._source.degraded(int(np.count_nonzero(hurt)))
        numbers = np.unique(np.concatenate([at[name].ravel() for name in table.at]))
        return numbers, [known[number] for number in numbers.tolist()]


def _inputs(
    table: RemoteTable, numbers: Rows, values: list[bytes | None], at: dict[str, Rows]
) -> dict[str, NDArray[Any]]:
    """The rows of each weight, and their places."""
    block = np.frombuffer(b"".join(values), np.float32).reshape(len(numbers), table.width)  # type: ignore[arg-type]
    fed: dict[str, NDArray[Any]] = {name: np.searchsorted(numbers, at[name]) for name in table.at}
    start = 0
    for name, width in table.columns.items():
        fed[name] = np.ascontiguousarray(block[:, start : start + width])
        start += width
    return fed


def _known(numbers: NDArray[Any], rows: NDArray[Any]) -> _Known:
    return {number: row.tobytes() for number, row in zip(numbers.tolist(), rows, strict=True)}
