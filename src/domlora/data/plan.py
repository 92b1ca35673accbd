"""What ``domlora prepare`` is told: where a log lies, what its columns mean, how it is split and sampled."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from domlora.errors import ConfigError, nearest
from domlora.features.schema import Pooling, Transform

__all__ = [
    "Columns",
    "FeaturePlan",
    "Filters",
    "Format",
    "NegativeRule",
    "Negatives",
    "Plan",
    "PlanKind",
    "Source",
    "Split",
    "SplitKind",
]

Format = Literal["parquet", "csv", "jsonl"]
PlanKind = Literal["categorical", "sequence", "bucketed", "numeric"]
SplitKind = Literal["random", "time", "user", "column"]
NegativeRule = Literal["paper", "uniform", "popularity"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where the rows are.

    Args:
        name: a published data set, see ``SOURCES``; its options go into ``options``.
        files: paths or globs of one's own log, relative to the folder of the TOML file.
        format: of those files; by default what their names say (``.parquet``; ``.csv``, ``.tsv``, ``.txt``; ``.jsonl``,
            ``.ndjson``, ``.json``; each also with ``.gz``).
        separator: of a CSV; by default a tab for ``.tsv``, else a comma.
        names: the columns of a CSV without a header line.
        encoding: of a CSV, such as ``latin-1``.
        key: columns that tell rows apart: order and random split hang on their text alone, so that rows of one key stay
            side by side, though the end of a split may part them (``split.kind = "user"`` parts nobody's). By default all
            columns that are read, which takes longer.
        options: of a published set, such as the categories of Amazon.
    """

    name: str | None = None
    files: tuple[str, ...] = ()
    format: Format | None = None
    separator: str | None = None
    names: tuple[str, ...] = ()
    encoding: str = "utf-8"
    key: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.name is None) == (not self.files):
            raise ConfigError("a source is either a published one by its name, or files", received=self)


@dataclass(frozen=True, slots=True)
class Columns:
    """What columns are for.

    Args:
        domain: one column, or several whose values together name the domain (joined by ``/``).
        domain_is_feature: the model sees the domain too: a categorical feature of each of its columns that no other reads.
        label: the column that says whether there was a click; empty for a log of clicks alone.
        label_rule: ``OP number``, such as ``== 5`` or ``>= 4``: when the label is 1. Without one labels must be 0 or 1.
        user: groups grouped AUC, and user splits.
        item: negatives and k-core count its values.
        item_columns: describe the item; a sampled non-click takes those of its own item.
        time: time splits order by it (anything that sorts).
        weight: sample weights, above 0.
        unknown_domain: what a row of another domain gets later: ``base`` (no adapter), ``error``, or a domain's name.
        forbidden: columns that say what happened after the click; a feature that reads one is refused.
    """

    domain: str | tuple[str, ...] = "domain"
    domain_is_feature: bool = True
    label: str = "label"
    label_rule: str | None = None
    user: str | None = None
    item: str | None = None
    item_columns: tuple[str, ...] = ()
    time: str | None = None
    weight: str | None = None
    unknown_domain: str = "base"
    forbidden: tuple[str, ...] = ()

    @property
    def domains(self) -> tuple[str, ...]:
        """The columns that name the domain."""
        return (self.domain,) if isinstance(self.domain, str) else self.domain


@dataclass(frozen=True, slots=True)
class FeaturePlan:
    """One feature, before anything is known of its values; see :class:`domlora.features.schema.Feature`.

    Args:
        kind: ``categorical``, ``sequence``, ``bucketed`` or ``numeric``.
        columns: raw columns; by default the one called as the feature. Several are crossed.
        min_count: rarer values of the training split are out of the vocabulary.
        hash_buckets: above 0, ids are hashes and there is no vocabulary.
        share: a feature whose vocabulary and vectors this one uses.
        max_length, separator, pooling: of a sequence.
        buckets: quantile buckets of a bucketed feature.
        transform, missing: of a numeric feature.
        vectors: a file of pretrained vectors, one a value: Parquet with a column of the value and a column of lists, or CSV
            with the value and its numbers in one text, separated by blanks.
        train_vectors: whether those are learned on.
    """

    kind: PlanKind = "categorical"
    columns: tuple[str, ...] = ()
    min_count: int = 1
    hash_buckets: int = 0
    share: str | None = None
    max_length: int = 20
    separator: str | None = None
    pooling: Pooling = "mean"
    buckets: int = 10
    transform: Transform = "standard"
    missing: bool = False
    vectors: str | None = None
    train_vectors: bool = False

    def __post_init__(self) -> None:
        if self.min_count < 1 or self.hash_buckets < 0 or self.max_length < 1 or self.buckets < 2:
            raise ConfigError(
                "a feature needs min_count and max_length of at least 1, hash_buckets of at least 0, buckets of at least 2",
                received=self,
            )

    def sources(self, name: str) -> tuple[str, ...]:
        """The raw columns of a feature called so."""
        return self.columns or (name,)


