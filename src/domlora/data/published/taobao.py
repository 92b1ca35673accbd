"""Clicks in Taobao's Cloud Theme: themed pages, each a domain. Clicks alone; non-clicks are to be sampled.

Source: Du et al., Sequential Scenario-Specific Meta Learner for Online Recommendation, KDD 2019, which released the data on
Alibaba's Tianchi as data set 9716.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from domlora.data.engine import Engine
from domlora.data.files import Archive, find_raw
from domlora.data.published.tables import Reading, options_of
from domlora.data.raw import RawTable
from domlora.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["taobao_theme"]

TAOBAO = Archive(
    title="Taobao's Cloud Theme clicks",
    folder="taobao-theme",
    layouts=(("theme_click_log.csv", "user_embedding.csv", "item_embedding.csv"),),
    publisher="Tianchi, data set 9716",
)
_COLUMNS = ("user_id", "item_id", "theme_id", "leaf_cate_id", "cate_level1_id", "reach_time")


def taobao_theme(
    engine: Engine, raw: Path | None, options: Mapping[str, Any], progress: Progress | None = None
) -> RawTable:
    """Clicks on items of themed pages; ``theme`` numbers the themes from 0 as they first appear in the log.

    Clicks whose user or item has no vector are left out. The files of vectors stay where they are: a plan names them as the
    pretrained vectors of ``user_id`` and ``item_id``.

    Options:
        themes: only that many themes, the first that have a click left; all by default. The paper takes 10, 20 and 30.

    Source: as the authors' ``dataset/Taobao/preprocess_data.py``: themes are numbered before clicks are left out.
    """
    themes = options_of("taobao-theme", options, themes=None)["themes"]
    if themes is not None and (not isinstance(themes, int) or isinstance(themes, bool) or themes < 1):
        raise ConfigError("themes must be a whole number above 0", received=themes)
    paths = find_raw(TAOBAO, raw, progress)
    reading = Reading(engine, paths, progress)
    files = reading.delimited([paths[0]], _COLUMNS)
    log = reading.table(files)
    for column, path in (("user_id", paths[1]), ("item_id", paths[2])):
        listed = _listed(reading, path)
        log = log.semi_join(listed, log[column] == listed["__id"])
    clicked = set(log.select("theme_id").distinct().to_pyarrow()["theme_id"].to_pylist())
    first = [(number, theme) for number, theme in enumerate(_by_appearance(files)) if theme in clicked][:themes]
    numbers = pa.table(
        {
            "__theme": pa.array([name for _, name in first], pa.string()),
            "theme": pa.array([n for n, _ in first], pa.int64()),
        }
    )
    numbered = reading.table(reading.written(numbers))
    rows = log.join(numbered, log["theme_id"] == numbered["__theme"]).drop("__theme").rename(time="reach_time")
    return reading.finished("taobao-theme", rows, ("user_id", "item_id", "theme_id", "time"))


def _listed(reading: Reading, path: Path) -> Any:
    """The ids in the first column of a file of vectors; its header, whatever it says, is the id of nothing."""
    return reading.table(reading.delimited([path], ["__id"], names=("__id", "__numbers"))).distinct()


def _by_appearance(files: Sequence[Path]) -> list[str]:
    """The themes in the order of their first lines; in Python, since engines read rows in any order."""
    themes: dict[str, None] = {}
    for path in files:
        for batch in pq.ParquetFile(path).iter_batches(columns=["theme_id"]):
            themes |= dict.fromkeys(pc.unique(batch.column(0)).drop_null().to_pylist())
    return list(themes)
