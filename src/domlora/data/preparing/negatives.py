"""Non-clicks for logs of clicks: items of the domain that a user did not click; the same rows on every engine.

A draw is a hash of a text, so it hangs on seed, domain, user and the number of the draw alone: not on the order of rows, on
other domains or on how many draws are made at once. A user's non-clicks are the first distinct items among its draws that it
did not click, which is what drawing without replacement means.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import reduce
from typing import Any

import ibis
import pyarrow as pa

from domlora.data.engine import HASH_BITS, Engine
from domlora.data.expressions import cells, in_order, join, size
from domlora.data.plan import Negatives
from domlora.errors import ConfigError, DataError, nearest

__all__ = ["click_shares", "sampled"]

_SEPARATOR = "\x1f"
_DRAW, _RANK, _NEGATIVE = (f"{_SEPARATOR}{kind}{_SEPARATOR}" for kind in ("draw", "rank", "negative"))
_MARGIN = 16  # one draw more for each so many that are wanted
_GROWTH = 4  # times as many draws in each further round
_DOMAIN_SHIFT = 32


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
    to the nearest, halves up. Which: let ``md5(a, b, ...)`` be that of the texts joined by ``\x1f``, and a number 15 of its
    hexadecimal digits.

    * Draw ``2 i`` is the first number of ``md5(seed, domain's name, user, "draw", i)``, draw ``2 i + 1`` the second, modulo
      the number of the domain's items, which stand in the order of their texts. With ``popularity`` its clicks stand there.
    * Draws are made in rounds: ``wanted + wanted // 16 + 1`` (made even), then 4 times as many each, until there is enough.
    * Who wants and clicked more than half of a domain's items, or would draw as often as there are items, takes, after what
      it has drawn, the others by the first number of ``md5(seed, domain's name, user, "rank", item)``; with ``popularity``
      by ``-ln((number + 0.5) / 2**60) / clicks of the item``, a race whose outcome is distributed as further draws are.
      (Engines may differ in the last bit of a logarithm, so in rows only where two of these agree in 15 digits.)

    The non-click number ``i`` of a user in a domain belongs to its click ``i % clicks`` there, clicks in the order of
    ``__hash``. It has all columns of that row, so also its time and its split. But the columns of the item come from the
    item's first row in the domain in that order, and ``__hash`` is ``md5(seed, domain's name, user, "negative", item)``.

    Args:
        engine: where the rows are.
        clicks: with ``__hash``, ``__domain``, ``__user_text``, ``__item_text``, ``__label`` and, after a split, ``__split``.
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
    log = _Log(engine, clicks, plan, domains)
    if not size(log.users):
        raise DataError(
            "no non-click can be sampled",
            received=plan,
            next_step="Each user must leave an item of its domain unclicked, and the ratio must ask for one",
        )
    return _rows(engine, log, _drawn(engine, log, plan), [item, *item_columns])


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


def _wanted(plan: Negatives, domains: Sequence[str], sizes: pa.Table) -> pa.Array:
    """Non-clicks for users with so many clicks in a domain; in Python, so that no engine rounds by itself."""
    known = set(domains)
    for name in plan.ratios:
        if name not in known:
            raise ConfigError("negatives.ratios must name domains", received=name, next_step=nearest(name, domains))
    pairs = [(cell["__clicks"], cell["__domain"]) for cell in sizes.to_pylist()]
    if plan.rule == "paper":
        shares = click_shares(plan, domains)
        return pa.array([math.floor(clicks / shares[domain]) for clicks, domain in pairs], pa.int64())
    ratios = [plan.ratios.get(name, plan.ratio) for name in domains]
    return pa.array([math.floor(clicks * ratios[domain] + 0.5) for clicks, domain in pairs], pa.int64())


class _Log:
    """Clicks with numbers in place of texts; each table is computed once.

    Numbers of users and items hold the domain in their high bits, so a user of two domains has two.

    * ``users``: those who get something, ``__user`` with its ``__clicks``, ``__wanted`` and what draws need
    * ``items``: ``__item`` with its ``__popularity``
    * ``rows``: the clicks with both numbers and ``__turn``, the click's number among the user's
    * ``own``: pairs that must not be drawn
    * ``slots``: what draws point to, where those are not items
    """

    def __init__(self, engine: Engine, clicks: Any, plan: Negatives, domains: Sequence[str]) -> None:
        self.columns = clicks.columns
        users = clicks.group_by("__domain", "__user_text").agg(__clicks=clicks.count())
        users = engine.stored(_numbered(users, "__user", "__user_text"))
        items = clicks.group_by("__domain", "__item_text")
        items = items.agg(__popularity=clicks.count(), __first=clicks["__hash"].min())
        self.items = engine.stored(_numbered(items, "__item", "__item_text"))
        rows = join(clicks, users.drop("__clicks"), ["__domain", "__user_text"])
        rows = join(rows, self.items.drop("__popularity"), ["__domain", "__item_text"])
        turn = ibis.row_number().over(group_by="__user", order_by=in_order(rows, "__hash", among=self.columns))
        self.rows = engine.stored(rows.mutate(__turn=turn))
        avoided = self.rows
        if plan.exclude == "train" and "__split" in avoided.columns:
            avoided = avoided.filter(avoided["__split"] == 0)
        self.own = engine.stored(avoided.select("__user", "__item").distinct())
        self.slots = None
        if plan.rule == "popularity":
            self.slots = engine.stored(_numbered(self.rows.select("__domain", "__item"), "__slot", "__item"))
        self.users = engine.stored(self._needs(users, plan, domains))

    def _needs(self, users: Any, plan: Negatives, domains: Sequence[str]) -> Any:
        sizes = cells(users, ["__domain", "__clicks"]).select(["__domain", "__clicks"])
        told = sizes.append_column("__wanted", _wanted(plan, domains, sizes))
        number = told.column("__domain").to_pylist()
        starts = [f"{plan.seed}{_SEPARATOR}{domains[n]}{_SEPARATOR}" for n in number]
        told = told.append_column("__start", pa.array(starts, pa.string()))
        for name, table in (("__items", self.items), ("__slots", self.items if self.slots is None else self.slots)):
            many = {cell["__domain"]: cell["__size"] for cell in cells(table, ["__domain"]).to_pylist()}
            told = told.append_column(name, pa.array([many[n] for n in number], pa.int64()))
        users = join(users, ibis.memtable(told), ["__domain", "__clicks"])
        users = join(users, self.own.group_by("__user").agg(__own=self.own.count()), ["__user"])
        own = users["__own"].fill_null(0)
        wanted = ibis.least(users["__wanted"], users["__items"] - own)
        users = users.mutate(__wanted=wanted, __own=own, __key=users["__start"] + users["__user_text"])
        return users.filter(users["__wanted"] > 0).drop("__start", "__user_text")


def _numbered(rows: Any, name: str, order: str) -> Any:
    """Rows with their number in the domain in the order of a column; rows that are equal in it are alike."""
    number = ibis.row_number().over(group_by="__domain", order_by=order)
    return rows.mutate(**{name: number + _offset(rows)})


def _offset(rows: Any) -> Any:
    return rows["__domain"].cast("int64") * 2**_DOMAIN_SHIFT


def _drawn(engine: Engine, log: _Log, plan: Negatives) -> Any:
    """``__user``, ``__item`` and ``__rank``: the items of each user, in the order in which they came."""
    wanted, items = log.users["__wanted"], log.users["__items"]
    large = 2 * (wanted + log.users["__own"]) > items
    users = log.users.mutate(__draws=ibis.ifelse(large, items, wanted + wanted // _MARGIN + 1))
    parts, last = [], [users.filter(users["__draws"] >= items)]
    users = users.filter(users["__draws"] < items)
    while True:
        found = engine.stored(_round(engine, log, users))
        short = engine.stored(_short(users, found))
        last.append(short.filter(short["__draws"] >= short["__items"]))
        users = short.filter(short["__draws"] < short["__items"])
        parts.append(found.anti_join(users, "__user"))  # these draw all of it again, and more
        if not size(users):
            break
    ranking, drawn = engine.stored(reduce(_union, last)), reduce(_union, parts)
    if size(ranking):
        before = engine.stored(drawn.semi_join(ranking, "__user"))
        drawn = drawn.union(_remaining(engine, log, ranking, before, plan))
    return drawn


def _round(engine: Engine, log: _Log, users: Any) -> Any:
    """The first ``__wanted`` distinct items, that a user did not click, of ``__draws`` draws; fewer if there are no more."""
    draws = users.select(
        "__user",
        "__wanted",
        "__slots",
        __offset=_offset(users),
        __key=users["__key"] + _DRAW,
        __digests=(users["__draws"] + 1) // 2,
    )
    draws = draws.mutate(__number=ibis.range(0, draws["__digests"]).unnest())
    draws = draws.mutate(__digest=(draws["__key"] + draws["__number"].cast("string")).hexdigest("md5"))
    draws = draws.mutate(__half=ibis.range(0, 2).unnest())
    number = engine.integer(draws["__digest"].substr(draws["__half"] * (HASH_BITS // 4)))  # a digest holds two
    slot = number % draws["__slots"] + draws["__offset"]
    draws = draws.select("__user", "__wanted", __draw=draws["__number"] * 2 + draws["__half"], __item=slot)
    if log.slots is not None:
        draws = draws.rename(__slot="__item").join(log.slots.drop("__domain"), "__slot")
    draws = draws.anti_join(log.own, ["__user", "__item"])
    first = draws.group_by("__user", "__item").agg(__draw=draws["__draw"].min(), __wanted=draws["__wanted"].max())
    return _best(first, ["__draw"], ibis.literal(0, "int64"))


def _short(users: Any, found: Any) -> Any:
    """Users for whom a round found too little, with the number of draws of the next."""
    users = join(users, found.group_by("__user").agg(__found=found.count()), ["__user"])
    users = users.filter(users["__found"].fill_null(0) < users["__wanted"])
    return users.mutate(__draws=users["__draws"] * _GROWTH).drop("__found")


def _remaining(engine: Engine, log: _Log, users: Any, drawn: Any, plan: Negatives) -> Any:
    """What users still lack, from all items that they neither clicked nor drew."""
    counts = drawn.group_by("__user").agg(__found=drawn.count())
    rows = join(users, counts, ["__user"]).join(log.items, "__domain")
    for known in (log.own, drawn):
        rows = rows.anti_join(known, ["__user", "__item"])
    order = engine.number(rows["__key"] + _RANK + rows["__item_text"])
    if plan.rule == "popularity":
        order = -((order + 0.5) / 2**HASH_BITS).ln() / rows["__popularity"]
    return _best(rows.mutate(__order=order), ["__order", "__item"], rows["__found"].fill_null(0))


def _best(rows: Any, order: list[str], found: Any) -> Any:
    """A user's first rows in an order, as many as it still wants after those found before."""
    rank = ibis.row_number().over(group_by="__user", order_by=order)
    rank = rank.cast("int32").cast("int64")  # Spark's has 32 bits; Ibis thinks otherwise and leaves out a cast to 64
    rows = rows.mutate(__rank=rank + found)
    return rows.filter(rows["__rank"] < rows["__wanted"]).select("__user", "__item", "__rank")