@dataclass(frozen=True, slots=True)
class Split:
    """Which rows train, validate and test.

    Args:
        kind: ``random`` (in each domain and label), ``time`` (the latest rows of each domain test), ``user`` (all rows of a
            user in one split) or ``column``; without it ``column`` where one is given, else ``random``.
        fractions: of train, valid and test.
        column, values: for ``column``, else unread: which of its values are which split; rows with others are dropped.
        seed: of the split and of the order of rows.
    """

    kind: SplitKind | None = None
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2)
    column: str | None = None
    values: dict[str, tuple[str, ...]] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        shares = tuple(self.fractions)
        in_range = len(shares) == 3 and all(0 <= share <= 1 for share in shares)
        if not in_range or abs(sum(shares) - 1) > 1e-9 or not shares[0]:
            raise ConfigError("fractions must be three shares (train, valid, test) that sum to 1", received=shares)
        kind = self.kind or ("random" if self.column is None else "column")
        if kind == "column" and self.column is None:
            raise ConfigError("split.kind = 'column' needs split.column", received=self.column)
        given = (self.column, self.values) if kind == "column" else (None, {})
        for name, value in zip(("kind", "column", "values"), (kind, *given), strict=True):
            object.__setattr__(self, name, value)  # what is not read is not kept, nor written into a manifest


@dataclass(frozen=True, slots=True)
class Filters:
    """Rows that do not count, in the order in which the rules are applied.

    Args:
        unique: columns of which only one row each is kept: the first by ``time``, equal times by hash.
        k_core: users and items that have fewer rows go, again and again until none is left.
        min_domain_rows: domains that have fewer rows go.
    """

    unique: tuple[str, ...] = ()
    k_core: int = 0
    min_domain_rows: int = 0


@dataclass(frozen=True, slots=True)
class Negatives:
    """Clicks alone become clicks and non-clicks: items of the domain that a user did not click.

    Args:
        rule: ``paper`` (uniform; for each user of a domain ``floor(clicks / c)``, ``c`` drawn once a domain between 0.2 and
            0.5 and rounded to two digits), ``uniform`` or ``popularity`` (in proportion to an item's clicks in the domain).
        ratio: non-clicks for each click, of the other two rules.
        ratios: of single domains; with ``paper`` their ``c``.
        rounded: with ``paper``, whether ``c`` is rounded to two digits as in the authors' code.
        exclude: what a user must not have clicked: ``all`` clicks, or those of the training split only.
        seed: of the draws.
    """

    rule: NegativeRule = "uniform"
    ratio: float = 4.0
    ratios: dict[str, float] = field(default_factory=dict)
    rounded: bool = True
    exclude: Literal["all", "train"] = "all"
    seed: int = 123

    def __post_init__(self) -> None:
        if self.rule not in get_args(NegativeRule):
            raise ConfigError(
                "unknown rule of negatives",
                received=self.rule,
                next_step=nearest(str(self.rule), get_args(NegativeRule)),
            )
        if not all(ratio > 0 for ratio in (self.ratio, *self.ratios.values())):
            raise ConfigError("ratios of negatives must be above 0", received=self)


@dataclass(frozen=True, slots=True)
class Plan:
    """All of it.

    Args:
        source: where the rows are.
        columns: what columns are for.
        features: the model's inputs by name, in order.
        split: which rows train.
        filters: which rows do not count.
        negatives: for logs of clicks alone.
        max_quarantine: share of unusable rows above which preparing stops.
        shard_rows: rows a file, about.
    """

    source: Source
    columns: Columns = field(default_factory=Columns)
    features: dict[str, FeaturePlan] = field(default_factory=dict)
    split: Split = field(default_factory=Split)
    filters: Filters = field(default_factory=Filters)
    negatives: Negatives | None = None
    max_quarantine: float = 0.01
    shard_rows: int = 1 << 20

    def __post_init__(self) -> None:
        if self.shard_rows < 1 or not 0 <= self.max_quarantine <= 1:
            raise ConfigError(
                "a plan needs shard_rows of at least 1 and max_quarantine from 0 to 1",
                received=(self.shard_rows, self.max_quarantine),
            )

    def complete(self) -> Plan:
        """The plan with the domain among the features, if it is to be one."""
        read = {column for name, spec in self.features.items() for column in spec.sources(name)}
        if not self.columns.domain_is_feature or read.issuperset(self.columns.domains):
            return self
        own = {name: FeaturePlan() for name in self.columns.domains if name not in read}
        return replace(self, features={**self.features, **own})
