"""Amazon reviews: who bought what, a category a domain. Every review is a click; non-clicks are to be sampled.

Source: Ni, Li and McAuley, Justifying Recommendations using Distantly-Labeled Reviews, EMNLP 2019 (release of 2018); Hou et
al., Bridging Language and Items for Retrieval and Recommendation, arXiv 2403.03952 (release of 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ibis

from domlora.data.engine import Engine
from domlora.data.files import Archive, find_raw
from domlora.data.published.tables import Reading, options_of
from domlora.data.raw import RawTable
from domlora.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["amazon"]

_OF_2018 = {"reviewerID": "user_id", "asin": "item_id", "overall": "rating", "unixReviewTime": "time"}
_OF_2023 = {"user_id": "user_id", "parent_asin": "item_id", "rating": "rating", "timestamp": "time"}
_OF_HISTORIES = {"reviewerID": "user_id", "asin": "item_id", "position": "position"}

_LAYOUTS: dict[str, Mapping[str, str]] = {
    "_5.json.gz": _OF_2018,
    "_5.json": _OF_2018,
    ".csv.gz": _OF_2023,
    ".csv": _OF_2023,
    ".jsonl.gz": _OF_2023,
    ".jsonl": _OF_2023,
    ".parquet": _OF_HISTORIES,
}
"""End of a category's file name → its columns and what they are called here."""


def amazon(engine: Engine, raw: Path | None, options: Mapping[str, Any], progress: Progress | None = None) -> RawTable:
    """Reviews of some categories: ``user_id``, ``item_id``, ``category``, and ``rating`` and ``time`` or ``position``.

    All categories must come in one layout, the first of these that is there for all:

    * release of 2018, 5-core: ``Musical_Instruments_5.json.gz``; time in seconds
    * release of 2023, 5-core tables: ``Musical_Instruments.csv.gz``; time in milliseconds
    * release of 2023, all reviews: ``Musical_Instruments.jsonl.gz``; time in milliseconds
    * purchase histories: ``Musical_Instruments.parquet`` with ``reviewerID``, ``asin`` and ``position``, the place of the
      purchase in the user's history

    Options:
        categories: names, with blanks or underscores; the column ``category`` holds them as they are given.

    Source: the authors' code takes every review as a click whatever its stars, and so do the presets ``amazon-6`` and
    ``amazon-13``.
    """
    categories = _categories(options_of("amazon", options, categories=()))
    stems = {category: category.replace(", ", "_").replace(" ", "_") for category in categories}
    paths = find_raw(_archive(list(stems.values())), raw, progress)
    ending = next(end for end in _LAYOUTS if all(path.name.endswith(end) for path in paths))
    reading = Reading(engine, paths, progress)
    tables = [
        _reviews(reading, path, ending).mutate(category=ibis.literal(category))
        for category, path in zip(categories, paths, strict=True)
    ]
    table = ibis.union(*tables) if len(tables) > 1 else tables[0]
    key = ("user_id", "item_id", "category", *(("time",) if "time" in table.columns else ()))
    return reading.finished("amazon", table, key)


def _categories(options: Mapping[str, Any]) -> tuple[str, ...]:
    given = options["categories"]
    names = tuple(given) if isinstance(given, list | tuple) else ()
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ConfigError(
            "amazon needs the option categories, a list of different names",
            received=given,
            next_step="For example: categories = ['Musical Instruments', 'Video Games']",
        )
    return names


def _archive(stems: list[str]) -> Archive:
    endings = " ".join(_LAYOUTS)
    return Archive(
        title="Amazon reviews",
        folder="amazon",
        layouts=tuple(tuple(f"{stem}{end}" for stem in stems) for end in _LAYOUTS),
        publisher="the McAuley Lab at UC San Diego",
        wanted=f"a file for each category, all with the same one of the endings {endings}, such as {stems[0]}_5.json.gz",
        inner=("amazon-5core",),
    )


def _reviews(reading: Reading, path: Path, ending: str) -> Any:
    columns = _LAYOUTS[ending]
    if ".json" in ending:
        files = reading.json_lines([path], list(columns))
    elif ".csv" in ending:
        files = reading.delimited([path], list(columns))
    else:
        files = reading.parquet(path, columns)
    table = reading.table(files)
    rows = table.select(**{new: table[old] for old, new in columns.items()})
    return rows.mutate(time=rows["time"].try_cast("int64")) if "time" in rows.columns else rows
