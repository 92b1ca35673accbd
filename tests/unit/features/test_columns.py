from __future__ import annotations

from collections import Counter
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from domlora.errors import SchemaError
from domlora.features.columns import crossed_numbers_of, floats_of, numbers_of, sequences_of, values_of
from domlora.features.schema import PAD_ID


def length(value: object) -> int:
    return len(str(value))


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64, np.uint64, np.float32, np.bool_])
def test_values_are_those_of_python(kind) -> None:
    values = values_of(np.array([0, 1, 1], dtype=kind))
    assert [type(value) for value in values] == [type(kind(1).item())] * 3


def test_times_of_numpy_stay_times() -> None:
    values = values_of(np.array(["2024-02-29"], dtype="datetime64[ns]"))
    assert isinstance(values[0], np.datetime64)


@pytest.mark.parametrize("column", [[1, 2], (1, 2), np.array([1, 2]), pa.array([1, 2]), pa.chunked_array([[1], [2]])])
def test_columns_of_many_kinds(column) -> None:
    assert list(values_of(column)) == [1, 2]


def test_each_distinct_value_is_asked_once() -> None:
    asked = Counter[object]()

    def number(value: object) -> int:
        asked[value] += 1
        return length(value)

    assert numbers_of(["a", "bb", "a", 1, True, 1.0], "x", number).tolist() == [1, 2, 1, 1, 1, 1]
    assert asked == {"a": 1, "bb": 1, 1: 1}


@given(
    arrays.arrays(
        st.sampled_from([np.int8, np.uint8, np.int16, np.int64, np.uint64]),
        st.integers(1, 600),
        fill=st.nothing(),
    )
)
def test_integers_of_numpy_give_what_lists_give(column) -> None:
    for given_column in (column, np.resize(column, 700), np.resize(column, 1400)[::2], column % 7):
        found = numbers_of(given_column, "x", length)
        assert found.dtype == np.int64
        assert found.tolist() == numbers_of(given_column.tolist(), "x", length).tolist()


def test_integers_at_the_end_of_their_range() -> None:
    for kind in (np.int64, np.uint64, np.int8):
        for end in (np.iinfo(kind).min, np.iinfo(kind).max):
            column = np.full(300, end, dtype=kind)
            assert numbers_of(column, "x", length).tolist() == [len(str(end))] * 300


def test_cells_that_hold_no_plain_value() -> None:
    with pytest.raises(SchemaError, match="column 'x' must hold one plain value a row"):
        numbers_of([[1]], "x", length)
    with pytest.raises(SchemaError, match="columns 'x', 'y' must hold one plain value a row"):
        crossed_numbers_of([[1], [{}]], ["x", "y"], length)
    with pytest.raises(SchemaError, match="column 'x' must hold plain values in its lists"):
        sequences_of([[1, [2]]], "x", length, 3)


def identity(value: object) -> int:
    return PAD_ID if value is None else int(str(value))


@pytest.mark.parametrize(
    ("cell", "ids"),
    [
        ([], [0, 0, 0]),
        (None, [0, 0, 0]),
        ([7], [7, 0, 0]),
        ([1, 2, 3], [1, 2, 3]),
        ((1, 2, 3, 4), [2, 3, 4]),
        ([None, 1, None, 2, None], [1, 2, 0]),
        ([1, 2, 3, None, None], [1, 2, 3]),
        ([9, 9, 9, 9], [9, 9, 9]),
        (np.array([5, 6]), [5, 6, 0]),
        ("5|6", [5, 6, 0]),
        ("12", [12, 0, 0]),
        (5, [5, 0, 0]),
        (["5", 6], [5, 6, 0]),
    ],
)
def test_sequences(cell, ids) -> None:
    assert sequences_of([[4], cell], "x", identity, 3, "|").tolist() == [[4, 0, 0], ids]


def test_sequences_without_rows_or_separator() -> None:
    assert sequences_of([], "x", identity, 3).shape == (0, 3)
    assert sequences_of(["ab c", ""], "x", lambda value: len(value) or PAD_ID, 2).tolist() == [[4, 0], [0, 0]]


@given(st.lists(st.one_of(st.none(), st.lists(st.one_of(st.none(), st.integers(1, 9))))), st.integers(1, 5))
def test_sequences_hold_the_last_present_elements(column, max_length) -> None:
    found = sequences_of(column, "x", identity, max_length)
    for cell, ids in zip(column, found.tolist(), strict=True):
        last = [value for value in cell or () if value is not None][-max_length:]
        assert ids == last + [PAD_ID] * (max_length - len(last))


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        (True, 1.0),
        ("  7 ", 7.0),
        ("-2.5e3", -2500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("+inf", np.inf),
        ("nan", np.nan),
        ("", np.nan),
        (None, np.nan),
        (2**53 + 1, float(2**53 + 1)),
        pytest.param(10**400, np.inf, id="huge"),
        (Decimal("0.3"), 0.3),
        (Decimal("nan"), np.nan),
        (np.float32(0.1), float(np.float32(0.1))),
        (np.int8(-1), -1.0),
    ],
)
def test_floats(value, number) -> None:
    for column in ([value], [value, "1"], [value, 2.0], np.array([value, None], dtype=object)):
        np.testing.assert_equal(floats_of(column, "x")[0], number)


@pytest.mark.parametrize("value", ["old", "1_000", "1,5", "0x10", "\u0663", "1 2", "infinity", b"1", [1]])
def test_what_is_no_number(value) -> None:
    with pytest.raises(SchemaError, match="'x' needs numbers"):
        floats_of([1, value], "x")


def test_dates_are_no_numbers() -> None:
    with pytest.raises(SchemaError, match="'x' needs numbers"):
        floats_of(np.array(["2024-02-29"], dtype="datetime64[ns]"), "x")


@given(st.lists(st.one_of(st.none(), st.integers(-(2**70), 2**70), st.floats(), st.booleans())))
def test_floats_of_a_column_are_those_of_its_cells(column) -> None:
    found = floats_of(column, "x")
    np.testing.assert_array_equal(found, np.array([floats_of([value, "0"], "x")[0] for value in column]))
    np.testing.assert_array_equal(found, floats_of(np.array([*column, None], dtype=object), "x")[:-1])
