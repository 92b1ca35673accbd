from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

from domlora.errors import DataError, SchemaError, UnknownDomainError
from domlora.features.encode import UNKNOWN_DOMAIN, Encoder, fit_vocabulary, hash_id, user_number
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


def test_a_vocabulary_is_frequent_first_then_by_text() -> None:
    sizes = [("b", 1), (10, 1), ("10 ", 2), (9.0, 3), ("", 99), (None, 5), ("a", 1), ("unseen", 0)]
    assert fit_vocabulary("x", sizes) == ["10", "9", "a", "b"]
    with pytest.raises(SchemaError, match="'x' cannot be encoded"):
        fit_vocabulary("x", [([1], 1)])


def test_rare_values_are_no_words() -> None:
    sizes = [("a", 1), ("a ", 1), ("b", 1), (7, 2), (7.0, 1)]  # counted by their text
    assert fit_vocabulary("x", sizes, min_count=2) == ["7", "a"]
    assert fit_vocabulary("x", sizes, min_count=4) == []


def test_known_words_keep_their_places() -> None:
    sizes = [("new", 9), ("b", 5), ("c", 1), ("also", 9), ("gone", 0)]
    known = ["z", "c", "b"]
    assert fit_vocabulary("x", sizes, known=known) == ["z", "c", "b", "also", "new"]
    assert fit_vocabulary("x", sizes, known=known, min_count=9) == ["z", "c", "b", "also", "new"]
    assert fit_vocabulary("x", sizes, known=known, min_count=10) == known
    grown = fit_vocabulary("x", sizes, known=known)
    assert fit_vocabulary("x", [], known=grown) == grown


