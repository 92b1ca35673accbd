"""The contract that offline and online share: which columns a row has and what they mean."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from domlora.errors import SchemaError, nearest

__all__ = ["FIRST_ID", "OOV_ID", "PAD_ID", "Feature", "FeatureKind", "Pooling", "Schema", "Transform"]

FeatureKind = Literal["categorical", "sequence", "bucketed", "numeric"]
Pooling = Literal["mean", "sum", "max"]
Transform = Literal["standard", "log1p"]

PAD_ID = 0
"""The id of an absent value (null, empty text, padding of a slot)."""
OOV_ID = 1
"""The id of a value that the training split did not hold."""
FIRST_ID = 2
"""The id of the first word of a vocabulary."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One input of a model, made from one raw column or, crossed, from several.

    Args:
        name: of the feature.
        kind: ``categorical`` (one id), ``sequence`` (up to ``max_length`` ids whose vectors are pooled), ``bucketed`` (a
            number as the id of the bucket it falls into) or ``numeric`` (one dense column).
        columns: raw columns; none for the one called as the feature, several for a crossed categorical feature.
        num_ids: rows the feature needs in an embedding table: its vocabulary, buckets or hash buckets plus ``FIRST_ID``;
            0 if numeric.
        hash_buckets: above 0, a value's id is a hash of its text and there is no vocabulary.
        share: a feature whose vocabulary and vectors this one uses.
        max_length: ids of a sequence at the most; the last ones count, since logs append.
        separator: splits a sequence that is written as text; without one, text is a single value.
        pooling: how the vectors of a sequence become one; padding never counts.
        boundaries: of a bucketed feature, ascending; a number falls into the bucket of the boundaries up to it.
        transform: of a numeric feature: ``standard``, ``(x - mean) / std``, or ``log1p``, the same of
            ``sign(x) log(1 + |x|)``.
        mean, std: of the (transformed) number over the training rows.
        missing: a numeric feature has a second dense column, 1 where the number is absent.

    Raises:
        SchemaError: options that do not go together.
    """

    name: str
    kind: FeatureKind = "categorical"
    columns: tuple[str, ...] = ()
    num_ids: int = 0
    hash_buckets: int = 0
    share: str | None = None
    max_length: int = 1
    separator: str | None = None
    pooling: Pooling = "mean"
    boundaries: tuple[float, ...] = ()
    transform: Transform = "standard"
    mean: float = 0.0
    std: float = 1.0
    missing: bool = False

    def __post_init__(self) -> None:
        for value, kinds in ((self.kind, FeatureKind), (self.pooling, Pooling), (self.transform, Transform)):
            if value not in get_args(kinds):
                raise SchemaError(
                    f"feature {self.name!r} has an unknown option",
                    received=value,
                    next_step=nearest(str(value), get_args(kinds)),
                )
        if self.kind != "numeric" and self.num_ids < FIRST_ID:
            raise SchemaError(
                f"{self.kind} feature {self.name!r} needs num_ids of at least {FIRST_ID}",
                received=self.num_ids,
                next_step=f"Count its vocabulary and add {FIRST_ID}",
            )
        if self.kind == "numeric" and not self.std > 0:
            raise SchemaError(f"numeric feature {self.name!r} needs std above 0", received=self.std)
        if self.max_length < 1 or (self.kind != "sequence" and self.max_length > 1):
            raise SchemaError(
                f"feature {self.name!r} needs max_length of at least 1, and 1 unless it is a sequence",
                received=self.max_length,
            )
        if len(self.columns) > 1 and self.kind != "categorical":
            raise SchemaError(f"only a categorical feature crosses columns, {self.name!r} is {self.kind}")

    @property
    def sources(self) -> tuple[str, ...]:
        """The raw columns."""
        return self.columns or (self.name,)

    @property
    def has_vocabulary(self) -> bool:
        """Whether ids are places in a vocabulary of its own."""
        return self.kind in ("categorical", "sequence") and not self.hash_buckets and self.share is None

    @property
    def num_dense(self) -> int:
        """Dense columns: 0, 1, or 2 with one that says where the number is absent."""
        return 0 if self.kind != "numeric" else 1 + self.missing


@dataclass(frozen=True, slots=True)
class Schema:
    """Columns of a prepared dataset, in the order in which ``Batch.ids`` and ``Batch.dense`` hold them.

    Args:
        features: input columns; the domain may be one of them, so that a base model knows it too.
        domains: names of the domains; the position of a name is the number in ``Batch.domain``.
        domain, label: their columns in the raw rows.
        unknown_domain: what a row of another domain gets: ``base`` (no adapter), ``error``, or the domain named here.
        user: column that grouped AUC groups by, if any.
        time: column that time splits order by, if any.
        weight: column of sample weights, if any.

    Raises:
        SchemaError: names repeated, no feature, no domain, or a feature that shares with one it cannot share with.

    Example:
        >>> schema = Schema((Feature("item", num_ids=12), Feature("age", "numeric")), domains=("app", "web"))
        >>> schema.num_slots, schema.num_dense, schema.num_domains
        (1, 1, 2)
        >>> Schema.from_json(schema.to_json()) == schema
        True
    """

    features: tuple[Feature, ...]
    domains: tuple[str, ...]
    domain: str = "domain"
    label: str = "label"
    unknown_domain: str = "base"
    user: str | None = None
    time: str | None = None
    weight: str | None = None

    def __post_init__(self) -> None:
        if not self.features:
            raise SchemaError("a schema needs at least one feature")
        if not self.domains:
            raise SchemaError("a schema needs at least one domain")
        for what, names in (("feature", [f.name for f in self.features]), ("domain", list(self.domains))):
            repeated = sorted(name for name, count in Counter(names).items() if count > 1)
            if repeated:
                raise SchemaError(f"{what} names must be unique", received=repeated)

        for feature in self.features:
            if feature.share is not None:
                self._check_share(feature, feature.share)
        if self.unknown_domain not in ("base", "error", *self.domains):
            raise SchemaError(
                "unknown_domain must be 'base', 'error' or a domain",
                received=self.unknown_domain,
                next_step=nearest(self.unknown_domain, self.domains),
            )

    def _check_share(self, feature: Feature, name: str) -> None:
        known = {f.name: f for f in self.features if f.kind in ("categorical", "sequence") and f.share is None}
        if name not in known or feature.kind not in ("categorical", "sequence"):
            raise SchemaError(
                f"feature {feature.name!r} must share with a feature of ids that itself shares with none",
                received=name,
                next_step=nearest(name, known),
            )
        if (feature.num_ids, feature.hash_buckets) != (known[name].num_ids, known[name].hash_buckets):
            raise SchemaError(f"features {feature.name!r} and {name!r} share ids, so their numbers of ids must agree")

    @property
    def categorical(self) -> tuple[Feature, ...]:
        """Features of ids: all but the numeric ones."""
        return tuple(f for f in self.features if f.kind != "numeric")

    @property
    def numeric(self) -> tuple[Feature, ...]:
        return tuple(f for f in self.features if f.kind == "numeric")

    @property
    def columns(self) -> tuple[str, ...]:
        """The raw columns of all features, each once."""
        return tuple(dict.fromkeys(column for feature in self.features for column in feature.sources))

    @property
    def num_fields(self) -> int:
        """Features of ids, each of which gives a model one vector."""
        return len(self.categorical)

    @property
    def slots(self) -> tuple[Feature, ...]:
        """Whose each column of ``Batch.ids`` is: one for each feature of ids, ``max_length`` for a sequence."""
        return tuple(feature for feature in self.categorical for _ in range(feature.max_length))

    @property
    def num_slots(self) -> int:
        """Columns of ``Batch.ids``."""
        return sum(feature.max_length for feature in self.categorical)

    @property
    def num_dense(self) -> int:
        """Columns of ``Batch.dense``."""
        return sum(feature.num_dense for feature in self.numeric)

    @property
    def num_domains(self) -> int:
        return len(self.domains)

    def fingerprint(self) -> str:
        """sha256 of the JSON form: two schemas are the same if and only if these agree."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        try:
            raw: Mapping[str, Any] = json.loads(text)
            known = {f.name for f in fields(cls)}
            for key in raw:
                if key not in known:
                    raise SchemaError("unknown key in a schema", received=key, next_step=nearest(key, known))
            return cls(
                **{
                    **raw,
                    "features": tuple(_feature(feature) for feature in raw["features"]),
                    "domains": tuple(raw["domains"]),
                }
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise SchemaError(f"a schema must be the JSON that Schema.to_json writes ({error})") from error

    @classmethod
    def load(cls, path: Path) -> Self:
        return cls.from_json(path.read_text(encoding="utf-8"))


def _feature(raw: Mapping[str, Any]) -> Feature:
    lists = {key: tuple(raw[key]) for key in ("columns", "boundaries") if key in raw}
    return Feature(**{**raw, **lists})
