"""A prepared dataset → what to know of it before training, as figures, as text and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from domlora.data.dataset import SPLITS, Dataset
from domlora.errors import needing
from domlora.features.encode import Encoder
from domlora.features.schema import FIRST_ID, Feature, Schema
from domlora.studies.describing.census import TEST, TRAIN, Census, IdCensus, NumberCensus, take_census
from domlora.studies.describing.facts import (
    Clicks,
    Coverage,
    DomainFacts,
    Facts,
    FeatureFacts,
    Overlap,
    Reach,
    RowFlow,
    share,
)
from domlora.studies.describing.facts_text import to_markdown
from domlora.studies.describing.reach import Kind, overlap, reaches
from domlora.studies.describing.remarks import remarks

__all__ = ["Description", "describe"]

_UNKNOWN_NAME = "(unknown)"
_TOP_VALUES = 5
_OVERLAP_DOMAINS = 20
_MADE = ("library_version", "encoder_fingerprint", "inputs", "plan")


@dataclass(frozen=True, slots=True)
class Description(Facts):
    """The figures of a dataset (see :class:`domlora.studies.describing.facts.Facts`), and two ways to read them."""

    def to_markdown(self) -> str:
        """Plain Markdown with aligned tables for a terminal; the largest domains only, if there are many."""
        return to_markdown(self)

    def to_html(self) -> str:
        """One self-contained page, with all domains.

        Raises:
            ConfigError: the libraries of the extra ``report`` are not installed.
        """
        with needing("report", "a page"):
            from domlora.studies.describing.facts_page import to_html
        return to_html(self)


def describe(dataset: Dataset) -> Description:
    """Read a dataset once and say what it is.

    Memory is bounded: a batch at a time in stored order, one count an id, and the distinct users and items of each domain
    and split. Those are exact up to 2^24 of each in all, and counted from a sample of users (or items) beyond; the result
    says so in ``user_scale`` and ``item_scale``.

    Args:
        dataset: a prepared folder, or one in memory.

    Example:
        >>> from domlora.data.synthetic import World
        >>> found = describe(World(num_domains=2).dataset(1000, seed=1)[0])
        >>> found.total.total.rows, [domain.name for domain in found.domains], found.features[1].kind
        (1000, ['d0', 'd1'], 'numeric')
    """
    schema, manifest = dataset.schema, dataset.manifest
    item = _item_feature(schema, manifest)
    census = take_census(dataset, item)
    total, domains = _domains(census)
    order = sorted(range(schema.num_domains), key=lambda number: (-domains[number].total.rows, number))
    known, unknown = tuple(domains[number] for number in order), domains[-1]
    features = tuple(_feature(census, feature, dataset.encoder) for feature in schema.features)
    return Description(
        name=str(manifest.get("source") or ""),
        user_column=schema.user,
        item_feature=item,
        user_scale=1 if census.users is None else census.users.scale,
        item_scale=1 if census.items is None else census.items.scale,
        flow=_flow(manifest),
        total=total,
        domains=known,
        unknown=unknown if unknown.total.rows else None,
        features=features,
        overlaps=_overlaps(census, order[:_OVERLAP_DOMAINS]),
        remarks=remarks(total, known, features, unknown.total.rows),
        made={key: manifest[key] for key in _MADE if key in manifest},
    )


def _item_feature(schema: Schema, manifest: Mapping[str, Any]) -> str | None:
    """The feature that holds items: the one that reads the plan's item column, else the one of most values.

    The features of the user and of the domain are not meant, nor are crossed ones.
    """
    wanted = ((manifest.get("plan") or {}).get("columns") or {}).get("item")
    others = {schema.user, schema.domain}
    usable = [f for f in schema.categorical if f.kind == "categorical" and len(f.sources) == 1]
    named = [f for f in usable if f.sources[0] == wanted]
    largest = sorted((f for f in usable if f.sources[0] not in others), key=lambda f: -f.num_ids)
    return next((f.name for f in (*named, *largest)), None)


def _domains(census: Census) -> tuple[DomainFacts, list[DomainFacts]]:
    """All domains together; and each by its number, with unknown ones as the last."""
    count = census.schema.num_domains + 1
    users = [None] * (count + 1) if census.users is None else reaches(census, "users")
    items = [None] * (count + 1) if census.items is None else reaches(census, "items")
    names = [*census.schema.domains, _UNKNOWN_NAME]
    found = [_domain(census, names[d], np.array([d]), users[d], items[d]) for d in range(count)]
    return _domain(census, "all", np.arange(count), users[-1], items[-1]), found


def _domain(census: Census, name: str, members: Any, users: Reach | None, items: Reach | None) -> DomainFacts:
    rows, clicks = census.rows[:, members].sum(axis=1), census.clicks[:, members].sum(axis=1)
    return DomainFacts(
        name=name,
        share=share(int(rows.sum()), int(census.rows.sum())),
        total=Clicks.of(int(rows.sum()), int(clicks.sum())),
        splits={split: Clicks.of(int(rows[n]), int(clicks[n])) for n, split in enumerate(SPLITS)},
        users=users,
        items=items,
        features={f.name: _coverage(census, f, members) for f in census.schema.features},
    )


def _coverage(census: Census, feature: Feature, members: Any) -> dict[str, Coverage]:
    rows = census.rows[:, members].sum(axis=1)
    if feature.kind == "numeric":
        absent = rows - census.numbers[feature.name].known[:, members].sum(axis=1)
        told = feature.missing
        return {
            split: Coverage(share(int(absent[n]), int(rows[n])) if told else None, None)
            for n, split in enumerate(SPLITS)
        }
    counts = census.ids[feature.name]
    absent, unknown, values = (each[:, members].sum(axis=1) for each in (counts.absent, counts.unknown, counts.values))
    told = feature.kind != "bucketed" and not feature.hash_buckets
    return {
        split: Coverage(share(int(absent[n]), int(rows[n])), share(int(unknown[n]), int(values[n])) if told else None)
        for n, split in enumerate(SPLITS)
    }


def _feature(census: Census, feature: Feature, encoder: Encoder) -> FeatureFacts:
    coverage = _coverage(census, feature, slice(None))
    if feature.kind == "numeric":
        return _number(census.numbers[feature.name], coverage)
    return _ids(census.ids[feature.name], coverage, int(census.rows[TRAIN].sum()), encoder)


def _ids(counts: IdCensus, coverage: Mapping[str, Coverage], num_rows: int, encoder: Encoder) -> FeatureFacts:
    feature, frequency = counts.feature, counts.frequency
    values = int(counts.values[TRAIN].sum())
    filled = num_rows - int(counts.absent[TRAIN].sum())
    return FeatureFacts(
        name=feature.name,
        kind=feature.kind,
        columns=feature.sources,
        coverage=coverage,
        constant=num_rows > 0 and int(np.count_nonzero(frequency)) <= 1,
        hashed=bool(feature.hash_buckets),
        shares_with=feature.share,
        values=feature.num_ids - FIRST_ID,
        used=int(np.count_nonzero(frequency[FIRST_ID:])),
        top=tuple((_text(feature, number, encoder), float(frequency[number] / values)) for number in _most(frequency)),
        mean_length=share(values, filled) if feature.kind == "sequence" else None,
    )


def _most(frequency: Any) -> list[int]:
    """Ids of the most frequent values that have one of their own; equally frequent ones in the order of ids."""
    words = frequency[FIRST_ID:]
    least = np.partition(words, -_TOP_VALUES)[-_TOP_VALUES] if len(words) > _TOP_VALUES else 0
    candidates = np.flatnonzero(words >= max(least, 1))
    places = candidates[np.argsort(-words[candidates], kind="stable")][:_TOP_VALUES]
    return [FIRST_ID + int(place) for place in places]


def _text(feature: Feature, number: int, encoder: Encoder) -> str:
    """What an id stands for."""
    place = number - FIRST_ID
    if feature.kind == "bucketed":
        ends = [f"{end:.6g}" for end in feature.boundaries]
        if not ends:
            return "any number"
        if place == 0:
            return f"below {ends[0]}"
        return f"{ends[place - 1]} to {ends[place]}" if place < len(ends) else f"from {ends[-1]}"
    if feature.hash_buckets:
        return f"hash bucket {place}"
    words = encoder.vocabularies.get(feature.share or feature.name, ())
    return words[place] if place < len(words) else f"id {number}"


def _number(counts: NumberCensus, coverage: Mapping[str, Coverage]) -> FeatureFacts:
    feature, known = counts.feature, counts.known.sum(axis=1)
    num_rows = known[TRAIN]
    means = [share(counts.total[n], known[n]) for n in range(len(SPLITS))]
    mean, test = means[TRAIN], means[TEST]
    square = share(counts.squares[TRAIN], num_rows)
    std = None if mean is None or square is None else max(square - mean * mean, 0.0) ** 0.5
    absent = coverage["train"].absent or 0.0
    constant = absent == 1.0 or (absent == 0.0 and bool(counts.low == counts.high))
    return FeatureFacts(
        name=feature.name,
        kind=feature.kind,
        columns=feature.sources,
        coverage=coverage,
        constant=constant,
        transform=feature.transform,
        mean=None if mean is None else mean * feature.std + feature.mean,
        std=None if std is None else std * feature.std,
        shift=None if mean is None or test is None or not std or constant else (test - mean) / std,
    )


def _flow(manifest: Mapping[str, Any]) -> RowFlow | None:
    rows = manifest.get("rows")
    if not isinstance(rows, Mapping) or "in" not in rows or "kept" not in rows:
        return None
    quarantined, dropped = (dict(rows.get(key) or {}) for key in ("quarantined", "dropped"))
    return RowFlow(int(rows["in"]), quarantined, dropped, int(rows.get("sampled") or 0), int(rows["kept"]))


def _overlaps(census: Census, order: list[int]) -> tuple[Overlap, ...]:
    if len(order) < 2:
        return ()
    kinds: tuple[tuple[Kind, object], ...] = (("users", census.users), ("items", census.items))
    return tuple(overlap(census, of, order) for of, counted in kinds if counted is not None)
