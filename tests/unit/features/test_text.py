from __future__ import annotations

import hashlib
import unicodedata
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from fractions import Fraction
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domlora.errors import SchemaError
from domlora.features.schema import FIRST_ID
from domlora.features.text import canonical_text, crossed_text, domain_text, hash_id, user_number

MOMENT = datetime(2024, 2, 29, 12, 30, 1, 500)


class Colour(Enum):
    RED = 1


class Level(IntEnum):
    HIGH = 3


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (float("nan"), ""),
        (np.float32("nan"), ""),
        (Decimal("nan"), ""),
        (Decimal("sNaN"), ""),
        ("", ""),
        (" \t\u00a0\n", ""),
        ("  M ", "M"),
        ("a b", "a b"),
        ("3.0", "3.0"),
        ("NaN", "NaN"),
        (np.str_(" x"), "x"),
        (3, "3"),
        (-3, "-3"),
        (np.int8(-3), "-3"),
        (np.uint64(2**64 - 1), "18446744073709551615"),
        (2**53 + 1, "9007199254740993"),
        (10**30, "1" + "0" * 30),
        (Level.HIGH, "3"),
        (True, "1"),
        (False, "0"),
        (np.bool_(True), "1"),
        (3.0, "3"),
        (-0.0, "0"),
        (1e22, "10000000000000000000000"),
        (0.5, "0.5"),
        (0.1, "0.1"),
        (1e-7, "1e-07"),
        (np.float64(2.0), "2"),
        (np.float32(0.25), "0.25"),
        (float("inf"), "inf"),
        (float("-inf"), "-inf"),
        (Decimal("3.00"), "3"),
        (Decimal("0.5"), "0.5"),
        (Decimal("0.10"), "0.1"),
        (Decimal("-Infinity"), "-inf"),
        (Decimal("1e-400"), "0"),
        (date(2024, 2, 29), "2024-02-29"),
        (MOMENT, "2024-02-29T12:30:01.000500"),
        (MOMENT.replace(microsecond=0), "2024-02-29T12:30:01"),
        (MOMENT.replace(tzinfo=UTC), "2024-02-29T12:30:01.000500+00:00"),
        (MOMENT.replace(tzinfo=timezone(timedelta(hours=2))), "2024-02-29T10:30:01.000500+00:00"),
        (np.datetime64("2024-02-29"), "2024-02-29"),
        (np.datetime64("2024-02-29T12:30:01"), "2024-02-29T12:30:01"),
        (np.datetime64("2024-02-29T12:30:01.000500777"), "2024-02-29T12:30:01.000500"),
        (np.datetime64("NaT"), ""),
        (np.datetime64("NaT", "ns"), ""),
    ],
)
def test_canonical_text(value, text) -> None:
    assert canonical_text(value) == text


@pytest.mark.parametrize(
    "value",
    [
        b"x",
        np.bytes_(b"x"),
        bytearray(b"x"),
        [1],
        (1,),
        {},
        {1},
        object(),
        1j,
        Fraction(1, 2),
        Colour.RED,
        time(12),
        timedelta(1),
        np.timedelta64(5, "ns"),
        np.array([1]),
        datetime.min.replace(tzinfo=timezone(timedelta(hours=2))),
        np.datetime64("20000-01-01T00", "us"),
        pytest.param(10**5000, id="long"),
        pytest.param(Decimal("1e5000"), id="long decimal"),
        pytest.param(Decimal("1e999999"), id="endless decimal"),
    ],
)
def test_values_without_a_canonical_text(value) -> None:
    with pytest.raises(SchemaError):
        canonical_text(value)


def test_absent_values_of_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    assert (canonical_text(pandas.NA), canonical_text(pandas.NaT)) == ("", "")
    assert canonical_text(pandas.Timestamp("2024-02-29T12:30:01.000500777")) == "2024-02-29T12:30:01.000500"


@given(st.one_of(st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.booleans()))
def test_values_that_python_calls_equal_have_one_text(value) -> None:
    equals = [other for other in (float(value), Decimal(value)) if other == value]
    assert equals
    assert {canonical_text(other) for other in equals} == {canonical_text(value)}


ZONES = st.sampled_from([UTC, ZoneInfo("Europe/Berlin"), ZoneInfo("America/New_York"), timezone(timedelta(hours=-9))])


@given(st.datetimes(datetime(1971, 1, 1), datetime(2037, 1, 1)), ZONES, ZONES, st.sampled_from([0, 1]))
def test_equal_times_have_one_text(moment, zone, other, fold) -> None:
    moment = moment.replace(tzinfo=zone)
    for same in (moment.astimezone(other), moment.replace(fold=fold)):
        if same == moment:
            assert canonical_text(same) == canonical_text(moment)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_text_of_a_float_reads_back(value) -> None:
    assert float(canonical_text(value)) == value


@given(st.text(st.characters()))
def test_the_text_of_a_text_is_its_own(text) -> None:
    assert canonical_text(canonical_text(text)) == canonical_text(text)


def test_forms_of_unicode_are_told_apart() -> None:
    composed, combining = "é", unicodedata.normalize("NFD", "é")
    assert (canonical_text(composed), canonical_text(combining)) == (composed, combining)
    assert hash_id(composed, 1 << 40) != hash_id(combining, 1 << 40)


def test_crossed_text() -> None:
    assert crossed_text([" a ", 7.0, True]) == "a\x1f7\x1f1"
    assert crossed_text([None, 7]) == "\x1f7" != crossed_text([7, None]) == "7\x1f"
    assert crossed_text([None, float("nan"), " "]) == ""


def test_domain_text() -> None:
    assert domain_text([" US ", 7.0]) == "US/7"
    assert domain_text([" US "]) == "US"
    assert {domain_text(values) for values in (["US", None], [" ", 7], [None, None])} == {""}


# md5sum of the UTF-8 bytes, its first 15 digits as an integer modulo the buckets, + 2
@pytest.mark.parametrize(
    ("text", "digest", "small", "large"),
    [
        ("42", "a1d0c6e83f027327d8461063f4ac58a6", 228, 378228),
        ("\u00e9", "66ddcd97cfdeabb2f6fb8a999b4bc76f", 557, 58557),
        ("\u65e5\u672c", "4dbed2e657457884e67137d3514119b3", 338, 747338),
        ("de\x1f7", "d52c690ce9fcdb26e525d0fa326dd8f1", 612, 506612),
    ],
)
def test_hash_id_is_the_head_of_an_md5(text, digest, small, large) -> None:
    assert hashlib.md5(text.encode()).hexdigest() == digest
    assert (hash_id(text, 1000), hash_id(text, 1_000_000)) == (small, large)


@given(st.text(st.characters()), st.integers(1, 1 << 40))
def test_hash_ids_lie_in_their_buckets(text, buckets) -> None:
    assert FIRST_ID <= hash_id(text, buckets) < FIRST_ID + buckets or text == ""


def test_user_number_is_the_head_of_an_md5() -> None:
    # what any engine can compute: conv(substr(md5(text), 1, 16), 16, 10) without its lowest bit
    assert user_number("42") == int(hashlib.md5(b"42").hexdigest()[:16], 16) // 2
    assert 0 <= user_number("é") < 2**63
    assert user_number("") == -1
    assert user_number("\ud800") >= 0  # half a pair, as JSON may hold it
