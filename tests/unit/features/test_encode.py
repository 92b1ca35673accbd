from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from domlora.errors import DataError, SchemaError
from domlora.features.encode import Encoder, canonical_text, fit_numeric, fit_vocabulary, standardise, user_number
from domlora.features.schema import FIRST_ID, OOV_ID, PAD_ID, Feature, Schema

SCHEMA = Schema(
    (Feature("item", num_ids=5), Feature("age", "numeric", mean=30.0, std=10.0), Feature("site", num_ids=4)),
    domains=("1", "10"),
    domain="site",
    user="person",
    weight="w",
)
ENCODER = Encoder(SCHEMA, {"item": ["7", "M", "0.5"], "site": ["10", "1"]})
ROWS = {"item": ["M", 7, None], "age": [30, 40.0, None], "site": [1, "10 ", 3], "person": ["a", None, "b"]}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (float("nan"), ""),
        (np.float32("nan"), ""),
        (Decimal("nan"), ""),
        ("", ""),
        (" \t\u00a0\n", ""),
        ("  M ", "M"),
        ("a b", "a b"),
        ("3.0", "3.0"),
        (np.str_(" x"), "x"),
        (3, "3"),
        (-3, "-3"),
        (np.int8(-3), "-3"),
        (np.uint64(2**64 - 1), "18446744073709551615"),
        (2**53 + 1, "9007199254740993"),
        (10**30, "1" + "0" * 30),
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
        (Decimal("3.00"), "3"),
        (Decimal("0.5"), "0.5"),
        (Decimal("-Infinity"), "-inf"),
    ],
)
def test_canonical_text(value, text) -> None:
    assert canonical_text(value) == text


@pytest.mark.parametrize(
    "value", [b"x", [1], {}, object(), 1j, np.datetime64("2020-01-01"), pytest.param(10**5000, id="long")]
)
def test_values_without_a_canonical_text(value) -> None:
    with pytest.raises(SchemaError):
        canonical_text(value)


@given(st.one_of(st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.booleans()))
def test_values_that_python_calls_equal_have_one_text(value) -> None:
    equals = [other for other in (float(value), Decimal(value)) if other == value]
    assert equals
    assert {canonical_text(other) for other in equals} == {canonical_text(value)}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_text_of_a_float_reads_back(value) -> None:
    assert float(canonical_text(value)) == value


def test_user_number_is_the_head_of_an_md5() -> None:
    # what any engine can compute: conv(substr(md5(text), 1, 16), 16, 10) without its lowest bit
    assert user_number("42") == int(hashlib.md5(b"42").hexdigest()[:16], 16) // 2
    assert 0 <= user_number("é") < 2**63
    assert user_number("") == -1
    assert user_number("\ud800") >= 0  # half a pair, as JSON may hold it


def test_a_vocabulary_is_frequent_first_then_by_text() -> None:
    sizes = [("b", 1), (10, 1), ("10 ", 2), (9.0, 3), ("", 99), (None, 5), ("a", 1), ("unseen", 0)]
    assert fit_vocabulary("x", sizes) == ["10", "9", "a", "b"]
    with pytest.raises(SchemaError, match="'x' cannot be encoded"):
        fit_vocabulary("x", [([1], 1)])


def test_fit_numeric() -> None:
    values = [1.5, 2.5, 2.5, 7.0, -3.25]
    feature = fit_numeric(
        "x", [(1.5, 1), (2.5, 2), (Decimal(7), 1), (-3.25, 1), (None, 9), (1e300, 4), (float("inf"), 1)]
    )
    assert (feature.mean, feature.std) == (pytest.approx(np.mean(values)), pytest.approx(np.std(values)))
    assert abs(standardise(values, feature).mean()) < 1e-7
    assert fit_numeric("x", [(4, 3)]) == Feature("x", "numeric", mean=4.0, std=1.0)
    assert fit_numeric("x", []) == Feature("x", "numeric", mean=0.0, std=1.0)


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(1, 3)), min_size=1), st.randoms())
def test_statistics_do_not_hang_on_the_order_of_rows(sizes, random) -> None:
    shuffled = random.sample(sizes, len(sizes))
    assert fit_numeric("x", sizes) == fit_numeric("x", shuffled)


