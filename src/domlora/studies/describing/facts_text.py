"""The facts of a dataset as Markdown whose tables line up in a terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence

from domlora.studies.describing.facts import Clicks, Coverage, DomainFacts, Facts, FeatureFacts, Overlap, Reach
from domlora.studies.reporting.statistics import DASH, MINUS
from domlora.studies.reporting.text import plain_markdown

__all__ = ["about", "interval", "kind", "named", "number", "percent", "ratio", "to_markdown", "whole"]

_WIDTH = 100
_DOMAINS, _PAIRS = 20, 10
_LEAST_GAP, _LEAST_ROWS = 0.01, 100
_NAME, _VALUE = 22, 16


def to_markdown(facts: Facts) -> str:
    """All facts but the long tails: the largest domains, the pairs that share most, the features that miss most."""
    parts = [f"# {plain_markdown(facts.name or 'Dataset')}", _paragraph(about(facts))]
    parts += ["\n".join(_paragraph(remark, "- ") for remark in facts.remarks)] if facts.remarks else []
    parts += _rows(facts)
    parts += _domains(facts)
    for overlap in facts.overlaps:
        parts += _overlap(overlap)
    parts += _features(facts)
    parts += _gaps(facts)
    return "\n\n".join(parts) + "\n"


def about(facts: Facts) -> str:
    """One sentence that says how large a dataset is."""
    total = facts.total
    counts = [
        f"{total.total.rows:,} rows in {len(facts.domains):,} domain{'s' * (len(facts.domains) != 1)}",
        f"{total.total.clicks:,} clicks ({percent(total.total.rate)})",
    ]
    if total.users is not None:
        counts.append(f"{whole(total.users.distinct, facts.user_scale)} users ({facts.user_column})")
    if total.items is not None:
        counts.append(f"{whole(total.items.distinct, facts.item_scale)} items ({facts.item_feature})")
    counts.append(f"{len(facts.features)} feature{'s' * (len(facts.features) != 1)}")
    sampled = [
        f"{of} one in {scale}" for of, scale in (("users", facts.user_scale), ("items", facts.item_scale)) if scale > 1
    ]
    tail = f" Distinct values were counted from a sample: {', '.join(sampled)}." if sampled else ""
    return ", ".join(counts) + "." + tail


def percent(part: float | None) -> str:
    """A share with three digits that count.

    >>> percent(0.5), percent(0.00031234), percent(0.0), percent(1.0), percent(None)
    ('50.0 %', '0.0312 %', '0 %', '100 %', '–')
    """
    if part is None:
        return DASH
    if part in (0.0, 1.0):
        return f"{100 * part:.0f} %"
    return f"{100 * part:#.3g}".rstrip(".") + " %" if part >= 1e-6 else "<0.0001 %"


def interval(clicks: Clicks) -> str:
    """A rate with its interval, to the digits that the interval allows.

    >>> interval(Clicks.of(1000, 123)), interval(Clicks.of(0, 0))
    ('12.3 % [10.4, 14.5]', '–')
    """
    if clicks.rate is None or clicks.low is None or clicks.high is None:
        return DASH
    digits = min(max(1 - math.floor(math.log10(100 * (clicks.high - clicks.low))), 1), 6)
    return f"{100 * clicks.rate:.{digits}f} % [{100 * clicks.low:.{digits}f}, {100 * clicks.high:.{digits}f}]"


def whole(count: int, scale: int = 1) -> str:
    """A count; one that was estimated is marked.

    >>> whole(12345), whole(12345, scale=2)
    ('12,345', '~12,345')
    """
    return f"{'~' if scale > 1 else ''}{count:,}"


def number(value: float | None, digits: int = 4) -> str:
    """A number of any size.

    >>> number(0.123456), number(-1234567.0), number(None)
    ('0.1235', '−1.235e+06', '–')
    """
    if value is None:
        return DASH
    return f"{MINUS if value < 0 else ''}{abs(value):.{digits}g}"


def ratio(value: float | None) -> str:
    """A mean count.

    >>> ratio(1.0), ratio(123.4), ratio(None)
    ('1.00', '123', '–')
    """
    return DASH if value is None else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def kind(feature: FeatureFacts) -> str:
    """The kind of a feature, and what is particular about it."""
    notes = ["hashed"] * feature.hashed + ([f"of {feature.shares_with}"] if feature.shares_with else [])
    notes += [f"{ratio(feature.mean_length)} long"] if feature.mean_length is not None else []
    notes += ["log1p"] if feature.transform == "log1p" else []
    return ", ".join([feature.kind, *notes])


def named(name: str, limit: int = _NAME) -> str:
    """A name on one line and not too long."""
    flat = " ".join(name.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "\u2026"


def _paragraph(text: str, mark: str = "") -> str:
    """Lines of a terminal's width; a number stays with its sign of percent."""
    wrapper = textwrap.TextWrapper(
        _WIDTH,
        initial_indent=mark,
        subsequent_indent=" " * len(mark),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapper.fill(plain_markdown(text).replace(" %", "\u00a0%")).replace("\u00a0", " ")


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """A Markdown table, padded so that it lines up as plain text too."""
    cells = [[plain_markdown(cell) for cell in line] for line in (head, *lines)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    texts = [_line(line, widths, num_left) for line in cells]
    rule = ["-" * width if place < num_left else "-" * (width - 1) + ":" for place, width in enumerate(widths)]
    return "\n".join([texts[0], _line(rule, widths, num_left), *texts[1:]])


def _line(cells: Sequence[str], widths: Sequence[int], num_left: int) -> str:
    padded = [
        cell.ljust(width) if place < num_left else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return f"| {' | '.join(padded)} |"


def _rows(facts: Facts) -> Iterator[str]:
    yield "## Rows"
    if facts.flow is not None:
        steps = [[what, f"{rows:,}".replace("-", MINUS)] for what, rows in facts.flow.steps()]
        yield _table(["where they went", "rows"], steps)
    whole_rows = facts.total.total.rows
    lines = [
        [split, f"{c.rows:,}", percent(c.rows / whole_rows if whole_rows else None), f"{c.clicks:,}", interval(c)]
        for split, c in facts.total.splits.items()
    ]
    yield _table(["split", "rows", "share", "clicks", "click rate [95 %]"], lines)


def _domains(facts: Facts) -> Iterator[str]:
    yield "## Domains"
    has_users, has_items = facts.total.users is not None, facts.total.items is not None
    head = ["domain", "rows", "share", "click rate [95 %]", *["users", "rows/user"] * has_users, *["items"] * has_items]
    yield _table(head, [_domain_cells(facts, domain) for domain in _shown(facts)])
    if len(facts.domains) > _DOMAINS:
        rest = facts.domains[_DOMAINS:]
        rows = sum(domain.total.rows for domain in rest)
        yield f"And {len(rest):,} more with {rows:,} rows; the page shows them all."
    yield from _changes(facts)


def _shown(facts: Facts) -> list[DomainFacts]:
    """The largest domains, then unknown ones, then all."""
    unknown = [facts.unknown] if facts.unknown is not None else []
    return [*facts.domains[:_DOMAINS], *unknown, *([facts.total] if len(facts.domains) > 1 else [])]


def _domain_cells(facts: Facts, domain: DomainFacts) -> list[str]:
    cells = [named(domain.name), f"{domain.total.rows:,}", percent(domain.share), interval(domain.total)]
    if domain.users is not None:
        cells += [whole(domain.users.distinct, facts.user_scale), ratio(domain.users.rows_each)]
    return cells + ([whole(domain.items.distinct, facts.item_scale)] if domain.items is not None else [])


def _changes(facts: Facts) -> Iterator[str]:
    yield "## From training to test"
    has_users, has_items = facts.total.users is not None, facts.total.items is not None
    head = ["click rate in", "train", "valid", "test"]
    head += ["new users", "new here", "their rows"] * has_users + ["rows of new items"] * has_items
    lines = []
    for domain in _shown(facts):
        cells = [named(domain.name), *(percent(clicks.rate) for clicks in domain.splits.values())]
        cells += _new_cells(domain.users, domain.items)
        lines.append(cells)
    yield _table(head, lines)
    notes = []
    if has_users:
        notes.append(
            "New users: share of the users in test that no training row has; new here: that only training rows of other "
            "domains have; their rows: share of the test rows with a user that new ones cause."
        )
    if has_items:
        notes.append("New items: those that no training row has; they share one id, so counts of items leave them out.")
    if notes:
        yield _paragraph(" ".join(notes))


def _new_cells(users: Reach | None, items: Reach | None) -> list[str]:
    cells = [] if users is None else [percent(users.new), percent(users.new_here), percent(users.new_rows)]
    return cells if items is None else [*cells, percent(items.new_rows)]


def _overlap(overlap: Overlap) -> Iterator[str]:
    pairs = [
        (part, mine, other)
        for mine, shares in zip(overlap.domains, overlap.shares, strict=True)
        for other, part in zip(overlap.domains, shares, strict=True)
        if other != mine and part
    ]
    pairs.sort(key=lambda pair: -pair[0])
    yield f"## {overlap.of.capitalize()} in common"
    if not pairs:
        yield f"No two of these domains have {overlap.of} in common."
        return
    lines = [[named(mine), percent(part), named(other)] for part, mine, other in pairs[:_PAIRS]]
    yield _table([f"of the {overlap.of} of", "share", "are also in"], lines)
    if len(pairs) > _PAIRS:
        among = f" of the {len(overlap.domains)} largest domains" if len(overlap.domains) == _DOMAINS else ""
        yield f"The largest {_PAIRS} of {len(pairs):,} pairs{among} with {overlap.of} in common."


def _features(facts: Facts) -> Iterator[str]:
    yield "## Features"
    ids = [feature for feature in facts.features if feature.kind != "numeric"]
    if ids:
        head = ["feature", "kind", "values", "used", "absent", "unknown in test", "most frequent"]
        lines = [
            [
                named(feature.name),
                kind(feature),
                f"{feature.values or 0:,}",
                f"{feature.used or 0:,}",
                percent(feature.coverage["train"].absent),
                percent(feature.coverage["test"].unknown),
                ", ".join(f"{named(text, _VALUE)} {percent(part)}" for text, part in feature.top[:1]) or DASH,
            ]
            for feature in ids
        ]
        yield _table(head, lines, num_left=2)
    numbers = [feature for feature in facts.features if feature.kind == "numeric"]
    if numbers:
        head = ["feature", "kind", "mean", "std", "absent", "shift in test"]
        lines = [
            [
                named(feature.name),
                kind(feature),
                number(feature.mean),
                number(feature.std),
                percent(feature.coverage["train"].absent),
                f"{number(feature.shift, 2)} std" if feature.shift is not None else DASH,
            ]
            for feature in numbers
        ]
        yield _table(head, lines, num_left=2)


def _gaps(facts: Facts) -> Iterator[str]:
    """Where a domain misses other values in test than all do together; a share of few rows is chance."""
    found = [
        (name, domain.name, coverage["test"], facts.total.features[name]["test"])
        for domain in facts.domains
        if domain.splits["test"].rows >= _LEAST_ROWS
        for name, coverage in domain.features.items()
    ]
    apart = [(_apart(one, every), one, every, name, domain) for name, domain, one, every in found]
    apart = sorted((gap for gap in apart if gap[0] >= _LEAST_GAP), key=lambda gap: -gap[0])
    if len(facts.domains) < 2 or not apart:
        return
    yield "## Where a domain misses other values in test than the rest"
    head = ["domain", "feature", "unknown", "in all", "absent", "in all"]
    lines = [
        [named(domain), named(name), *map(percent, (one.unknown, every.unknown, one.absent, every.absent))]
        for _, one, every, name, domain in apart[:_PAIRS]
    ]
    yield _table(head, lines, num_left=2)


def _apart(one: Coverage, other: Coverage) -> float:
    pairs = ((one.unknown, other.unknown), (one.absent, other.absent))
    return max(abs((mine or 0.0) - (theirs or 0.0)) if mine is not None else 0.0 for mine, theirs in pairs)
