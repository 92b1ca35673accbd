"""What columns are for, guessed from their names and values: a draft for people to correct, never more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from domlora.data.drafts.facts import Facts

__all__ = ["Roles", "guess_roles", "plausible_domains", "told_by_item"]

_LABELS = (
    ("label",), ("click",), ("clicked",), ("is", "click"), ("is", "clicked"), ("clk",), ("target",), ("y",),
    ("has", "click"), ("was", "clicked"), ("click", "label"), ("is", "positive"), ("converted",), ("conversion",),
)  # fmt: skip
_RATINGS = {"rating", "ratings", "stars", "score", "overall"}
_DOMAINS = (
    "scene", "scenario", "domain", "tab", "placement", "channel", "slot", "surface", "page", "site", "theme", "app",
    "device", "platform", "country", "market", "region", "locale", "language", "category", "gender", "store",
)  # fmt: skip
_ID_WORDS = {"id", "ids", "key", "hash", "no", "num", "number", "code", "idx", "index"}
_USERS = {"user", "uid", "userid", "reviewer", "visitor", "customer", "member", "client", "account", "viewer", "reader"}
_ITEMS = {
    "item", "itemid", "iid", "article", "asin", "product", "sku", "movie", "news", "ad", "adgroup", "creative", "video",
    "doc", "document", "content", "song", "track", "book", "goods", "offer", "photo",
}  # fmt: skip
_TIMES = (("timestamp",), ("time",), ("ts",), ("datetime",), ("event", "time"), ("impression", "time"), ("date",))
_TIME_WORDS = {"timestamp", "time", "ts", "datetime", "date", "day", "hour", "at"}
_WEIGHTS = {("weight",), ("sample", "weight"), ("weights",), ("importance",), ("importance", "weight")}
_AFTER = {
    "next", "after", "dwell", "conversion", "converted", "purchase", "purchased", "bought", "checkout", "clicked",
}  # fmt: skip
_AFTER_PAIRS = {
    ("read", "time"), ("watch", "time"), ("play", "time"), ("stay", "time"), ("play", "duration"),
    ("watch", "duration"), ("scroll", "percentage"), ("scroll", "depth"), ("click", "time"), ("click", "ts"),
    ("click", "timestamp"), ("click", "at"), ("post", "click"), ("post", "view"), ("post", "impression"),
}  # fmt: skip
_MOST_DOMAINS = 200
_CHANCE = 1e-9
_ENOUGH_ROWS = 10


@dataclass
class Roles:
    """Which column is what.

    Args:
        label, label_rule, domain, user, item, time, weight: one column each, as in
            :class:`domlora.data.plan.Columns`; None where no name tells.
        forbidden: columns that probably are not known before the click, each with the reason.
    """

    label: str | None = None
    label_rule: str | None = None
    domain: str | None = None
    user: str | None = None
    item: str | None = None
    time: str | None = None
    weight: str | None = None
    forbidden: dict[str, str] = field(default_factory=dict)

    @property
    def taken(self) -> set[str]:
        """Columns that are no features: user, item and domain may be."""
        return {name for name in (self.label, self.time, self.weight) if name is not None}


def guess_roles(columns: Mapping[str, Facts]) -> Roles:
    """The roles of the columns of a sample."""
    varied = {name: facts for name, facts in columns.items() if facts.distinct > 1}
    flat = {name: facts for name, facts in varied.items() if facts.lengths is None}
    roles = Roles()
    roles.label, roles.label_rule = _label(flat)
    roles.user, roles.item = _named(flat, _USERS, roles), _named(flat, _ITEMS, roles)
    roles.time = _time(flat, roles)
    roles.weight = next((name for name, facts in flat.items() if facts.words in _WEIGHTS and _is_positive(facts)), None)
    roles.forbidden = _forbidden(varied, roles)
    candidates = plausible_domains(flat, roles)
    named = [name for word in _DOMAINS for name in candidates if word in flat[name].words]
    roles.domain = named[0] if named else None
    return roles


def plausible_domains(columns: Mapping[str, Facts], roles: Roles) -> list[str]:
    """Columns with a few values, fewest first."""
    used = {roles.label, roles.user, roles.item, roles.time, roles.weight, *roles.forbidden}
    found = [
        name
        for name, facts in columns.items()
        if name not in used
        and facts.kind in ("integer", "text")
        and 1 < facts.distinct <= min(_MOST_DOMAINS, facts.num_rows // 20)
    ]
    return sorted(found, key=lambda name: columns[name].distinct)


def told_by_item(columns: Mapping[str, Facts], item: str) -> list[str]:
    """Columns that have one value for each item, and not only because each item has one row."""
    items = columns[item].codes
    found = []
    for name, facts in columns.items():
        if name == item or facts.lengths is not None or facts.distinct < 2:
            continue
        pairs = len(np.unique(items * (facts.distinct + 1) + facts.codes))
        if pairs <= columns[item].distinct + 1 and 2 * pairs < len(items):
            found.append(name)
    return found


def _told_by_label(facts: Facts, label: Facts) -> str | None:
    """Why a column probably is written after the click, judged by its values; None if nothing points to it."""
    if facts.lengths is not None:
        return None
    groups = [facts.codes[label.codes == place] for place in range(2)]
    if min(map(len, groups)) < _ENOUGH_ROWS:
        return None
    for place, other in ((0, 1), (1, 0)):
        group, rest = groups[place], groups[other]
        if (group == group[0]).all():
            same = float(np.mean(rest == group[0]))
            if same ** len(group) < _CHANCE:
                what = "absent" if group[0] < 0 else f"always {facts.values[group[0]]}"
                return f"{what} where {label.name} is {label.values[place]}"
    if _separates(facts, groups):
        return f"its value alone tells {label.name}"
    return None


def _separates(facts: Facts, groups: Sequence[NDArray[np.int64]]) -> bool:
    """Whether each value, or each side of some number, goes with one label only, and not by chance."""
    sizes = [np.bincount(group[group >= 0], minlength=facts.distinct) for group in groups]
    if facts.distinct <= facts.num_rows // 20 and not (sizes[0] * sizes[1]).any():
        rate = len(groups[1]) / (len(groups[0]) + len(groups[1]))
        total = sizes[0] + sizes[1]
        if np.log(rate**total + (1 - rate) ** total).sum() < np.log(_CHANCE):
            return True
    if not facts.is_number:
        return False
    numbers = [np.append(facts.value_numbers, np.nan)[group] for group in groups]
    low, high = (group[~np.isnan(group)] for group in numbers)
    if min(len(low), len(high)) < 3 * _ENOUGH_ROWS:
        return False
    return bool(low.max() < high.min() or high.max() < low.min())


def _label(columns: Mapping[str, Facts]) -> tuple[str | None, str | None]:
    binary = {facts.words: facts for facts in columns.values() if facts.is_binary}
    for words in _LABELS:
        if words in binary:
            return binary[words].name, "== 1" if binary[words].has_points else None
    for name, facts in columns.items():
        if _RATINGS & set(facts.words) and facts.is_number and facts.distinct <= 11:
            top = facts.value_numbers.max()
            if facts.value_numbers.min() >= 0 and top in (5, 10):
                return name, ">= 4" if top == 5 else ">= 8"
    return None, None


def _named(columns: Mapping[str, Facts], nouns: set[str], roles: Roles) -> str | None:
    """A column whose name is one of the nouns, with or without a word for id; with one first."""
    found = [
        facts
        for name, facts in columns.items()
        if name != roles.label and facts.kind in ("integer", "text") and set(facts.words) <= nouns | _ID_WORDS
        if set(facts.words) & nouns
    ]
    best = max(found, key=lambda facts: (bool(set(facts.words) & _ID_WORDS), facts.distinct), default=None)
    return None if best is None else best.name


def _time(columns: Mapping[str, Facts], roles: Roles) -> str | None:
    found = [
        facts
        for facts in columns.values()
        if facts.name not in (roles.label, roles.user, roles.item)
        if _is_time(facts) and not _after(facts.words)
    ]
    ranks = {words: rank for rank, words in enumerate(_TIMES)}
    best = min(found, key=lambda facts: (ranks.get(facts.words, len(ranks)), -facts.distinct), default=None)
    return None if best is None else best.name


def _is_time(facts: Facts) -> bool:
    if facts.kind == "time":
        return True
    if facts.kind != "integer" or not _TIME_WORDS & set(facts.words):
        return False
    return bool(facts.value_numbers.min() >= 1e5)  # a date such as 140921, or seconds since 1970


def _is_positive(facts: Facts) -> bool:
    return facts.is_number and bool((facts.value_numbers > 0).all())


def _after(words: tuple[str, ...]) -> bool:
    return bool(_AFTER & set(words) or _AFTER_PAIRS & set(pairwise(words)))


def _forbidden(columns: Mapping[str, Facts], roles: Roles) -> dict[str, str]:
    """Columns that probably are not known when the domain, user and item are, each with the reason."""
    found: dict[str, str] = {}
    label = columns[roles.label] if roles.label is not None else None
    time = columns[roles.time] if roles.time is not None else None
    for name, facts in columns.items():
        if name in (roles.label, roles.user, roles.item, roles.time, roles.weight):
            continue
        reason = _told_by_label(facts, label) if label is not None and label.is_binary else None
        if reason is None and time is not None and _is_later(facts, time):
            reason = f"never before {time.name}"
        if reason is None and _after(facts.words):
            reason = "by its name"
        if reason is not None:
            found[name] = reason
    return found


def _is_later(facts: Facts, time: Facts) -> bool:
    """Whether a time is never before the time of the row, and sometimes after it."""
    if facts.kind != time.kind or not _is_time(facts):
        return False
    if facts.kind == "time":
        texts = [np.array([*each.values, ""])[each.codes] for each in (facts, time)]
        both = (texts[0] != "") & (texts[1] != "")
        later = texts[0][both] >= texts[1][both]
        return bool(later.any() and later.all() and (texts[0][both] != texts[1][both]).any())
    gap = facts.numbers - time.numbers
    gap = gap[~np.isnan(gap)]
    scale = np.nanmax(time.numbers)
    return bool(len(gap) and gap.min() >= 0 and gap.max() > 0 and np.nanmax(facts.numbers) < 2 * scale)