def test_encode() -> None:
    batch = ENCODER.encode(ROWS)
    assert batch.ids.tolist() == [[3, 3], [2, 2], [PAD_ID, OOV_ID]]
    assert batch.dense.tolist() == [[0.0], [1.0], [0.0]]
    assert batch.domain.tolist() == [0, 1, -1]
    assert batch.label.tolist() == [0.0, 0.0, 0.0]
    assert batch.user is not None
    assert batch.user.tolist() == [user_number("a"), -1, user_number("b")]
    assert batch.weight is None
    types = [column.dtype for column in (batch.ids, batch.dense, batch.domain, batch.label, batch.user)]
    assert types == [torch.int64, torch.float32, torch.int64, torch.float32, torch.int64]


@pytest.mark.parametrize("absent", [None, "", "  ", float("nan")])
def test_an_absent_value_is_padding_and_an_absent_domain_is_unknown(absent) -> None:
    batch = ENCODER.encode({"item": [absent], "age": [absent], "site": [absent], "person": [absent]})
    assert (batch.ids.tolist(), batch.dense.tolist(), batch.domain.tolist()) == ([[PAD_ID, PAD_ID]], [[0.0]], [-1])


def test_label_and_weight_are_read_when_they_are_there() -> None:
    batch = ENCODER.encode(ROWS | {"label": [1, 0, True], "w": ["0.5", 2, 1]})
    assert batch.label.tolist() == [1.0, 0.0, 1.0]
    assert batch.weight is not None
    assert batch.weight.tolist() == [0.5, 2.0, 1.0]


def test_numpy_columns_give_what_lists_give() -> None:
    rows = {
        "item": [7, 8, 0, 7],
        "age": [1.5, float("nan"), 2.0, 60.0],
        "site": [1.0, 10.0, float("nan"), 3.0],
        "person": ["a", "b", "a", ""],
    }
    arrays = {name: np.array(column) for name, column in rows.items()}
    objects = {name: np.array(column, dtype=object) for name, column in rows.items()}
    expected = ENCODER.encode_arrays(rows)
    for given_rows in (arrays, objects, {name: tuple(column) for name, column in rows.items()}):
        found = ENCODER.encode_arrays(given_rows)
        assert found.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])


def test_no_rows() -> None:
    batch = ENCODER.encode({"item": [], "age": [], "site": []})
    assert (batch.num_rows, tuple(batch.ids.shape), tuple(batch.dense.shape)) == (0, (0, 2), (0, 1))


def test_unknown_columns_are_ignored() -> None:
    assert ENCODER.encode(ROWS | {"other": [1]}).num_rows == 3


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([30, 40], [0.0, 1.0]),
        (["40", " 20 "], [1.0, -1.0]),
        ([None, float("inf")], [0.0, 0.0]),
        ([1e300, -1e300], [0.0, 0.0]),  # beyond float32
        pytest.param([10**400, True], [0.0, np.float32(-2.9)], id="huge"),
        (np.array([40, 50], dtype=np.uint8), [1.0, 2.0]),
        (np.array([40.0, np.nan], dtype=np.float32), [1.0, 0.0]),
    ],
)
def test_standardise(values, expected) -> None:
    found = standardise(values, SCHEMA.numeric[0])
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item": [[1], 2, 3]}, "'item' needs one plain value a row"),
        ({"item": [b"x", 2, 3]}, "'item'.*must be text, a number"),
        ({"item": "abc"}, "'item' must be a list"),
        ({"item": np.zeros((3, 1))}, "'item' must be a list"),
        ({"item": iter([1, 2, 3])}, "'item' must be a list"),
        ({"item": [1, 2]}, r"equally long.*'item': 2"),
        ({"person": [1, 2]}, r"equally long.*'person': 2"),
        ({"age": [1, "old", 3]}, "'age' needs numbers. Received: 'old'"),
        pytest.param({"age": [1, 10**5000, 3]}, "'age' needs numbers: an integer", id="long"),
        ({"age": [1, [2], 3]}, "'age' needs numbers: a value must be"),
        ({"label": [1, None, 0]}, "'label' needs a finite number"),
        ({"w": [1, float("inf"), 0]}, "'w' needs a finite number"),
    ],
)
def test_rows_that_cannot_be_encoded(change, message) -> None:
    with pytest.raises(SchemaError, match=message):
        ENCODER.encode(ROWS | change)


