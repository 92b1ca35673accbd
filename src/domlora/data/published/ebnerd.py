"""EB-NeRD: news shown on the site of Ekstra Bladet, and what was clicked. Device and page make the domain.

Source: Kruse et al., EB-NeRD: A Large-Scale Dataset for News Recommendation, RecSys Challenge 2024, arXiv 2410.03432.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ibis
import numpy as np
import pyarrow as pa

from domlora.data.engine import Engine
from domlora.data.files import Archive, find_raw
from domlora.data.published.tables import Reading, check_listed_once, options_of
from domlora.data.raw import RawTable
from domlora.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["ebnerd"]

EB_NERD = Archive(
    title="EB-NeRD",
    folder="ebnerd",
    layouts=(
        (
            "train/behaviors.parquet",
            "train/history.parquet",
            "validation/behaviors.parquet",
            "validation/history.parquet",
        ),
        ("behaviors_train.parquet", "history_train.parquet", "behaviors_val.parquet", "history_val.parquet"),
    ),
    publisher="JP/Politikens Media Group, on recsys.eb.dk",
    inner=("ebnerd_demo", "ebnerd-demo", "ebnerd_small", "ebnerd_large"),
)
_LAST_DAY = int(datetime(2023, 5, 24, 7, tzinfo=UTC).timestamp())
"""The published training files end a day later."""

_IDS = ("impression_id", "user_id", "session_id", "article_id")
_OF_USER = ("is_sso_user", "is_subscriber", "gender", "postcode", "age")
_AFTER = ("read_time", "scroll_percentage", "next_read_time", "next_scroll_percentage")
_LISTS = ("article_ids_inview", "article_ids_clicked")
_DEVICES = {1: "desktop", 2: "mobile", 3: "tablet"}
_OF_ARTICLE = ("premium", "article_type", "category")


def ebnerd(engine: Engine, raw: Path | None, options: Mapping[str, Any], progress: Progress | None = None) -> RawTable:
    """One row a shown article.

    * ``item_id`` the shown article, ``clicked`` whether it was clicked
    * ``device`` desktop, mobile, tablet or unknown; ``page`` front or article; ``article_id`` the article whose page it is
    * ``time`` in seconds; ``hour`` 0 to 23 and ``weekday``, 0 a Monday, as logged
    * ``history``: what the user had read before the log began, the latest last
    * ``is_sso_user``, ``is_subscriber``, ``gender``, ``postcode``, ``age`` of the user, mostly absent
    * with ``articles.parquet`` in the folder: ``premium``, ``article_type``, ``category`` and ``hours_old`` of the shown
      article
    * ``split``: ``test`` is the published validation set, ``valid`` the last day of the published training set, ``train``
      the rest
    * known only after the click: ``read_time`` and ``scroll_percentage`` of the page, ``next_read_time`` and
      ``next_scroll_percentage`` of the clicked article. No feature may read them.

    Every impression has a click, so rates are rates within clicked impressions.

    Options:
        history: how many articles of a user's history are kept.
    """
    length = options_of("ebnerd", options, history=50)["history"]
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ConfigError("history must be a whole number above 0", received=length)
    paths = find_raw(EB_NERD, raw, progress)
    articles = Reading(engine, paths).folder / "articles.parquet"
    extra = (articles,) if articles.is_file() else ()
    reading = Reading(engine, (*paths, *extra), progress)
    train, test = _shown(reading, paths[0], paths[1], length), _shown(reading, paths[2], paths[3], length)
    train = train.mutate(split=ibis.ifelse(train["time"] >= _LAST_DAY, "valid", "train"))
    rows = train.union(test.mutate(split=ibis.literal("test")))
    if extra:
        rows = _with_articles(reading, rows, articles)
    return reading.finished("ebnerd", rows, ("impression_id", "item_id"))


def _shown(reading: Reading, behaviors: Path, history: Path, length: int) -> Any:
    """The shown articles of one part of the log, with the histories of its users."""
    wanted = (*_IDS, *_OF_USER, *_AFTER, *_LISTS, "impression_time", "device_type")
    table = reading.table(reading.parquet(behaviors, wanted))
    time = table["impression_time"].truncate("s").epoch_seconds().cast("int64")
    rows = table.select(
        *_OF_USER,
        *_AFTER,
        *_LISTS,
        **{name: table[name].cast("int64") for name in _IDS},
        time=time,
        device=ibis.cases(*((table["device_type"] == code, name) for code, name in _DEVICES.items()), else_="unknown"),
        page=ibis.ifelse(table["article_id"].isnull(), "front", "article"),
        __shown=table["article_ids_inview"].unnest(),  # alone: Spark takes no expression around it
    )
    rows = rows.mutate(
        item_id=rows["__shown"].cast("int64"),
        clicked=rows["article_ids_clicked"].contains(rows["__shown"]).cast("int32"),
        hour=rows["time"] // 3600 % 24,
        weekday=(rows["time"] // 86_400 + 3) % 7,  # the first of January 1970 was a Thursday
    ).drop("__shown", *_LISTS)
    read = ("user_id", "article_id_fixed")
    histories = reading.table(reading.rewritten(reading.parquet(history, read), partial(_latest, length), read))
    check_listed_once(histories, "__user", history)
    return rows.left_join(histories, rows["user_id"] == histories["__user"]).drop("__user")


def _latest(length: int, histories: pa.RecordBatch) -> pa.Table:
    """The last articles of each history; they are listed by time."""
    lists = histories.column("article_id_fixed").cast(pa.list_(pa.int64()))
    ends, sizes = lists.offsets.to_numpy()[1:], np.diff(lists.offsets.to_numpy())
    kept = np.minimum(sizes, length)
    offsets = np.concatenate([[0], np.cumsum(kept)])
    places = np.arange(offsets[-1]) + np.repeat(ends - offsets[1:], kept)
    values = lists.values.take(pa.array(places))
    latest = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
    return pa.table({"__user": histories.column("user_id").cast(pa.int64()), "history": latest})


def _with_articles(reading: Reading, rows: Any, path: Path) -> Any:
    """Rows with what was known of the shown article; counts of its readers are left out, for they include later ones."""
    wanted = ("article_id", "published_time", *_OF_ARTICLE)
    table = reading.table(reading.parquet(path, wanted))
    published = table["published_time"].truncate("s").epoch_seconds().cast("int64")
    listed = table.select(*_OF_ARTICLE, __article=table["article_id"].cast("int64"), __published=published)
    check_listed_once(listed, "__article", path)
    rows = rows.left_join(listed, rows["item_id"] == listed["__article"])
    return rows.mutate(hours_old=(rows["time"] - rows["__published"]) // 3600).drop("__article", "__published")
