"""The text that stands for a raw value, and the numbers that are hashes of it: equal on every engine and online."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import numpy as np

from domlora.errors import SchemaError
from domlora.features.schema import FIRST_ID, PAD_ID

__all__ = ["ABSENT_USER", "CROSS", "canonical_text", "crossed_text", "domain_text", "hash_id", "user_number"]

ABSENT_USER = -1
"""``Batch.user`` of a row without a user."""
CROSS = "\x1f"
"""What stands between the values of a crossed feature: the unit separator of ASCII."""

_HASH_DIGITS = 15  # of an md5, in hexadecimal: 60 bits, which every engine can hold
_MOST_DIGITS = 4300  # what Python is willing to print of an integer


def canonical_text(value: object) -> str:
    """The text that stands for a raw value wherever values are compared: categorical values, domains and users.

    * absent (``None``, NaN, NaT, the NA of pandas, empty or blank text): ``""``
    * text: without surrounding white space, and no other change (letter case and Unicode forms stay)
    * boolean, integer, whole float or decimal: the digits (``True`` → ``"1"``, ``3.0`` → ``"3"``), exact at any size
    * any other float or decimal: the shortest text that reads back as the same float64
    * date, or date with time: as ISO 8601 writes it, to the microsecond; one with a time zone in UTC

    Values that Python calls equal (``True == 1 == 1.0``) get one text, so a column may change its number type
    between training and serving. Text stays text: ``"1.0"`` is not 1.

    Args:
        value: text, boolean, number, date (Python's or numpy's) or None.

    Raises:
        SchemaError: any other type, bytes among them, or an integer above 4300 digits.

    Example:
        >>> [canonical_text(v) for v in (" M ", 3.0, 0.5, True, None, float("nan"), date(2024, 2, 29))]
        ['M', '3', '0.5', '1', '', '', '2024-02-29']
    """
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, np.generic):
        value = _of_python(value)
    if value is None:
        return ""
    try:
        if isinstance(value, int):
            return str(int(value))  # int() turns True into 1
        if isinstance(value, float):
            return _text_of_float(value)
        if isinstance(value, Decimal):
            return _text_of_decimal(value)
        if isinstance(value, date):
            return _text_of_date(value)
    except (ValueError, OverflowError) as error:
        raise SchemaError(f"a number or date cannot be written as text ({error})") from error
    if type(value).__name__ == "NAType":  # by its name, so that pandas need not be there
        return ""
    raise SchemaError(
        "a value must be text, a number, a boolean, a date or null",
        received=value,
        next_step="Send one plain value a row",
    )


def crossed_text(values: Iterable[object]) -> str:
    """The text of a crossed feature: the canonical texts of its columns with :data:`CROSS` between them.

    Absent only where all are absent. A value that holds the separator itself may look like two.

    Example:
        >>> crossed_text(("de", 7)), crossed_text((None, 7)), crossed_text((None, " "))
        ('de\\x1f7', '\\x1f7', '')
    """
    texts = [canonical_text(value) for value in values]
    return CROSS.join(texts) if any(texts) else ""


def domain_text(values: Iterable[object]) -> str:
    """The name of the domain of a row that one or several columns tell; absent where one of them is.

    Example:
        >>> domain_text(["home", 3]), domain_text(["home", None]), domain_text([" app "])
        ('home/3', '', 'app')
    """
    texts = [canonical_text(value) for value in values]
    return "/".join(texts) if all(texts) else ""


def hash_id(text: str, hash_buckets: int) -> int:
    """The id of a canonical text without a vocabulary: ``FIRST_ID`` + the first 60 bits of its md5 modulo the buckets.

    Example:
        >>> hash_id("42", 1000), hash_id("42", 10), hash_id("", 10)
        (228, 8, 0)
    """
    return FIRST_ID + int(_md5(text)[:_HASH_DIGITS], 16) % hash_buckets if text else PAD_ID


def user_number(text: str) -> int:
    """A number for a user that every engine can compute alike: the first 63 bits of the md5 of its canonical text.

    >>> user_number("42"), user_number("")
    (5830019068027025811, -1)
    """
    return int(_md5(text)[:16], 16) >> 1 if text else ABSENT_USER


def _md5(text: str) -> str:
    # JSON may hold half a surrogate pair, which UTF-8 proper refuses
    return hashlib.md5(text.encode("utf-8", errors="surrogatepass"), usedforsecurity=False).hexdigest()


def _of_python(value: np.generic) -> Any:
    """The value as one of Python's own types, NaT as None; itself if there is none."""
    if isinstance(value, np.timedelta64):  # its item() may be a bare integer
        return value
    if not isinstance(value, np.datetime64):
        return value.item()
    if np.datetime_data(value.dtype)[0] in ("ns", "ps", "fs", "as"):
        value = value.astype("datetime64[us]")
    found = value.item()
    return value if isinstance(found, int) else found  # years that Python's dates do not reach


def _text_of_float(value: float) -> str:
    if value != value:
        return ""
    if value.is_integer():
        return str(int(value))
    return repr(float(value))


def _text_of_decimal(value: Decimal) -> str:
    if value.is_nan():
        return ""
    if value.is_infinite():
        return _text_of_float(float(value))
    if value.adjusted() >= _MOST_DIGITS:  # before int() works it out
        raise ValueError(f"it has more than {_MOST_DIGITS} digits")
    return str(int(value)) if value == int(value) else _text_of_float(float(value))


def _text_of_date(value: date) -> str:
    if value != value:  # the NaT of pandas
        return ""
    if not isinstance(value, datetime):
        return value.isoformat()
    if value.utcoffset() is not None:
        # equal times have one text; of an hour that comes twice Python calls both equal
        value = value.replace(fold=0).astimezone(UTC)
    return datetime.isoformat(value)  # that of a subclass may print nanoseconds
