"""Non-clicks for logs of clicks: items of the domain that a user did not click; the same rows on every engine.

A draw hangs on seed, domain, user and the number of the draw alone: not on the order of rows, on other domains or on how
many draws are made at once. A user's non-clicks are the first distinct items among its draws that it did not click, which is
what drawing without replacement means.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import ibis
import numpy as np
import pyarrow as pa

from domlora.data.engine import Engine
from domlora.data.expressions import cells, in_order, join, size
from domlora.data.plan import Negatives
from domlora.data.preparing.draws import DRAWN, KEY, NUMBER_SHIFT, Pools, Wanted, drawn
from domlora.data.preparing.shuffle import ORDER_COLUMN
from domlora.errors import ConfigError, DataError, nearest

__all__ = ["click_shares", "sampled"]

_SEPARATOR = "\x1f"
_OWN = {"__label", "__hash", ORDER_COLUMN}  # what a non-click does not have of its click


def sampled(
    engine: Engine,
    clicks: Any,
    plan: Negatives,
    domains: Sequence[str],
    item_columns: Sequence[str] = (),
    *,
    item: str,
) -> Any:
    r"""The non-clicks that a log of clicks lacks.

    How many are wanted of each user in each domain: see :class:`domlora.data.plan.Negatives`; ``clicks * ratio`` is rounded
    to the nearest, halves up. Which: let ``mixed(n)`` be the output ``n`` of a SplitMix64 that starts at the first 15
    hexadecimal digits of md5 of seed, domain's name and user joined by ``\x1f``.

    * Draw ``n`` is ``mixed(n)`` modulo the number of the domain's items, which stand in the order of their texts. With
      ``popularity`` its clicks stand there.
    * Draws are made in rounds: ``wanted + wanted // 16 + 1``, then 4 times as many each, until there is enough.
    * Who wants and clicked more than half of a domain's items, or would draw as often as there are items, takes, after what
      it has drawn, the others by ``mixed(2**40 + the item's number)``; with ``popularity`` by
      ``-ln((mixed // 16 + 0.5) / 2**60) / clicks of the item``, a race whose outcome is distributed as further draws are.

    The non-click number ``i`` of a user in a domain belongs to its click ``i % clicks`` there, clicks in the order of the
    first 15 digits of ``__hash``, then of their other columns. It has all columns of that row, so also its time and its
    split. But the columns of the item come from the item's first row in the domain in that order, ``__order`` is
    ``mixed(2**41 + i) // 16``, and ``__hash`` its 15 digits.

    Args:
        engine: where the rows are.
        clicks: with ``__hash`` or ``__order``, the number of its first 15 digits, or both; ``__domain``, ``__user_text``,
            ``__item_text``, ``__label`` and, after a split, ``__split``.
        plan: how many, of which.
        domains: names by number.
        item_columns: those that describe the item.
        item: the column of the item itself.

    Returns:
        The added rows alone, with the columns of ``clicks``. A user of whom more is wanted than is left gets what is left.

    Raises:
        ConfigError: ``plan.ratios`` names an unknown domain.
        DataError: not one can be sampled.

    Source:
        MLoRA (arXiv 2408.08913), rule ``paper``. In its authors' code the draws hang on the order of sets and of worker
        processes, and negatives are split apart from clicks, user by user with each part rounded up, so that the share of
        clicks differs between splits; here a non-click follows its click.
    """
    wanted = _wanted(plan, domains)
    items = engine.stored(_items(clicks))
    rows = _told_apart(engine, engine.stored(_numbered_clicks(engine, clicks, items, plan, domains)), clicks.columns)
    columns = [*KEY, "__item", "__avoided", "__key"]
    ordered = engine.batches(rows.select(*columns).order_by(*KEY))
    added = engine.kept(drawn(ordered, _pools(items, plan, len(domains)), wanted), DRAWN)
    if not size(added):
        raise DataError(
            "no non-click can be sampled",
            received=plan,
            next_step="Each user must leave an item of its domain unclicked, and the ratio must ask for one",
        )
    of_item = list(dict.fromkeys(["__item_text", item, *item_columns]))
    described = engine.stored(_first_of_items(rows, clicks.columns).select("__item", *of_item))
    return _rows(engine, rows.drop(*of_item, "__item"), added, described, clicks.schema())


def click_shares(plan: Negatives, domains: Sequence[str]) -> tuple[float, ...]:
    """The ``c`` of each domain for the rule ``paper``, which samples ``floor(clicks / c)`` non-clicks.

    Args:
        plan: with the seed; its ratios stand in for draws, and shift no other.
        domains: in the order of the draws.

    Example:
        >>> click_shares(Negatives("paper"), ("books", "games", "toys"))
        (0.22, 0.23, 0.32)
    """
    draw = random.Random(plan.seed)
    drawn = [draw.uniform(0.2, 0.5) for _ in domains]
    if plan.rounded:
        drawn = [round(share, 2) for share in drawn]
    return tuple(plan.ratios.get(name, share) for name, share in zip(domains, drawn, strict=True))


def _wanted(plan: Negatives, domains: Sequence[str]) -> Wanted:
    known = set(domains)
    for name in plan.ratios:
        if name not in known:
            raise ConfigError("negatives.ratios must name domains", received=name, next_step=nearest(name, domains))
    if plan.rule == "paper":
        shares = np.array(click_shares(plan, domains))
        return lambda domain, clicks: np.floor(clicks / shares[domain])
    ratios = np.array([plan.ratios.get(name, plan.ratio) for name in domains])
    return lambda domain, clicks: np.floor(clicks * ratios[domain] + 0.5)


def _items(clicks: Any) -> Any:
    """``__item``: the number of each ``__domain`` and ``__item_text``; and its ``__popularity``."""
    items = clicks.group_by("__domain", "__item_text").agg(__popularity=clicks.count())
    return _numbered(items, "__item", "__item_text")


def _numbered_clicks(engine: Engine, clicks: Any, items: Any, plan: Negatives, domains: Sequence[str]) -> Any:
    """Clicks with numbers in place of texts, and ``__place`` of their hashes."""
    users = clicks.select("__domain", "__user_text").distinct()
    starts = [f"{plan.seed}{_SEPARATOR}{name}{_SEPARATOR}" for name in domains]
    numbers = pa.array(range(len(domains)), pa.int32())
    started = join(users, ibis.memtable(pa.table({"__domain": numbers, "__start": starts})), ["__domain"])
    key = engine.number(started["__start"] + started["__user_text"])
    users = _numbered(started.mutate(__key=key).drop("__start"), "__user", "__user_text")
    rows = join(clicks, users, ["__domain", "__user_text"])
    rows = join(rows, items.drop("__popularity"), ["__domain", "__item_text"])
    seen = plan.exclude == "train" and "__split" in rows.columns
    avoided = rows["__split"] == 0 if seen else ibis.literal(True)
    place = rows[ORDER_COLUMN] if ORDER_COLUMN in rows.columns else engine.integer(rows["__hash"])
    return rows.mutate(__place=place, __avoided=avoided).drop(*_OWN.intersection(rows.columns))


def _told_apart(engine: Engine, rows: Any, columns: Sequence[str]) -> Any:
    """Clicks with ``__tie``: 0, or 0, 1, 2 and so on for a user's clicks of one hash, by their other columns."""
    if size(rows.select("__user", "__place").distinct()) == size(rows):
        return rows.mutate(__tie=ibis.literal(0, "int64"))
    rest = in_order(rows, among=[name for name in columns if name in rows.columns])
    tie = ibis.row_number().over(group_by=["__user", "__place"], order_by=rest)
    return engine.stored(rows.mutate(__tie=tie))


def _numbered(rows: Any, name: str, order: str) -> Any:
    """Rows with their number in the domain in the order of a column, and the domain above it."""
    number = ibis.row_number().over(group_by="__domain", order_by=order)
    return rows.mutate(**{name: number + rows["__domain"].cast("int64") * 2**NUMBER_SHIFT})


def _pools(items: Any, plan: Negatives, domains: int) -> Pools:
    sizes = np.zeros(domains, np.int64)
    for cell in cells(items, ["__domain"]).to_pylist():
        sizes[cell["__domain"]] = cell["__size"]
    if plan.rule != "popularity":
        return Pools(sizes)
    clicks = items.select("__item", "__popularity").order_by("__item").to_pyarrow()
    return Pools(sizes, np.asarray(clicks.column("__popularity"), np.int64))


def _first_of_items(rows: Any, columns: Sequence[str]) -> Any:
    """The first click of each item."""
    rows = rows.semi_join(rows.group_by("__item").agg(__place=rows["__place"].min()), ["__item", "__place"])
    rest = in_order(rows, among=[name for name in columns if name in rows.columns])
    rows = rows.mutate(__number=ibis.row_number().over(group_by="__item", order_by=rest))
    return rows.filter(rows["__number"] == 0)


def _rows(engine: Engine, rows: Any, added: Any, items: Any, schema: Any) -> Any:
    """Drawn items as rows of the log."""
    rows = rows.join(added, KEY)
    rows = rows.mutate(__drawn=rows["__drawn"].unnest())
    number = rows["__drawn"]["__order"]
    rows = rows.mutate(__item=rows["__drawn"]["__item"], __number=number).join(items, "__item")
    own = {
        "__label": ibis.literal(0).cast(schema["__label"]),
        "__hash": engine.digits(rows["__number"]),
        ORDER_COLUMN: rows["__number"],
    }
    return rows.mutate(**own).select(*schema.names)
