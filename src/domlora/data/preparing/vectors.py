"""Pretrained vectors keyed by a value → one matrix in the order of a feature's ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors.numpy import save_file

from domlora.data.plan import Plan
from domlora.data.reading.delimited import delimited_to_parquet
from domlora.errors import DataError
from domlora.features.encode import Encoder
from domlora.features.schema import FIRST_ID
from domlora.features.text import canonical_text

__all__ = ["check_vectors", "write_vectors"]

Vector = NDArray[np.float32]


def check_vectors(plan: Plan, folder: Path) -> None:
    """Whether the files of vectors are there, before hours go into the rows.

    Raises:
        DataError: one is missing.
    """
    for name, spec in plan.features.items():
        if spec.vectors is not None and not (folder / spec.vectors).is_file():
            raise DataError(
                "a file of vectors is missing",
                received=str(folder / spec.vectors),
                next_step=f"Check features.{name}.vectors",
            )


def write_vectors(plan: Plan, encoder: Encoder, folder: Path, out: Path, work: Path) -> dict[str, dict[str, Any]]:
    """Write ``vectors/<feature>.safetensors`` for each feature of the plan that has a file of them.

    A word without a vector gets zeros, as absent and unknown values do; vectors of values that are no words are skipped.

    Args:
        plan: names the files, relative to ``folder``.
        encoder: says which words a feature has.
        folder: where the files are.
        out: the prepared folder.
        work: a folder for what is thrown away.

    Returns:
        By feature the width, whether the vectors are learned on, and how many words have none.

    Raises:
        DataError: a file holds something else, or no word has a vector.
    """
    found = {}
    for name, spec in plan.features.items():
        if spec.vectors is None:
            continue
        words = {word: FIRST_ID + place for place, word in enumerate(encoder.vocabularies[name])}
        matrix, missing = _matrix(folder / spec.vectors, name, words, work)
        (out / "vectors").mkdir(exist_ok=True)
        save_file({"vectors": matrix}, out / "vectors" / f"{name}.safetensors")
        found[name] = {"width": matrix.shape[1], "trainable": spec.train_vectors, "words_without": missing}
    return found


def _matrix(path: Path, name: str, words: dict[str, int], work: Path) -> tuple[Vector, int]:
    matrix: Vector | None = None
    seen = np.zeros(FIRST_ID + len(words), dtype=bool)
    for value, vector in _read(path, work):
        if matrix is None:
            matrix = np.zeros((FIRST_ID + len(words), len(vector)), np.float32)
        place = words.get(canonical_text(value))
        if place is None:
            continue
        if len(vector) != matrix.shape[1] or not np.isfinite(vector).all():
            raise DataError(
                f"{path} must give {matrix.shape[1]} finite numbers for every value", received={value: len(vector)}
            )
        matrix[place], seen[place] = vector, True
    if matrix is None or (words and not seen.any()):
        raise DataError(
            f"{path} has no vector for any value of feature {name!r}",
            received=f"{len(words)} values",
            next_step="Its first column must hold the values",
        )
    return matrix, len(words) - int(seen.sum())


def _read(path: Path, work: Path) -> Iterator[tuple[Any, Vector]]:
    """Values and vectors of a file, a batch at a time."""
    files = [path] if path.suffix == ".parquet" else delimited_to_parquet([path], work).paths
    try:
        for file in files:
            for batch in pq.ParquetFile(file).iter_batches():
                yield from zip(batch.column(0).to_pylist(), map(_numbers, batch.column(1).to_pylist()), strict=True)
    except (pa.ArrowException, IndexError, ValueError, TypeError) as error:
        raise DataError(
            f"a file of vectors must hold two columns, a value and its numbers ({error})", received=str(path)
        ) from error


def _numbers(cell: Any) -> Vector:
    return np.array(cell.split() if isinstance(cell, str) else list(cell), np.float32)
