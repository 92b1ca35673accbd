"""The facts of a dataset as one self-contained page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from domlora.data.dataset import SPLITS
from domlora.studies.describing import facts_text
from domlora.studies.describing.facts import DomainFacts, Facts
from domlora.studies.reporting import plots

__all__ = ["to_html"]

_MANY_DOMAINS = 40


@dataclass(frozen=True, slots=True)
class _Gaps:
    """What is missing in one split: a column a feature and kind of gap, a line a domain."""

    split: str
    columns: tuple[tuple[str, str], ...]
    lines: tuple[tuple[str, tuple[float | None, ...]], ...]


def to_html(facts: Facts) -> str:
    """The page as text. Same facts, same bytes; every name is escaped on its way in."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(
        {name: getattr(facts_text, name) for name in ("interval", "kind", "number", "percent", "ratio", "whole")}
    )
    template = environment.from_string(_file("describing/facts_page.html"))
    return template.render(
        title=facts.name or "Dataset",
        about=facts_text.about(facts),
        style=_style(),
        facts=facts,
        domains=[*facts.domains, *([facts.unknown] if facts.unknown is not None else [])],
        figures=list(_figures(facts)),
        plot=Markup(_plot(facts)),
        gaps=[gaps for split in reversed(SPLITS[1:]) if (gaps := _gaps(facts, split)).columns],
        made={name: _readable(value) for name, value in facts.made.items()},
    )


def _file(name: str) -> str:
    return files("domlora.studies").joinpath(name).read_text(encoding="utf-8")


def _style() -> Markup:
    """The look of a study's page, so that both are of one house."""
    found = re.search(r"<style>.*?</style>", _file("reporting/report.html"), flags=re.DOTALL)
    assert found is not None
    return Markup(found.group())


def _figures(facts: Facts) -> Iterator[tuple[str, str]]:
    """What a dataset is in a few numbers: name and value of each."""
    total = facts.total
    yield "rows", f"{total.total.rows:,}"
    yield "domains", f"{len(facts.domains):,}"
    yield "click rate", facts_text.percent(total.total.rate)
    if total.users is not None:
        yield f"users ({facts.user_column})", facts_text.whole(total.users.distinct, facts.user_scale)
        yield "rows a user", facts_text.ratio(total.users.rows_each)
        yield "users in several domains", facts_text.percent(total.users.elsewhere)
        yield "test rows of users new since training", facts_text.percent(total.users.new_rows)
    if total.items is not None:
        yield f"items ({facts.item_feature})", facts_text.whole(total.items.distinct, facts.item_scale)
        yield "items in several domains", facts_text.percent(total.items.elsewhere)
        yield "test rows of items new since training", facts_text.percent(total.items.new_rows)


def _plot(facts: Facts) -> str:
    draw = plots.click_rates if len(facts.domains) <= _MANY_DOMAINS else plots.click_rates_by_size
    return draw(facts.domains, facts.total.total, "Click rate by domain") if facts.total.total.rows else ""


def _gaps(facts: Facts, split: str) -> _Gaps:
    """All domains, then each; columns without any gap are left out."""
    lines = [facts.total, *facts.domains] if len(facts.domains) > 1 else [facts.total]
    columns = [(f.name, gap) for f in facts.features for gap in ("unknown", "absent")]
    columns = [column for column in columns if any(_gap(domain, split, *column) for domain in lines)]
    return _Gaps(
        split,
        tuple(columns),
        tuple((domain.name, tuple(_gap(domain, split, *column) for column in columns)) for domain in lines),
    )


def _gap(domain: DomainFacts, split: str, feature: str, gap: str) -> float | None:
    found: float | None = getattr(domain.features[feature][split], gap)
    return found


def _readable(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)
