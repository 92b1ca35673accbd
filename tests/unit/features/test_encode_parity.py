"""However rows come, a batch or one by one, in lists or arrays, as text or numbers: the encoder says the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domlora.features.encode import Encoder
from domlora.features.schema import FIRST_ID, Feature, Schema

ODD = [
    *(None, "", " ", float("nan"), float("inf"), float("-inf"), 0, -0.0, 1, True, 1.0, "1", "1.0", " 7 ", 7, "07"),
    *(10**30, 2**53 + 1, float(2**53), "\u00e9", "e\u0301", "\ud800", "a\x1fb", "x|y", 0.5, "0.5", 0.1, -3),
]
RAW = st.one_of(st.sampled_from(ODD), st.integers(), st.floats(), st.text(st.characters(), max_size=3), st.booleans())
NUMBER = st.one_of(
    st.none(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.booleans(),
    st.sampled_from(["", " 7 ", "1e3", "-.5", "inf"]),
)
LIST = st.one_of(st.none(), st.lists(RAW, max_size=6), st.text(st.sampled_from("ab|17 "), max_size=6), RAW)
ROW = st.fixed_dictionaries({"c": RAW, "d": RAW, "n": NUMBER, "s": LIST, "user": RAW, "domain": RAW})
ROWS = st.lists(ROW, min_size=1, max_size=12)

SCHEMA = Schema(
    (
        Feature("c", num_ids=FIRST_ID + 8),
        Feature("s", "sequence", num_ids=FIRST_ID + 8, share="c", max_length=3, separator="|"),
        Feature("crossed", columns=("c", "d"), num_ids=FIRST_ID + 3),
        Feature("hashed", columns=("d",), num_ids=FIRST_ID + 1000, hash_buckets=1000),
        Feature("both", columns=("d", "c"), num_ids=FIRST_ID + 1000, hash_buckets=1000),
        Feature("t", "sequence", columns=("s",), num_ids=FIRST_ID + 99, hash_buckets=99, max_length=2),
        Feature("band", "bucketed", columns=("n",), num_ids=FIRST_ID + 3, boundaries=(-0.5, 7.0)),
        Feature("n", "numeric", mean=0.5, std=3.0, missing=True),
        Feature("log", "numeric", columns=("n",), transform="log1p", mean=0.5, std=3.0),
    ),
    domains=("1", "7", "\u00e9"),
    user="user",
)
ENCODER = Encoder(
    SCHEMA,
    {
        "c": ["1", "7", "0.5", "\u00e9", "e\u0301", "\ud800", "inf", "9007199254740993"],
        "crossed": ["1\x1f1", "\x1f7", "7\x1f"],
    },
)


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def assert_equal(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


@given(ROWS)
def test_row_by_row_is_the_batch(rows) -> None:
    batch = ENCODER.encode_arrays(columns_of(rows))
    singles = [ENCODER.encode_arrays(columns_of([row])) for row in rows]
    assert_equal({name: np.concatenate([single[name] for single in singles]) for name in batch}, batch)


@given(ROWS)
def test_the_kind_of_column_does_not_matter(rows) -> None:
    columns = columns_of(rows)
    expected = ENCODER.encode_arrays(columns)
    assert_equal(ENCODER.encode_arrays({name: tuple(column) for name, column in columns.items()}), expected)
    objects = {name: np.empty(len(rows), dtype=object) for name in columns}
    for name, column in columns.items():
        objects[name][:] = column
    assert_equal(ENCODER.encode_arrays(objects), expected)


@given(st.lists(st.lists(RAW, max_size=5), min_size=1), st.integers(0, 3))
def test_lists_tuples_and_arrays_hold_the_same_elements(cells, rows) -> None:
    rest = {name: [None] * len(cells) for name in ("c", "d", "n", "domain")}
    expected = ENCODER.encode_arrays(rest | {"s": cells})
    assert_equal(ENCODER.encode_arrays(rest | {"s": [tuple(cell) for cell in cells]}), expected)
    assert_equal(ENCODER.encode_arrays(rest | {"s": [np.array(cell, dtype=object) for cell in cells]}), expected)


TYPED = [
    (pa.int64(), st.integers(-(2**63), 2**63 - 1) | st.integers(-9, 9)),
    (pa.uint8(), st.integers(0, 255)),
    (pa.float64(), st.floats() | st.sampled_from([1.0, 7.0, 0.5])),
    (pa.float32(), st.floats(width=32)),
    (pa.bool_(), st.booleans()),
]


@pytest.mark.parametrize(
    ("kind", "values"), TYPED, ids=lambda value: str(value) if isinstance(value, pa.DataType) else ""
)
@given(data=st.data())
def test_typed_columns_give_what_lists_give(kind, values, data) -> None:
    column = data.draw(st.lists(values, min_size=1, max_size=20))
    typed = pa.array(column, kind)
    rest = {name: [1] * len(column) for name in ("domain", "user")}
    lists = ENCODER.encode_arrays(rest | dict.fromkeys(("c", "d", "n", "s"), typed.to_pylist()))
    array = typed.to_numpy(zero_copy_only=False)
    for same in (typed, pa.chunked_array([typed]), array):
        assert_equal(ENCODER.encode_arrays(rest | dict.fromkeys(("c", "d", "n", "s"), same)), lists)
    many = np.resize(array, 1000)  # where integers of numpy are looked up in a table
    rest = {name: [1] * len(many) for name in ("domain", "user")}
    lists = ENCODER.encode_arrays(rest | dict.fromkeys(("c", "d", "n", "s"), many.tolist()))
    assert_equal(ENCODER.encode_arrays(rest | dict.fromkeys(("c", "d", "n", "s"), many)), lists)


@given(st.lists(st.integers() | st.booleans() | st.floats(allow_nan=False), min_size=1))
def test_a_column_may_become_text(values) -> None:
    # as CSV writes numbers: whole ones without a point
    texts = [f" {int(v)}" if v == v and abs(v) != float("inf") and v == int(v) else f"{float(v)!r} " for v in values]
    rest = {name: [1] * len(values) for name in ("domain", "user")}
    numbers, written = (
        ENCODER.encode_arrays(rest | {"c": column, "d": column, "n": column, "s": [[value] for value in column]})
        for column in (values, texts)
    )
    assert_equal(written, numbers)


@given(st.lists(st.integers(-5, 300), min_size=1, max_size=40))
def test_other_number_types_give_the_same_ids(values) -> None:
    rest = {name: [1] * len(values) for name in ("domain", "user")}
    expected = ENCODER.encode_arrays(rest | dict.fromkeys(("c", "d", "n", "s"), values))
    for column in (list(map(float, values)), np.array(values, np.int16), np.array(values, np.float32)):
        assert_equal(ENCODER.encode_arrays(rest | dict.fromkeys(("c", "d", "n", "s"), column)), expected)