def _rows(engine: Engine, log: _Log, drawn: Any, item_columns: Sequence[str]) -> Any:
    """Drawn items as rows of the log."""
    of_item = list(dict.fromkeys(["__item_text", *item_columns]))
    items = engine.stored(_first_of_items(log).select("__item", *of_item))
    clicks = log.rows.drop(*of_item, "__item", "__first", "__label", "__hash").rename(__of="__user")
    drawn = drawn.join(log.users.select("__user", "__key", "__clicks"), "__user")
    turn = drawn["__rank"] % drawn["__clicks"]
    rows = drawn.join(clicks, [drawn["__user"] == clicks["__of"], turn == clicks["__turn"]]).join(items, "__item")
    digest = (rows["__key"] + _NEGATIVE + rows["__item_text"]).hexdigest("md5")
    label = ibis.literal(0).cast(log.rows["__label"].type())
    return rows.mutate(__hash=digest, __label=label).select(*log.columns)


def _first_of_items(log: _Log) -> Any:
    rows = log.rows.filter(log.rows["__hash"] == log.rows["__first"])
    number = ibis.row_number().over(group_by="__item", order_by=in_order(rows, "__hash", among=log.columns))
    rows = rows.mutate(__number=number)
    return rows.filter(rows["__number"] == 0)


def _union(one: Any, other: Any) -> Any:
    return one.union(other)