def test_words_of_a_crossed_feature() -> None:
    sizes = [(("a", 1), 1), ((None, 1), 2), (("a", None), 3), ((None, " "), 9), ((" a", 1.0), 1)]
    assert fit_vocabulary("x", sizes) == ["a\x1f", "\x1f1", "a\x1f1"]


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
    ("change", "message"),
    [
        ({"item": [[1], 2, 3]}, "'item' must hold one plain value a row"),
        ({"item": [b"x", 2, 3]}, "'item'.*must be text, a number"),
        ({"item": "abc"}, "'item' must be a list"),
        ({"item": np.zeros((3, 1))}, "'item' must be a list"),
        ({"item": iter([1, 2, 3])}, "'item' must be a list"),
        ({"item": [1, 2]}, r"equally long.*'item': 2"),
        ({"person": [1, 2]}, r"equally long.*'person': 2"),
        ({"age": [1, "old", 3]}, "'age' needs numbers. Received: 'old'"),
        pytest.param({"age": [1, 10**5000, 3]}, "'age' needs numbers: a number or date cannot", id="long"),
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
        ({"item": ["7", "M", "0.5"], "site": ["10", "1"], "age": []}, "one vocabulary. Received: 'age'"),
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
    for text in ("{", json.dumps(["7"]), json.dumps({"item": "7", "site": []})):
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


EVERY = Schema(
    (
        Feature("item", num_ids=5),
        Feature("pair", columns=("item", "country"), num_ids=4),
        Feature("bins", columns=("item",), num_ids=FIRST_ID + 10, hash_buckets=10),
        Feature("past", "sequence", num_ids=5, share="item", max_length=3, separator="|"),
        Feature("price_band", "bucketed", columns=("price",), num_ids=5, boundaries=(10.0, 20.0)),
        Feature("price", "numeric", transform="log1p", mean=1.0, std=2.0, missing=True),
        Feature("tags", "sequence", num_ids=FIRST_ID + 50, hash_buckets=50, max_length=2, pooling="max"),
        Feature("age", "numeric", mean=30.0, std=10.0),
    ),
    domains=("de/app", "us/web"),
    domain="country/page",
)
WORDS = {"item": ["7", "M", "0.5"], "pair": ["M\x1fde", "\x1fus"]}
EVERY_ROWS = {
    "item": ["M", 7.0, None],
    "country": ["de", "us", None],
    "page": ["app", " web", "app"],
    "past": [[7, None, "x", "M", 0.5], "M| 7", None],
    "price": [10, None, "1e3"],
    "tags": [["a"], [], ["b", "c", "d"]],
    "age": [40, float("inf"), None],
}
EVERYTHING = Encoder(EVERY, WORDS)


def test_every_kind_of_feature() -> None:
    arrays = EVERYTHING.encode_arrays(EVERY_ROWS)
    m, seven, tags = hash_id("M", 10), hash_id("7", 10), [hash_id(tag, 50) for tag in "acd"]
    assert arrays["ids"].tolist() == [
        [3, 2, m, OOV_ID, 3, 4, 3, tags[0], PAD_ID],
        [2, OOV_ID, seven, 3, 2, PAD_ID, PAD_ID, PAD_ID, PAD_ID],
        [PAD_ID, PAD_ID, PAD_ID, PAD_ID, PAD_ID, PAD_ID, 4, tags[1], tags[2]],
    ]
    logs = [(np.log1p(price) - 1) / 2 for price in (10.0, 1000.0)]
    np.testing.assert_allclose(arrays["dense"], [[logs[0], 0, 1], [0, 1, 0], [logs[1], 0, 0]], rtol=1e-6)
    assert arrays["domain"].tolist() == [0, 1, UNKNOWN_DOMAIN]
    assert {name: array.dtype for name, array in arrays.items()} == {
        "ids": np.int64,
        "dense": np.float32,
        "domain": np.int64,
        "label": np.float32,
    }


def test_an_infinite_number_is_not_missing() -> None:
    dense = EVERYTHING.encode_arrays(EVERY_ROWS | {"price": [float("inf"), "-inf", float("nan")]})["dense"]
    assert dense[:, :2].tolist() == [[0.0, 0.0], [0.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("feature", EVERY.categorical, ids=lambda feature: feature.name)
def test_id_of_one_value_is_the_id_of_a_row(feature) -> None:
    number = EVERYTHING.id_of(feature)
    ids = EVERYTHING.encode_arrays(EVERY_ROWS)["ids"]
    slot = sum(other.max_length for other in EVERY.categorical[: EVERY.categorical.index(feature)])
    if feature.kind == "sequence":
        cells = [cell.split("|") if isinstance(cell, str) else cell or [] for cell in EVERY_ROWS[feature.name]]
        expected = [[number(value) for value in cell if value is not None][-feature.max_length :] for cell in cells]
        expected = [row + [PAD_ID] * (feature.max_length - len(row)) for row in expected]
    elif len(feature.sources) > 1:
        values = zip(*(EVERY_ROWS[source] for source in feature.sources), strict=True)
        expected = [[number(value)] for value in values]
    else:
        expected = [[number(value)] for value in EVERY_ROWS[feature.sources[0]]]
    assert ids[:, slot : slot + feature.max_length].tolist() == expected


def test_a_numeric_feature_has_no_ids() -> None:
    with pytest.raises(SchemaError, match=r"no ids\. Received: 'price'"):
        EVERYTHING.id_of(EVERY.numeric[0])


def test_a_sequence_may_be_one_array() -> None:
    past = np.array([[7, 8], [8, 7], [7, 7]])
    lists = EVERYTHING.encode_arrays(EVERY_ROWS | {"past": past.tolist()})
    np.testing.assert_array_equal(EVERYTHING.encode_arrays(EVERY_ROWS | {"past": past})["ids"], lists["ids"])
    with pytest.raises(SchemaError, match="'item' must be a list"):
        EVERYTHING.encode_arrays(EVERY_ROWS | {"item": past})
    with pytest.raises(SchemaError, match="'past' must be a list"):
        EVERYTHING.encode_arrays(EVERY_ROWS | {"past": past[None]})


def test_a_domain_of_several_columns_may_be_one_column() -> None:
    rows = {name: column for name, column in EVERY_ROWS.items() if name != "page"}
    joined = EVERYTHING.encode_arrays(rows | {"country/page": [" de/app", "us/web", None]})
    np.testing.assert_array_equal(joined["domain"], EVERYTHING.encode_arrays(EVERY_ROWS)["domain"])
    with pytest.raises(SchemaError, match="need a column 'country/page'"):
        EVERYTHING.encode_arrays(rows)


@pytest.mark.parametrize("absent", [None, "", float("nan")])
def test_a_domain_is_absent_where_a_part_is(absent) -> None:
    one = Schema((Feature("item", num_ids=2),), ("de/app", "base"), domain="x/y", unknown_domain="de/app")
    rows = {"item": [1, 1, 1], "x": [absent, "de", "base"], "y": ["app", absent, ""]}
    for policy, number in (("base", UNKNOWN_DOMAIN), ("de/app", 0)):
        encoder = Encoder(replace(one, unknown_domain=policy), {"item": []})
        assert encoder.encode_arrays(rows)["domain"].tolist() == [number] * 3


def test_unknown_domains() -> None:
    rows = ROWS | {"site": ["1", 3, None]}
    for policy, numbers in (("base", [0, -1, -1]), ("10", [0, 1, 1]), ("1", [0, 0, 0])):
        encoder = Encoder(replace(SCHEMA, unknown_domain=policy), ENCODER.vocabularies)
        assert encoder.encode(rows).domain.tolist() == numbers
    strict = Encoder(replace(SCHEMA, unknown_domain="error"), ENCODER.vocabularies)
    assert strict.encode(rows | {"site": ["1", 10, 1.0]}).domain.tolist() == [0, 1, 0]
    with pytest.raises(UnknownDomainError, match=r"'site' must name a domain.*Received: 3.*Known: '1', '10'"):
        strict.encode(rows)
    with pytest.raises(UnknownDomainError, match="Received: None"):
        strict.encode(rows | {"site": ["1", None, 3]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pair": ["M\x1fde", "us"]}, "'pair' must hold 2 values. Received: 'us'"),
        ({"pair": ["M\x1fde", "\x1f"]}, "'pair' must be a canonical text"),
        ({"past": []}, "one vocabulary. Received: 'past'"),
        ({"bins": []}, "one vocabulary. Received: 'bins'"),
    ],
)
def test_words_that_do_not_fit(change, message) -> None:
    with pytest.raises(SchemaError, match=message):
        Encoder(EVERY, WORDS | change)


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        (Feature("x", num_ids=10, hash_buckets=10), r"num_ids of 10 buckets \+ 2. Received: 10"),
        (Feature("x", "bucketed", num_ids=4, boundaries=(1.0, 2.0)), r"num_ids of 3 buckets \+ 2. Received: 4"),
        (Feature("x", "bucketed", num_ids=5, boundaries=(2.0, 1.0)), "must be finite and ascending"),
        (Feature("x", "bucketed", num_ids=5, boundaries=(1.0, 1.0)), "must be finite and ascending"),
        (Feature("x", "bucketed", num_ids=4, boundaries=(float("nan"),)), "must be finite and ascending"),
        (Feature("x", "bucketed", num_ids=4, boundaries=(float("inf"),)), "must be finite and ascending"),
        (Feature("x", columns=("y", "z"), num_ids=2, share="own"), "must read equally many columns"),
    ],
)
def test_features_that_cannot_be_encoded(feature, message) -> None:
    with pytest.raises(SchemaError, match=message):
        Encoder(Schema((Feature("own", num_ids=2), feature), ("a",)), {"own": []})


def test_save_and_open_every_kind(tmp_path) -> None:
    words = WORDS | {"item": ["7", "M", "\ud800 half a pair"]}
    encoder = Encoder(EVERY, words)
    encoder.save(tmp_path)
    again = Encoder.open(tmp_path)
    assert (again.schema, again.vocabularies) == (EVERY, encoder.vocabularies)
    assert again.fingerprint() == encoder.fingerprint() != EVERYTHING.fingerprint()


def test_files_of_before_there_were_kinds_still_open(tmp_path) -> None:
    schema = json.loads(SCHEMA.to_json())
    schema["features"] = [{k: f[k] for k in ("name", "kind", "num_ids", "mean", "std")} for f in schema["features"]]
    del schema["unknown_domain"]
    ENCODER.save(tmp_path)
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    assert Encoder.open(tmp_path).fingerprint() == ENCODER.fingerprint()


def test_an_encoder_goes_to_other_processes() -> None:
    again = ForkingPickler.loads(ForkingPickler.dumps(EVERYTHING))
    assert again.encode_arrays(EVERY_ROWS)["ids"].tolist() == EVERYTHING.encode_arrays(EVERY_ROWS)["ids"].tolist()