def test_a_missing_column_is_named_with_the_nearest() -> None:
    rows = {"itm" if name == "item" else name: column for name, column in ROWS.items()}
    with pytest.raises(SchemaError, match=r"'item'.*Did you mean 'itm'"):
        ENCODER.encode(rows)
    with pytest.raises(SchemaError, match="'site'"):
        ENCODER.encode({"item": [1], "age": [1]})


@pytest.mark.parametrize(
    ("vocabularies", "message"),
    [
        ({"item": ["7", "M", "0.5"]}, "one vocabulary. Received: 'site'"),
        ({"item": ["7", "M", "0.5"], "site": ["10", "1"], "sight": []}, "Did you mean 'site'"),
        ({"item": ["7", "M"], "site": ["10", "1"]}, "'item' needs a vocabulary of num_ids - 2 = 3 words. Received: 2"),
        ({"item": ["7", "M", "M"], "site": ["10", "1"]}, "'item' repeats"),
        ({"item": ["7", "M", " x"], "site": ["10", "1"]}, "canonical text. Received: ' x'"),
        ({"item": ["7", "M", ""], "site": ["10", "1"]}, "canonical text"),
        ({"item": ["7", "M", 5], "site": ["10", "1"]}, "canonical text. Received: 5"),
    ],
)
def test_vocabularies_that_do_not_fit(vocabularies, message) -> None:
    with pytest.raises(SchemaError, match=message):
        Encoder(SCHEMA, vocabularies)


@pytest.mark.parametrize("domains", [("a", " a"), ("a", "")])
def test_domains_that_rows_could_not_name(domains) -> None:
    with pytest.raises(SchemaError, match="domain names"):
        Encoder(Schema((Feature("x", num_ids=2),), domains), {"x": []})


def test_save_and_open(tmp_path) -> None:
    ENCODER.save(tmp_path)
    again = Encoder.open(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["schema.json", "vocabularies.json"]
    assert again.schema == SCHEMA
    assert again.vocabularies == ENCODER.vocabularies
    assert again.fingerprint() == ENCODER.fingerprint()
    assert torch.equal(again.encode(ROWS).ids, ENCODER.encode(ROWS).ids)


def test_the_fingerprint_sees_the_order_of_words() -> None:
    other = Encoder(SCHEMA, {"item": ["M", "7", "0.5"], "site": ["10", "1"]})
    assert other.fingerprint() != ENCODER.fingerprint()


@pytest.mark.parametrize("damage", ["schema.json", "vocabularies.json"])
def test_a_folder_without_an_encoder(tmp_path, damage) -> None:
    ENCODER.save(tmp_path)
    (tmp_path / damage).unlink()
    with pytest.raises(DataError, match=damage):
        Encoder.open(tmp_path)


def test_vocabularies_that_are_not_json(tmp_path) -> None:
    ENCODER.save(tmp_path)
    for text in ("{", json.dumps(["7"])):
        (tmp_path / "vocabularies.json").write_text(text)
        with pytest.raises(DataError):
            Encoder.open(tmp_path)


def test_arrays_need_neither_torch_nor_a_columnar_library() -> None:
    program = (
        "import sys; from domlora.features.encode import Encoder; from domlora.features.schema import *;"
        "e = Encoder(Schema((Feature('x', num_ids=3),), ('a',)), {'x': ['7']});"
        "assert e.encode_arrays({'x': [7], 'domain': ['a']})['ids'].tolist() == [[2]];"
        "print([m for m in ('torch', 'pyarrow', 'pandas', 'ibis', 'duckdb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ids_stay_exact_above_2_to_24() -> None:
    words = [str(2**60 + number) for number in range(3)]
    encoder = Encoder(Schema((Feature("x", num_ids=5),), ("a",)), {"x": words})
    rows = {"x": [2**60 + 2, float(2**60), 2**60 + 3], "domain": ["a"] * 3}
    assert encoder.encode(rows).ids[:, 0].tolist() == [FIRST_ID + 2, FIRST_ID, OOV_ID]
