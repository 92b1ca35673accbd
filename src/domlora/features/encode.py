"""Raw value to id: the one encoder that preparation offline and the server online share."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from domlora.errors import DataError, SchemaError, nearest
from domlora.features.schema import FIRST_ID, OOV_ID, PAD_ID, Feature, Schema

if TYPE_CHECKING:
    from domlora.features.batch import Batch

__all__ = [
    "ABSENT_USER",
    "UNKNOWN_DOMAIN",
    "Encoder",
    "canonical_text",
    "fit_numeric",
    "fit_vocabulary",
    "standardise",
    "user_number",
]

UNKNOWN_DOMAIN = -1
"""``Batch.domain`` of a row whose domain is absent or was not prepared."""
ABSENT_USER = -1
"""``Batch.user`` of a row without a user."""

_LARGEST = float(np.finfo(np.float32).max)

Column = Sequence[Any] | NDArray[Any]


def canonical_text(value: object) -> str:
    """The text that stands for a raw value wherever values are compared: categorical values, domains and users.

    * absent (``None``, NaN, empty or blank text): ``""``
    * text: without surrounding white space
    * boolean, integer, whole float or decimal: the digits (``True`` → ``"1"``, ``3.0`` → ``"3"``), exact at any size
    * any other float or decimal: the shortest text that reads back as the same float64

    Values that Python calls equal (``True == 1 == 1.0``) get one text, so a column may change its number type
    between training and serving.

    Args:
        value: text, boolean, number (Python or numpy) or None.

    Raises:
        SchemaError: any other type, or an integer above 4300 digits.

    Example:
        >>> [canonical_text(v) for v in (" M ", 3.0, 0.5, True, None, float("nan"))]
        ['M', '3', '0.5', '1', '', '']
    """
    if isinstance(value, str):
        return value.strip()
    if value is None:
        return ""
    if isinstance(value, np.generic):
        value = value.item()
    try:
        if isinstance(value, int):
            return str(int(value))  # int() turns True into 1
        if isinstance(value, float | Decimal):
            return _text_of_float(value)
    except ValueError as error:  # more digits than Python is willing to print
        raise SchemaError(f"an integer cannot be written as text ({error})") from error
    raise SchemaError(
        "a value must be text, a number, a boolean or null", received=value, next_step="Send one plain value a row"
    )


def _text_of_float(value: float | Decimal) -> str:
    if value != value:
        return ""
    if abs(value) != float("inf") and value == int(value):
        return str(int(value))
    return repr(float(value))


def user_number(text: str) -> int:
    """A number for a user that every engine can compute alike: the first 63 bits of the md5 of its canonical text.

    >>> user_number("42"), user_number("")
    (5830019068027025811, -1)
    """
    if not text:
        return ABSENT_USER
    return int(hashlib.md5(_utf8(text), usedforsecurity=False).hexdigest()[:16], 16) >> 1


def fit_vocabulary(name: str, sizes: Iterable[tuple[Any, int]]) -> list[str]:
    """The words of a categorical feature in the order of their ids: frequent first, equally frequent ones by text.

    Args:
        name: of the feature, for messages.
        sizes: raw values, each with the number of training rows that have it. Absent values and those that no training
            row has are no words.

    Raises:
        SchemaError: a value that has no canonical text.

    Example:
        >>> fit_vocabulary("item", [("b", 2), (3, 1), ("3 ", 1), ("c", 9), (None, 4), ("rare", 0)])
        ['c', '3', 'b']
    """
    counts = Counter[str]()
    for value, size in sizes:
        try:
            counts[canonical_text(value)] += size
        except SchemaError as error:
            raise SchemaError(f"column {name!r} cannot be encoded: {str(error).removesuffix('.')}") from error
    return sorted((word for word in counts if word and counts[word]), key=lambda word: (-counts[word], word))


def fit_numeric(name: str, sizes: Iterable[tuple[Any, int]]) -> Feature:
    """A numeric feature with mean and standard deviation (of the population) over the training rows.

    The sums are exact, so the order of rows cannot change a bit. Absent values, and those that no float32 holds, are
    left out; a feature that never changes gets std 1.

    Args:
        name: of the feature.
        sizes: raw numbers, each with the number of training rows that have it.

    Example:
        >>> fit_numeric("age", [(2, 1), (4, 1), (None, 7)])
        Feature(name='age', kind='numeric', num_ids=0, mean=3.0, std=1.0)
    """
    usable = [(float(value), size) for value, size in sizes if value is not None and abs(value) <= _LARGEST]
    total = sum(size for _, size in usable) or 1
    mean = math.fsum(value * size for value, size in usable) / total
    variance = math.fsum(size * (value - mean) ** 2 for value, size in usable) / total
    return Feature(name, "numeric", mean=mean, std=math.sqrt(variance) or 1.0)


def standardise(values: Column, feature: Feature) -> NDArray[np.float32]:
    """``(x - mean) / std`` in float64, rounded to float32; 0 where x is absent or the result is not finite.

    Args:
        values: numbers, texts of numbers, or absent values (as in :func:`canonical_text`).
        feature: the numeric feature whose mean and std to use.

    Raises:
        SchemaError: a value that is not a number.

    Example:
        >>> standardise([1.0, None, "5"], Feature("age", "numeric", mean=3.0, std=2.0)).tolist()
        [-1.0, 0.0, 1.0]
    """
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = ((_floats(values, feature.name) - feature.mean) / feature.std).astype(np.float32)
    scaled[~np.isfinite(scaled)] = 0.0
    return scaled


class Encoder:
    """Raw rows to a :class:`Batch`, with the vocabularies of the training split.

    A categorical value ``v`` becomes ``FIRST_ID + position of canonical_text(v)`` in the vocabulary, ``PAD_ID`` when it is
    absent, ``OOV_ID`` when it is not in the vocabulary. A domain becomes its position in ``schema.domains``, or
    ``UNKNOWN_DOMAIN``. A numeric value is standardised (:func:`standardise`). Rows may be encoded by many threads at once.

    Args:
        schema: the columns; ``num_ids`` of a categorical feature must be the length of its vocabulary + ``FIRST_ID``.
        vocabularies: for each categorical feature the canonical texts, in the order of their ids.

    Raises:
        SchemaError: vocabularies and schema do not agree, or a word is absent, repeated or not canonical.

    Example:
        >>> schema = Schema((Feature("item", num_ids=4),), domains=("app", "web"))
        >>> batch = Encoder(schema, {"item": ["42", "7"]}).encode({"item": [7, "42 ", 8, None], "domain": ["web"] * 4})
        >>> batch.ids.tolist(), batch.domain.tolist()
        ([[3], [2], [1], [0]], [1, 1, 1, 1])
    """

    def __init__(self, schema: Schema, vocabularies: Mapping[str, Sequence[str]]) -> None:
        names = [feature.name for feature in schema.categorical]
        for name in [*vocabularies, *names]:
            if name not in vocabularies or name not in names:
                raise SchemaError(
                    "every categorical feature needs one vocabulary", received=name, next_step=nearest(name, names)
                )
        self.schema = schema
        self.vocabularies = {name: tuple(vocabularies[name]) for name in names}
        self._ids = {feature.name: _index(feature, self.vocabularies[feature.name]) for feature in schema.categorical}
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
            rows: column name → values. The features and the domain are required; without the label column, labels are 0;
                user and weight appear in the result only when the schema names them and the rows hold them.
                Other columns are ignored.

        Raises:
            SchemaError: a column is missing, columns differ in length, or a value has a type that cannot be encoded.
        """
        schema = self.schema
        num_rows = self._check(rows)
        ids = np.empty((num_rows, schema.num_slots), dtype=np.int64)
        for slot, feature in enumerate(schema.categorical):
            ids[:, slot] = _lookup(rows, feature.name, self._ids[feature.name], OOV_ID)
        dense = np.empty((num_rows, schema.num_dense), dtype=np.float32)
        for position, feature in enumerate(schema.numeric):
            dense[:, position] = standardise(rows[feature.name], feature)
        arrays: dict[str, NDArray[Any]] = {
            "ids": ids,
            "dense": dense,
            "domain": _lookup(rows, schema.domain, self._domains, UNKNOWN_DOMAIN),
            "label": _complete(rows[schema.label], schema.label)
            if schema.label in rows
            else np.zeros(num_rows, np.float32),
        }
        if schema.weight in rows and schema.weight is not None:
            arrays["weight"] = _complete(rows[schema.weight], schema.weight)
        if schema.user in rows and schema.user is not None:
            arrays["user"] = _each(rows, schema.user, lambda value: user_number(canonical_text(value)))
        return arrays

    def _check(self, rows: Mapping[str, Column]) -> int:
        """Number of rows, after a look at names and lengths."""
        required = [*(feature.name for feature in self.schema.features), self.schema.domain]
        optional = [self.schema.label, self.schema.user, self.schema.weight]
        for name in required:
            if name not in rows:
                raise SchemaError(f"rows need a column {name!r}", received=sorted(rows), next_step=nearest(name, rows))
        lengths = {}
        for name in [*required, *(name for name in optional if name is not None and name in rows)]:
            column = rows[name]
            if isinstance(column, str | bytes) or not hasattr(column, "__len__") or getattr(column, "ndim", 1) != 1:
                raise SchemaError(
                    f"column {name!r} must be a list with one value a row", received=type(column).__name__
                )
            lengths[name] = len(column)
        if len(set(lengths.values())) > 1:
            raise SchemaError("columns must be equally long", received=lengths)
        return lengths[self.schema.domain]

    def fingerprint(self) -> str:
        """sha256 over schema and vocabularies: equal if and only if every row is encoded alike."""
        return hashlib.sha256(f"{self.schema.to_json()}\n{self._vocabularies_json()}".encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``schema.json`` and ``vocabularies.json`` into a folder that exists."""
        (folder / "schema.json").write_text(self.schema.to_json(), encoding="utf-8")
        (folder / "vocabularies.json").write_text(self._vocabularies_json(), encoding="utf-8")

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: a file is missing or is not JSON.
            SchemaError: the files do not agree.
        """
        try:
            schema = Schema.load(folder / "schema.json")
            vocabularies = json.loads((folder / "vocabularies.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(
                f"an encoder needs schema.json and vocabularies.json ({error})", received=str(folder)
            ) from error
        if not isinstance(vocabularies, dict):
            raise DataError("vocabularies.json must hold one list a feature", received=str(folder))
        return cls(schema, vocabularies)

    def _vocabularies_json(self) -> str:
        return json.dumps(self.vocabularies, indent=0, sort_keys=True, ensure_ascii=False)


def _index(feature: Feature, words: Sequence[str]) -> dict[str, int]:
    """Text → id, the absent text included."""
    for word in words:
        if not word or not isinstance(word, str) or word != word.strip():
            raise SchemaError(f"a word of feature {feature.name!r} must be a canonical text", received=word)
    ids = {word: FIRST_ID + position for position, word in enumerate(words)}
    if len(ids) < len(words):
        raise SchemaError(f"the vocabulary of feature {feature.name!r} repeats a word")
    if len(words) + FIRST_ID != feature.num_ids:
        raise SchemaError(
            f"feature {feature.name!r} needs a vocabulary of num_ids - {FIRST_ID} = {feature.num_ids - FIRST_ID} words",
            received=len(words),
        )
    return {"": PAD_ID, **ids}


def _lookup(rows: Mapping[str, Column], name: str, numbers: Mapping[str, int], other: int) -> NDArray[np.int64]:
    return _each(rows, name, lambda value: numbers.get(canonical_text(value), other))


class _Memo(dict[Any, int]):
    """Calls ``number`` once for each distinct value."""

    def __init__(self, number: Callable[[Any], int]) -> None:
        super().__init__()
        self.number = number

    def __missing__(self, value: Any) -> int:
        answer = self[value] = self.number(value)
        return answer


def _each(rows: Mapping[str, Column], name: str, number: Callable[[Any], int]) -> NDArray[np.int64]:
    """``number`` of each value of a column, computed once for each distinct value."""
    column = rows[name]
    values = column.tolist() if isinstance(column, np.ndarray) else column  # a dict is faster on Python's own numbers
    try:
        return np.fromiter(map(_Memo(number).__getitem__, values), np.int64, len(values))
    except SchemaError as error:
        raise SchemaError(f"column {name!r} cannot be encoded: {str(error).removesuffix('.')}") from error
    except TypeError as error:  # a list or an object in a cell has no hash
        raise SchemaError(f"column {name!r} needs one plain value a row ({error})") from error


def _floats(column: Column, name: str) -> NDArray[np.float64]:
    """A column of numbers as float64, absent values as NaN."""
    if isinstance(column, np.ndarray) and column.dtype.kind in "biuf":
        return column.astype(np.float64)
    return np.fromiter((_float(value, name) for value in column), np.float64, len(column))


def _float(value: Any, name: str) -> float:
    if type(value) is float:
        return value
    try:
        text = canonical_text(value)
        return float(text) if text else float("nan")
    except SchemaError as error:
        raise SchemaError(f"column {name!r} needs numbers: {str(error).removesuffix('.')}") from error
    except ValueError as error:
        raise SchemaError(f"column {name!r} needs numbers", received=value) from error


def _complete(column: Column, name: str) -> NDArray[np.float32]:
    """A column of labels or weights, which may not be absent."""
    numbers = _floats(column, name).astype(np.float32)
    if not np.isfinite(numbers).all():
        raise SchemaError(f"column {name!r} needs a finite number in every row")
    return numbers


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")  # JSON may hold half a surrogate pair
