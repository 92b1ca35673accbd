"""What a source hands to preparation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["RawTable"]


@dataclass(frozen=True, slots=True)
class RawTable:
    """Raw rows, and what became of the files they came from.

    Args:
        name: of the source, for the manifest and for messages.
        table: a lazy Ibis table of raw columns. Text stays text and numbers of typed files stay numbers; lists are lists.
        key: text or integer columns that tell rows apart; none where all columns together do.
        folder: where the raw files were found; what else a plan names is looked for there.
        inputs: file name → sha256 of what was read, for the manifest.
        rejected: a Parquet file of lines that no reader can use, with ``file``, ``line``, ``reason`` and ``text``, if any.
        rejected_rows: how many those are.
    """

    name: str
    table: Any
    key: tuple[str, ...] = ()
    folder: Path = field(default_factory=Path)
    inputs: Mapping[str, str] = field(default_factory=dict)
    rejected: Path | None = None
    rejected_rows: int = 0
