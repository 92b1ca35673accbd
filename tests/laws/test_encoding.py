"""Law 8: what ``prepare`` writes for a row is what the server's encoder says about it, odd values included."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from domlora.config import parse
from domlora.data.dataset import SPLITS, Dataset
from domlora.data.plan import Plan
from domlora.data.prepare import prepare

NAN, INF = float("nan"), float("inf")
TEXTS = [
    "a",
    " a",
    "a\t",
    "",
    "  ",
    None,
    "3",
    "3.0",
    "03",
    "é",
    "e\u0301",
    "日本",
    "🎬",
    "A",
    "NULL",
    "nan",
    "a'b",
    'a"b',
]
ODD = {
    "text": pa.array(TEXTS * 3),
    "small": pa.array([0, 1, -1, 127, -128, None] * 9, pa.int8()),
    "large": pa.array([2**53, 2**53 + 1, 2**63 - 1, -(2**63), 0, None] * 9, pa.int64()),
    "unsigned": pa.array([2**64 - 1, 2**63, 0, 1, None, 5] * 9, pa.uint64()),
    "double": pa.array([3.0, -0.0, 0.0, NAN, INF, -INF, 1e22, 0.1, 1e-7, 1e300, None, -2.5] * 4 + [3.0] * 6, pa.float64()),
    "single": pa.array([0.1, 0.25, 16777216.0, NAN, None, -0.0, 0.0, 3.0, 1e-8] * 6, pa.float32()),
    "flag": pa.array([True, False, None] * 18),
    "price": pa.array([Decimal("1.50"), Decimal("2.00"), None] * 18, pa.decimal128(10, 2)),
}  # fmt: skip
NUMBERS = ("large", "double", "single")


def check(
    columns: dict[str, pa.Array], folder: Path, numeric: tuple[str, ...] = (), seed: int = 0, **features: dict[str, Any]
) -> None:
    """Prepare the columns, find each written row again by its number, and encode it by itself."""
    rows = len(next(iter(columns.values())))
    table = pa.table({"row": pa.array(range(rows)), "rating": pa.array([5, 1, 4] * rows)[:rows], **columns})
    folder.parent.mkdir(exist_ok=True)
    pq.write_table(table, folder.parent / "odd.parquet")
    kinds = {name: {"kind": "numeric"} if name in ("row", *numeric) else {} for name in ("row", *columns)}
    plan = {
        "source": {"files": ["odd.parquet"], "key": ["row"]},
        "columns": {"domain": "domain", "label": "rating", "label_rule": "== 5", "user": "user"},
        "features": {**{name: kind for name, kind in kinds.items() if name != "domain"}, **features},
        "split": {"seed": seed},
        "max_quarantine": 1.0,
    }
    prepare(parse(Plan, plan), folder, folder=folder.parent)
    dataset = Dataset.open(folder)
    row = next(feature for feature in dataset.schema.numeric if feature.name == "row")
    for split in SPLITS:
        written = dataset.read(split)
        numbers = (written.dense[:, 0].double() * row.std + row.mean).round().long()
        chosen = table.take(pa.array(numbers.numpy()))
        for given_rows in serve(chosen):
            found = dataset.encoder.encode(given_rows)
            assert found.ids.tolist() == written.ids.tolist()
            assert found.dense.tolist() == written.dense.tolist()
            assert found.domain.tolist() == written.domain.tolist()
            assert written.user is not None
            assert found.user is not None
            assert found.user.tolist() == written.user.tolist()


def serve(table: pa.Table) -> list[dict]:
    """The rows as a program holds them, as JSON brings them, and as numpy columns."""
    plain = table.to_pydict()
    texts = {name: [str(v) if isinstance(v, Decimal) else v for v in column] for name, column in plain.items()}
    decimal = any(isinstance(value, Decimal) for column in plain.values() for value in column)
    arrays = {
        # pyarrow makes floats of integers with a gap, which are other values
        name: np.array(column, dtype=object) if pa.types.is_integer(table[name].type) else table[name].to_numpy()
        for name, column in plain.items()
    }
    return [plain, arrays] if decimal else [plain, json.loads(json.dumps(texts)), arrays]


@pytest.mark.parametrize("name", ["text", "unsigned", "double", "price"])
def test_odd_users(name, tmp_path) -> None:
    column = ODD[name]
    domain = pa.array(["u", " v", "v", None] * len(column))[: len(column)]
    check({name: column, "user": column, "domain": domain}, tmp_path / "out")


@pytest.mark.parametrize("name", NUMBERS)
def test_odd_numbers(name, tmp_path) -> None:
    column = ODD[name]
    domain = pa.array([10, 9, -1] * len(column))[: len(column)]
    check({name: column, "user": domain, "domain": domain}, tmp_path / "out", numeric=(name,))


@pytest.mark.parametrize("name", ["text", "double", "flag"])
def test_odd_domains(name, tmp_path) -> None:
    check({"domain": ODD[name], "user": ODD["text"]}, tmp_path / "out")


LISTS = [["a", " b", None, ""], [], None, ["c"] * 5, ["é", "e\u0301", "a"], ["nowhere else"]]


@pytest.mark.parametrize(
    "feature",
    [
        {"kind": "sequence", "columns": ["seen"], "max_length": 3},
        {"kind": "sequence", "columns": ["seen"], "max_length": 2, "hash_buckets": 5},
        {"kind": "sequence", "columns": ["seen"], "max_length": 4, "share": "text"},
        {"kind": "sequence", "columns": ["text"], "max_length": 4, "separator": "a"},
        {"kind": "sequence", "columns": ["text"], "max_length": 4},
        {"kind": "bucketed", "columns": ["double"], "buckets": 4},
        {"kind": "numeric", "columns": ["double"], "transform": "log1p", "missing": True},
        {"columns": ["text", "double"]},
        {"columns": ["double", "small", "text"], "hash_buckets": 7},
        {"columns": ["text"], "min_count": 3},
    ],
    ids=str,
)
def test_odd_values_of_every_kind_of_feature(feature, tmp_path) -> None:
    columns = {name: ODD[name] for name in ("text", "double", "small")}
    columns |= {"seen": pa.array(LISTS * 9), "user": ODD["small"], "domain": ODD["flag"]}
    check(columns, tmp_path / "out", f=feature, seen={"kind": "sequence", "max_length": 2})


def test_odd_values_of_every_type(tmp_path) -> None:
    check({**ODD, "user": ODD["small"], "domain": ODD["flag"]}, tmp_path / "out")


VALUES = {
    pa.string(): st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=3),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float64(): st.floats(),
    pa.float32(): st.floats(width=32),
}


@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])  # each example prepares a folder
@given(data=st.data())
def test_any_values(tmp_path_factory, data) -> None:
    columns = {}
    for number, (kind, values) in enumerate(VALUES.items()):
        pool = data.draw(st.lists(values | st.none(), min_size=3, max_size=12))
        chosen = np.random.default_rng(number).integers(0, len(pool), 60)
        columns[f"c{number}"] = pa.array([pool[position] for position in chosen], kind)
    domain = pa.array(["u", "v", None] * 20)
    folder = tmp_path_factory.mktemp("any") / "out"
    check({**columns, "user": columns["c0"], "domain": domain}, folder, numeric=("c2",))
