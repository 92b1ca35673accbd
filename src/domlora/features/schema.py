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

__all__ = ["FIRST_ID", "OOV_ID", "PAD_ID", "Feature", "FeatureKind", "Schema"]

FeatureKind = Literal["categorical", "numeric"]

PAD_ID = 0
"""The id of an absent value (null, empty text, padding of a slot)."""
OOV_ID = 1
"""The id of a value that the training split did not hold."""
FIRST_ID = 2
"""The id of the first word of a vocabulary."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One input column.

    Args:
        name: the column's name in the raw rows.
        kind: ``categorical`` (one id slot) or ``numeric`` (one dense column, standardised).
        num_ids: rows the feature needs in an embedding table: the vocabulary plus ``FIRST_ID``; 0 if numeric.
        mean, std: what a numeric value is standardised with, ``(x - mean) / std``.
    """

    name: str
    kind: FeatureKind = "categorical"
    num_ids: int = 0
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(FeatureKind):
            raise SchemaError(
                f"feature {self.name!r} has an unknown kind",
                received=self.kind,
                next_step=nearest(str(self.kind), get_args(FeatureKind)),
            )
        if self.kind == "categorical" and self.num_ids < FIRST_ID:
            raise SchemaError(
                f"categorical feature {self.name!r} needs num_ids of at least {FIRST_ID}",
                received=self.num_ids,
                next_step=f"Count its vocabulary and add {FIRST_ID}",
            )
        if self.kind == "numeric" and not self.std > 0:
            raise SchemaError(f"numeric feature {self.name!r} needs std above 0", received=self.std)


@dataclass(frozen=True, slots=True)
class Schema:
    """Columns of a prepared dataset, in the order in which ``Batch.ids`` and ``Batch.dense`` hold them.

    Args:
        features: input columns; the domain may be one of them, so that a base model knows it too.
        domains: names of the domains; the position of a name is the number in ``Batch.domain``.
        domain, label: their columns in the raw rows.
        user: column that grouped AUC groups by, if any.
        time: column that time splits order by, if any.
        weight: column of sample weights, if any.

    Raises:
        SchemaError: names repeated, no feature, or no domain.

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

    @property
    def categorical(self) -> tuple[Feature, ...]:
        return tuple(f for f in self.features if f.kind == "categorical")

    @property
    def numeric(self) -> tuple[Feature, ...]:
        return tuple(f for f in self.features if f.kind == "numeric")

    @property
    def num_slots(self) -> int:
        return len(self.categorical)

    @property
    def num_dense(self) -> int:
        return len(self.numeric)

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
                    "features": tuple(Feature(**feature) for feature in raw["features"]),
                    "domains": tuple(raw["domains"]),
                }
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise SchemaError(f"a schema must be the JSON that Schema.to_json writes ({error})") from error

    @classmethod
    def load(cls, path: Path) -> Self:
        return cls.from_json(path.read_text(encoding="utf-8"))
