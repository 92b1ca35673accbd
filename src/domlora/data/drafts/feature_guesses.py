"""Which columns can be features and of what kind, guessed from their names and values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from domlora.data.drafts.facts import Facts
from domlora.data.drafts.guesses import Roles
from domlora.data.plan import FeaturePlan

__all__ = ["FeatureGuess", "guess_features", "names_each_row"]

_CODE_WORDS = {
    "id", "ids", "code", "type", "category", "cat", "class", "group", "kind", "idx", "index", "hash", "gender", "os",
    "browser", "zip", "brand", "city", "country", "version", "weekday", "hour",
}  # fmt: skip
_AMOUNT_WORDS = {
    "count", "counts", "cnt", "num", "n", "age", "price", "amount", "duration", "seconds", "length", "size", "total",
    "score", "days", "minutes", "hours", "views", "clicks", "impressions", "percentage", "percent", "rate", "ratio", "ctr",
    "width", "height", "quantity", "sum", "avg", "mean", "rank", "position", "year", "income", "level",
}  # fmt: skip
_EVENT_WORDS = {"session", "request", "impression", "event", "trace", "row", "log", "uuid", "guid"}
_ORDER_WORDS = {"position", "order", "step", "seq", "sequence", "number", "index"}
_SEPARATORS = ("|", ",", ";", "^", "\x01", "\t", " ")
_FEW = 20
_FEW_CODES = 50
_CODES_FROM = 1000  # an integer that is never below this is a code rather than a count
_LOOKED_AT = 5000


@dataclass(frozen=True)
class FeatureGuess:
    """A feature as a plan has it, with what was found and what else would do.

    Args:
        plan: the feature.
        hints: sentences for comments.
    """

    plan: FeaturePlan
    hints: tuple[str, ...] = ()


def guess_features(columns: Mapping[str, Facts], roles: Roles) -> tuple[dict[str, FeatureGuess], dict[str, str]]:
    """Features by name, and columns that should not be features, each with the reason."""
    found: dict[str, FeatureGuess] = {}
    left_out: dict[str, str] = {}
    for name, facts in columns.items():
        if name in roles.taken or name in roles.forbidden or name == roles.domain:
            continue
        reason = _no_feature(facts, roles) or _counts_rows(facts, columns.get(roles.user or ""))
        if reason is not None:
            left_out[name] = reason
        else:
            found[name] = _feature(facts, name in (roles.user, roles.item))
    return _shared(found, columns, roles), left_out


def names_each_row(facts: Facts) -> bool:
    """Whether a column is called as what names a row, and has another value in each."""
    whole = facts.kind in ("integer", "text") and facts.lengths is None and not facts.absent
    return whole and facts.distinct == facts.num_rows > _FEW and bool(set(facts.words) & _EVENT_WORDS)


def _no_feature(facts: Facts, roles: Roles) -> str | None:
    """Why a column should not be a feature, if it should not."""
    if not facts.distinct:
        return "absent in all rows"
    if facts.distinct == 1 and not facts.absent:
        return f"always {facts.values[0]!r}"
    if facts.kind == "vector":
        return "a vector; a file of them, one a value of a feature, can go into features.<name>.vectors"
    if set(facts.words) <= _EVENT_WORDS | {"id", "key", "hash"} and set(facts.words) & _EVENT_WORDS:
        return "names a row or a visit, and new ones come all the time"
    if facts.kind == "time":
        return "a time; make weekday or hour columns of it if they matter"
    if facts.kind == "text" and facts.lengths is None:
        return _no_category(facts)
    every_row = facts.lengths is None and facts.distinct == facts.num_rows > _FEW
    if facts.kind == "integer" and every_row and facts.name not in (roles.user, roles.item):
        return "another value in each row"
    return None


def _counts_rows(facts: Facts, user: Facts | None) -> str | None:
    if user is None or facts.kind != "integer" or not _ORDER_WORDS & set(facts.words):
        return None
    pairs = len(np.unique(user.codes * (facts.distinct + 1) + facts.codes))
    if pairs < 0.95 * facts.num_rows or facts.distinct < 2:
        return None
    return f"numbers the rows of each {user.name}; columns.time, if rows are to be ordered by it"


def _no_category(facts: Facts) -> str | None:
    texts = facts.values[:_LOOKED_AT]
    if facts.distinct == facts.num_rows > _FEW:
        return "another text in each row"
    if all(text.startswith("[") and text.endswith("]") for text in texts):
        return "a list written as text; write 1|2|3, or lists in Parquet or JSON lines, and it can be a sequence"
    if sum("://" in text for text in texts) > len(texts) / 2:
        return "addresses of web pages; make columns of their parts"
    if _separator_in(facts) is None and np.mean([len(text.split()) for text in texts]) >= 4 and len(texts) > _FEW:
        return "free text"
    return None


def _feature(facts: Facts, is_id: bool) -> FeatureGuess:
    separator = _separator_in(facts)
    if facts.kind == "list" or (separator is not None and not is_id):
        return _sequence(facts, separator)
    if facts.kind == "float" or (facts.kind == "integer" and not is_id and not _is_code(facts)):
        return _numeric(facts)
    plan = FeaturePlan(min_count=2 if _has_rare(facts) else 1)
    hints = []
    if facts.kind == "integer" and not is_id and not _CODE_WORDS & set(facts.words) and facts.distinct > 2:
        hints.append('or kind = "numeric", if its size means something')
    if facts.has_points:
        hints.append('written as "12.0", which is another text than "12": better write integers, here and when serving')
    return FeatureGuess(plan, (*hints, *_hash_hint(facts.distinct)))


def _is_code(facts: Facts) -> bool:
    """Whether integers are names of things rather than amounts."""
    words = set(facts.words)
    is_amount = bool(words & _AMOUNT_WORDS)
    if words & _CODE_WORDS or facts.distinct <= (_FEW if is_amount else _FEW_CODES):
        return True
    return not is_amount and bool(facts.value_numbers.min() >= _CODES_FROM)


def _numeric(facts: Facts) -> FeatureGuess:
    numbers = facts.numbers[np.isfinite(facts.numbers)]
    spread = numbers.std() if len(numbers) else 0.0
    skew = float(np.mean(((numbers - numbers.mean()) / spread) ** 3)) if spread else 0.0
    is_skewed = bool(len(numbers)) and numbers.min() >= 0 and skew > 3
    plan = FeaturePlan(kind="numeric", transform="log1p" if is_skewed else "standard", missing=facts.absent > 0)
    hints = ['or kind = "bucketed"']
    if facts.kind == "integer":
        hints.append('or kind = "categorical", if it is a code')
    return FeatureGuess(plan, tuple(hints))


def _sequence(facts: Facts, separator: str | None) -> FeatureGuess:
    if facts.lengths is not None:
        lengths, distinct = facts.lengths[facts.lengths > 0], facts.distinct
    else:
        parts = [text.split(separator) for text in facts.values[:_LOOKED_AT]]
        lengths, distinct = (
            np.array([len(part) for part in parts]),
            len({each.strip() for part in parts for each in part}),
        )
    usual, longest = (int(np.quantile(lengths, share)) for share in (0.9, 1.0)) if len(lengths) else (1, 1)
    plan = FeaturePlan(kind="sequence", max_length=min(max(usual, 1), 50), separator=separator)
    hint = f"9 of 10 have up to {usual} elements, the longest {longest}; the last max_length count"
    return FeatureGuess(plan, (hint, *_hash_hint(distinct)))


def _separator_in(facts: Facts) -> str | None:
    """What separates the elements of a text, if elements come again and again."""
    if facts.kind != "text" or facts.lengths is not None:
        return None
    texts = facts.values[:_LOOKED_AT]
    for separator in _SEPARATORS:
        split = [text.split(separator) for text in texts]
        parts = [part.strip() for each in split for part in each]
        several = sum(len(each) > 1 for each in split)
        is_plain = separator != " " or all(re.fullmatch(r"[0-9A-Fa-f]*[0-9][0-9A-Fa-f]*", part) for part in parts)
        if several >= len(texts) / 5 and len(set(parts)) <= len(parts) / 2 and is_plain and all(parts):
            return separator
    return None


def _has_rare(facts: Facts) -> bool:
    return facts.distinct >= 100 and bool(np.mean(facts.sizes == 1) > 0.1)


def _hash_hint(distinct: int) -> tuple[str, ...]:
    if distinct < 50_000:
        return ()
    return (f"many values: hash_buckets = {1 << (2 * distinct).bit_length()} does without a vocabulary",)


def _shared(features: dict[str, FeatureGuess], columns: Mapping[str, Facts], roles: Roles) -> dict[str, FeatureGuess]:
    """Sequences whose elements are items share the item's vectors."""
    if roles.item not in features:
        return features
    items = set(columns[roles.item].values)
    for name, guess in features.items():
        if guess.plan.kind != "sequence":
            continue
        facts = columns[name]
        elements = set(facts.values)
        if facts.lengths is None:
            elements = {each.strip() for text in facts.values[:_LOOKED_AT] for each in text.split(guess.plan.separator)}
        if len(elements) >= 10 and len(elements & items) >= len(elements) / 3:
            common = 100 * len(elements & items) / len(elements)
            hint = f"{common:.0f} % of its elements are values of {roles.item}, so it uses the same vectors"
            plan = replace(guess.plan, share=roles.item)
            features[name] = FeatureGuess(plan, (guess.hints[0], hint))
    return features
