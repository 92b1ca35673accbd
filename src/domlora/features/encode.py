"""Raw value to id: the one encoder that preparation offline and the server online share."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from domlora.errors import DataError, SchemaError, UnknownDomainError, nearest
from domlora.features.columns import Column, Number, crossed_numbers_of, floats_of, numbers_of, sequences_of
from domlora.features.numeric import bucket, fit_boundaries, fit_numbers, standardise
from domlora.features.schema import FIRST_ID, OOV_ID, PAD_ID, Feature, Schema
from domlora.features.text import (
    ABSENT_USER,
    CROSS,
    canonical_text,
    crossed_text,
    domain_text,
    hash_id,
    user_number,
)

if TYPE_CHECKING:
    from domlora.features.batch import Batch

__all__ = [
    "ABSENT_USER",
    "UNKNOWN_DOMAIN",
    "Encoder",
    "bucket",
    "canonical_text",
    "crossed_text",
    "domain_text",
    "fit_boundaries",
    "fit_numbers",
    "fit_vocabulary",
    "hash_id",
    "standardise",
    "user_number",
]

UNKNOWN_DOMAIN = -1
"""``Batch.domain`` of a row whose domain is absent or was not prepared."""


def fit_vocabulary(
    name: str, sizes: Iterable[tuple[Any, int]], *, min_count: int = 1, known: Sequence[str] = ()
) -> list[str]:
    """The words of a categorical feature in the order of their ids: frequent first, equally frequent ones by text.

    Args:
        name: of the feature, for messages.
        sizes: raw values, each with the number of training rows that have it; of a sequence its elements, of a crossed
            feature tuples with one value of each column. Absent values and those that no training row has are no words.
        min_count: values of fewer rows are no words.
        known: words of an earlier vocabulary, which keep their places at the front however rare they are now.

    Raises:
        SchemaError: a value that has no canonical text.

    Example:
        >>> fit_vocabulary("item", [("b", 2), (3, 1), ("3 ", 1), ("c", 9), (None, 4), ("rare", 0)])
        ['c', '3', 'b']
        >>> fit_vocabulary("item", [("b", 2), ("c", 9), ("a", 1)], min_count=2, known=["z", "b"])
        ['z', 'b', 'c']
    """
    counts = Counter[str]()
    for value, size in sizes:
        try:
            counts[crossed_text(value) if isinstance(value, tuple) else canonical_text(value)] += size
        except SchemaError as error:
            raise SchemaError(f"column {name!r} cannot be encoded: {str(error).removesuffix('.')}") from error
    old, least = set(known), max(min_count, 1)
    fresh = [word for word, count in counts.items() if word and count >= least and word not in old]
    return [*known, *sorted(fresh, key=lambda word: (-counts[word], word))]


class Encoder:
    """Raw rows to a :class:`Batch`, with what was learned from the training split.

    * A categorical value ``v`` becomes ``FIRST_ID + position of canonical_text(v)`` in the vocabulary, ``PAD_ID`` when it is
      absent, ``OOV_ID`` when it is not in the vocabulary; a crossed one so from :func:`crossed_text` of its columns.
    * With ``hash_buckets`` it becomes :func:`hash_id` of that text, with ``share`` what it is for the named feature.
    * A sequence becomes the ids of its last ``max_length`` present elements, a bucketed number :func:`bucket`.
    * A numeric value is standardised (:func:`standardise`); with ``missing`` a 1 follows where it is absent, else a 0.
    * A domain becomes its position in ``schema.domains``, any other what ``schema.unknown_domain`` says. A domain
      that several columns name (``schema.domain`` is ``"page/slot"``) is read from those, or from one column of that name.

    Rows may be encoded by many threads at once.

    Args:
        schema: the columns; ``num_ids`` of a feature must be the length of its vocabulary, its hash buckets or its
            boundaries + 1, and ``FIRST_ID`` more.
        vocabularies: for each feature with ``has_vocabulary`` the canonical texts, in the order of their ids.

    Raises:
        SchemaError: vocabularies and schema do not agree, or a word is absent, repeated or not canonical.

    Example:
        >>> schema = Schema((Feature("item", num_ids=4),), domains=("app", "web"))
        >>> batch = Encoder(schema, {"item": ["42", "7"]}).encode({"item": [7, "42 ", 8, None], "domain": ["web"] * 4})
        >>> batch.ids.tolist(), batch.domain.tolist()
        ([[3], [2], [1], [0]], [1, 1, 1, 1])
    """

    def __init__(self, schema: Schema, vocabularies: Mapping[str, Sequence[str]]) -> None:
        names = [feature.name for feature in schema.features if feature.has_vocabulary]
        for name in [*vocabularies, *names]:
            if name not in vocabularies or name not in names:
                raise SchemaError(
                    "every categorical feature or sequence that is neither hashed nor shared needs one vocabulary",
                    received=name,
                    next_step=nearest(name, names),
                )
        self.schema = schema
        self.vocabularies = {name: tuple(vocabularies[name]) for name in names}
        self._features = {feature.name: feature for feature in schema.features}
        self._ids = {name: _index(self._features[name], self.vocabularies[name]) for name in names}
        for feature in schema.categorical:
            _check_feature(feature, self._features[feature.share or feature.name])
        self._lists = _columns_of_lists(schema)
        self._domains = {canonical_text(name): position for position, name in enumerate(schema.domains)}
        if len(self._domains) < schema.num_domains or "" in self._domains:
            raise SchemaError("domain names must be distinct texts that are not blank", received=schema.domains)

    def encode(self, rows: Mapping[str, Column]) -> Batch:
        """The rows as tensors; see :meth:`encode_arrays`."""
        import torch  # here, so that a server that scores without torch can use encode_arrays

        from domlora.features.batch import Batch

        return Batch(**{name: torch.from_numpy(column) for name, column in self.encode_arrays(rows).items()})

    def encode_arrays(self, rows: Mapping[str, Column]) -> dict[str, NDArray[Any]]:
        """The rows as numpy arrays, named and typed like the fields of ``Batch``.

        **Shape**: ``B`` rows in columns of length ``B`` → ``ids (B, S)``, ``dense (B, G)``, ``domain (B,)``, ``label (B,)``.

        Args:
            rows: column name → values. The raw columns of the features and the domain are required; without the label
                column, labels are 0; user and weight appear in the result only when the schema names them and the rows
                hold them. Other columns are ignored. A sequence's column holds lists, or is a numpy array ``(B, any)``.

        Raises:
            SchemaError: a column is missing, columns differ in length, or a value has a type that cannot be encoded.
            UnknownDomainError: a row of an unknown or absent domain, where the schema says ``error``.
        """
        schema, domain = self.schema, self._domain_columns(rows)
        num_rows = self._check(rows, domain)
        arrays: dict[str, NDArray[Any]] = {
            "ids": self._all_ids(rows, num_rows),
            "dense": self._all_dense(rows, num_rows),
            "domain": _numbers(rows, domain, self.domain_number),
            "label": np.zeros(num_rows, np.float32),
        }
        if schema.label in rows:
            arrays["label"] = _complete(rows[schema.label], schema.label)
        if schema.weight is not None and schema.weight in rows:
            arrays["weight"] = _complete(rows[schema.weight], schema.weight)
        if schema.user is not None and schema.user in rows:
            arrays["user"] = numbers_of(
                rows[schema.user], schema.user, lambda value: user_number(canonical_text(value))
            )
        return arrays

    def encode_inputs(self, rows: Mapping[str, Column], num_rows: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The features alone; a column of one value holds for every row and is encoded once.

        **Shape**: columns of length ``B`` or 1 → ``ids (B, S)``, ``dense (B, G)``.

        Args:
            rows, num_rows: column name → values, for every raw column of the features; and ``B``.

        Raises:
            SchemaError: a column is missing or of another length, or a value has a type that cannot be encoded.

        Example:
            >>> schema = Schema((Feature("user", num_ids=3), Feature("item", num_ids=3)), domains=("app",))
            >>> rows = {"user": ["u"], "item": ["a", "b"]}
            >>> Encoder(schema, {"user": ["u"], "item": ["a"]}).encode_inputs(rows, 2)[0].tolist()
            [[2, 2], [2, 1]]
        """
        for name in self.schema.columns:
            if self._length(rows, name) not in (1, num_rows):
                raise SchemaError(f"column {name!r} must have one value, or {num_rows}", received=len(rows[name]))
        for feature in self.schema.categorical:
            if len({len(rows[name]) for name in feature.sources}) > 1:  # a cross needs all of them in every row
                one = [name for name in feature.sources if len(rows[name]) == 1]
                rows = {**rows, **{name: [*rows[name]] * num_rows for name in one}}
        return self._all_ids(rows, num_rows), self._all_dense(rows, num_rows)

    def id_of(self, feature: Feature) -> Number:
        """The function from a raw value to its id: of a sequence one element, of a crossed feature a tuple.

        Example:
            >>> schema = Schema((Feature("pair", columns=("x", "y"), num_ids=3),), domains=("app",))
            >>> number = Encoder(schema, {"pair": ["a\\x1f7"]}).id_of(schema.features[0])
            >>> number(("a", 7.0)), number(("a", None)), number((None, None))
            (2, 1, 0)
        """
        if feature.kind == "bucketed":
            return lambda value: int(bucket([value], feature)[0])
        if feature.kind == "numeric":
            raise SchemaError("a numeric feature has no ids", received=feature.name)
        text = crossed_text if len(feature.sources) > 1 else canonical_text
        if feature.hash_buckets:
            return lambda value: hash_id(text(value), feature.hash_buckets)
        ids = self._ids[feature.share or feature.name]
        return lambda value: ids.get(text(value), OOV_ID)

    def domain_number(self, value: Any) -> int:
        """The number of the domain that a raw value names, or a tuple of the values of several columns.

        Raises:
            UnknownDomainError: there is no such domain and the schema says ``error``.
        """
        text = domain_text(value) if isinstance(value, tuple) else canonical_text(value)
        number = self._domains.get(text)
        if number is not None:
            return number
        if self.schema.unknown_domain == "base":
            return UNKNOWN_DOMAIN
        if self.schema.unknown_domain == "error":
            raise UnknownDomainError(
                f"column {self.schema.domain!r} must name a domain that was prepared",
                received=value,
                # on a request path: a guess among ten thousand names takes a third of a second
                next_step=nearest(text[:100], islice(self._domains, 200)),
            )
        return self.schema.domains.index(self.schema.unknown_domain)

    def _all_ids(self, rows: Mapping[str, Column], num_rows: int) -> NDArray[np.int64]:
        ids = np.empty((num_rows, self.schema.num_slots), dtype=np.int64)
        slot = 0
        for feature in self.schema.categorical:
            ids[:, slot : slot + feature.max_length] = self._feature_ids(feature, rows)
            slot += feature.max_length
        return ids

    def _feature_ids(self, feature: Feature, rows: Mapping[str, Column]) -> NDArray[np.int64]:
        """The ids of one feature ``(B, max_length)``."""
        name = feature.sources[0]
        if feature.kind == "bucketed":
            return bucket(rows[name], feature)[:, None]
        if feature.kind == "sequence":
            return sequences_of(rows[name], name, self.id_of(feature), feature.max_length, feature.separator)
        return _numbers(rows, feature.sources, self.id_of(feature))[:, None]

    def _all_dense(self, rows: Mapping[str, Column], num_rows: int) -> NDArray[np.float32]:
        dense = np.empty((num_rows, self.schema.num_dense), dtype=np.float32)
        position = 0
        for feature in self.schema.numeric:
            numbers = floats_of(rows[feature.sources[0]], feature.sources[0])
            dense[:, position] = standardise(numbers, feature)
            if feature.missing:
                dense[:, position + 1] = np.isnan(numbers)
            position += feature.num_dense
        return dense

    def _domain_columns(self, rows: Mapping[str, Column]) -> tuple[str, ...]:
        """The columns that name the domain of these rows."""
        name = self.schema.domain
        parts = tuple(name.split("/"))
        return parts if name not in rows and all(part in rows for part in parts) else (name,)

    def _check(self, rows: Mapping[str, Column], domain: Sequence[str]) -> int:
        """Number of rows, after a look at names and lengths."""
        schema = self.schema
        required = dict.fromkeys([*schema.columns, *domain])
        optional = [name for name in (schema.label, schema.user, schema.weight) if name is not None and name in rows]
        lengths = {name: self._length(rows, name) for name in [*required, *optional]}
        if len(set(lengths.values())) > 1:
            raise SchemaError("columns must be equally long", received=lengths)
        return lengths[domain[0]]

    def _length(self, rows: Mapping[str, Column], name: str) -> int:
        """Of a column, which must be there."""
        if name not in rows:
            raise SchemaError(f"rows need a column {name!r}", received=sorted(rows), next_step=nearest(name, rows))
        column: Any = rows[name]
        flat = getattr(column, "ndim", 1) == 1 or (column.ndim == 2 and name in self._lists)
        if isinstance(column, str | bytes | Mapping | set) or not hasattr(column, "__len__") or not flat:
            raise SchemaError(f"column {name!r} must be a list with one value a row", received=type(column).__name__)
        return len(column)

    def fingerprint(self) -> str:
        """sha256 over schema and vocabularies: equal if and only if every row is encoded alike."""
        return hashlib.sha256(_json_bytes(f"{self.schema.to_json()}\n{self._vocabularies_json()}")).hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``schema.json`` and ``vocabularies.json`` into a folder that exists."""
        (folder / "schema.json").write_bytes(_json_bytes(self.schema.to_json()))
        (folder / "vocabularies.json").write_bytes(_json_bytes(self._vocabularies_json()))

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read what :meth:`save` wrote; of a bundle, the encoder of its default version.

        Raises:
            DataError: a file is missing or is not JSON.
            SchemaError: the files do not agree.
        """
        try:
            place = folder / _encoder_place(folder)
            schema = Schema.load(place / "schema.json")
            vocabularies = json.loads((place / "vocabularies.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(
                f"an encoder needs schema.json and vocabularies.json ({error})", received=str(folder)
            ) from error
        if not isinstance(vocabularies, dict) or not all(isinstance(words, list) for words in vocabularies.values()):
            raise DataError("vocabularies.json must hold one list a feature", received=str(folder))
        return cls(schema, vocabularies)

    def _vocabularies_json(self) -> str:
        return json.dumps(self.vocabularies, indent=0, sort_keys=True, ensure_ascii=False)


def _encoder_place(folder: Path) -> str:
    """Where in a folder the encoder is: a folder that holds several says so in its manifest."""
    manifest = folder / "manifest.json"
    facts = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    named = facts.get("encoder") if isinstance(facts, dict) else None
    return named if isinstance(named, str) and re.fullmatch(r"encoder@[0-9]+", named) else "."


def _numbers(rows: Mapping[str, Column], names: Sequence[str], number: Number) -> NDArray[np.int64]:
    """``number`` of each row's value, or of its tuple of values where there are several columns."""
    if len(names) == 1:
        return numbers_of(rows[names[0]], names[0], number)
    return crossed_numbers_of([rows[name] for name in names], names, number)


def _columns_of_lists(schema: Schema) -> set[str]:
    """The columns that only sequences read."""
    others = {source for feature in schema.features if feature.kind != "sequence" for source in feature.sources}
    return set(schema.columns) - others - {schema.domain, schema.label, schema.user, schema.weight}


def _index(feature: Feature, words: Sequence[str]) -> dict[str, int]:
    """Text → id, the absent text included."""
    crossed = len(feature.sources) - 1
    for word in words:
        if not isinstance(word, str) or not word.strip() or (not crossed and word != word.strip()):
            raise SchemaError(f"a word of feature {feature.name!r} must be a canonical text", received=word)
        if crossed and word.count(CROSS) < crossed:
            raise SchemaError(
                f"a word of feature {feature.name!r} must hold {len(feature.sources)} values", received=word
            )
    ids = {word: FIRST_ID + position for position, word in enumerate(words)}
    if len(ids) < len(words):
        raise SchemaError(f"the vocabulary of feature {feature.name!r} repeats a word")
    if len(words) + FIRST_ID != feature.num_ids:
        raise SchemaError(
            f"feature {feature.name!r} needs a vocabulary of num_ids - {FIRST_ID} = {feature.num_ids - FIRST_ID} words",
            received=len(words),
        )
    return {"": PAD_ID, **ids}


def _check_feature(feature: Feature, owner: Feature) -> None:
    """That a feature without a vocabulary of its own can be encoded."""
    if len(feature.sources) != len(owner.sources):
        raise SchemaError(
            f"features {feature.name!r} and {owner.name!r} share ids, so they must read equally many columns",
            received=(len(feature.sources), len(owner.sources)),
        )
    bounds = (-math.inf, *feature.boundaries, math.inf)
    if not all(low < high for low, high in pairwise(bounds)):
        raise SchemaError(
            f"the boundaries of feature {feature.name!r} must be finite and ascending", received=feature.boundaries
        )
    buckets = len(feature.boundaries) + 1 if feature.kind == "bucketed" else feature.hash_buckets
    if buckets and feature.num_ids != FIRST_ID + buckets:
        raise SchemaError(
            f"feature {feature.name!r} needs num_ids of {buckets} buckets + {FIRST_ID}", received=feature.num_ids
        )


def _complete(column: Column, name: str) -> NDArray[np.float32]:
    """A column of labels or weights, which may not be absent."""
    with np.errstate(over="ignore"):
        numbers = floats_of(column, name).astype(np.float32)
    if not np.isfinite(numbers).all():
        raise SchemaError(f"column {name!r} needs a finite number in every row")
    return numbers


def _json_bytes(text: str) -> bytes:
    return text.encode("utf-8", errors="backslashreplace")  # half a surrogate pair as JSON escapes it
