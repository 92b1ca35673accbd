from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domlora.data.shards import ROW_GROUP_ROWS, decode, fill, row_bytes, shard_schema, uninitialised, write_shard
from domlora.errors import SchemaError
from domlora.features.batch import Batch
from domlora.features.schema import Feature, Schema

KINDS = {
    "few": Feature("few", num_ids=9),
    "many": Feature("many", num_ids=1 << 28),
    "list": Feature("list", "sequence", num_ids=50, max_length=3),
    "single": Feature("single", "sequence", num_ids=50, max_length=1),
    "bucket": Feature("bucket", "bucketed", num_ids=5, boundaries=(0.0, 1.0)),
    "x": Feature("x", "numeric"),
    "y": Feature("y", "numeric", missing=True),
}
ALL = Schema(tuple(KINDS.values()), domains=("a", "b"), user="u", weight="w")
SCHEMAS = st.builds(
    lambda features, user, weight: Schema(tuple(features), ("a", "b"), user=user, weight=weight),
    st.permutations(list(KINDS.values())).flatmap(lambda order: st.integers(1, len(order)).map(lambda n: order[:n])),
    st.sampled_from([None, "u"]),
    st.sampled_from([None, "w"]),
)


def make_columns(schema: Schema, rows: int, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    columns: dict[str, Any] = {}
    for feature in schema.features:
        if feature.kind == "numeric":
            columns[feature.name] = random.standard_normal(rows, np.float32)
            columns[f"{feature.name}__missing"] = random.integers(0, 2, rows).astype(np.int8)
        elif feature.kind == "sequence":
            flat = random.integers(0, feature.num_ids, rows * feature.max_length, dtype=np.int32)
            columns[feature.name] = pa.FixedSizeListArray.from_arrays(pa.array(flat), feature.max_length)
        else:
            columns[feature.name] = random.integers(0, feature.num_ids, rows, dtype=np.int32)
    return columns | {
        "__domain": random.integers(-1, 2, rows, dtype=np.int32),
        "__label": random.integers(0, 2, rows).astype(np.float32),
        "__user": random.integers(0, 1 << 60, rows),
        "__weight": random.random(rows, np.float32) + 0.1,
    }


def expected(schema: Schema, columns: dict[str, Any]) -> Batch:
    """A cell at a time."""
    rows = len(columns["__label"])
    ids: list[list[int]] = [[] for _ in range(rows)]
    dense: list[list[float]] = [[] for _ in range(rows)]
    for feature in schema.features:
        for row in range(rows):
            cell = columns[feature.name][row]
            if feature.kind == "sequence":
                ids[row] += cell.as_py()
            elif feature.kind == "numeric":
                dense[row] += [cell, columns[f"{feature.name}__missing"][row]][: 1 + feature.missing]
            else:
                ids[row].append(int(cell))
    others = {"user": "__user", "weight": "__weight"}
    return Batch(
        torch.tensor(ids, dtype=torch.int64).reshape(rows, schema.num_slots),
        torch.tensor(dense, dtype=torch.float32).reshape(rows, schema.num_dense),
        torch.tensor(columns["__domain"], dtype=torch.int64),
        torch.tensor(columns["__label"]),
        **{k: torch.tensor(columns[c]) if getattr(schema, k) is not None else None for k, c in others.items()},
    )


def same(one: Batch, other: Batch) -> bool:
    for a, b in zip(one, other, strict=True):
        if (a is None) != (b is None):
            return False
        if a is not None and (a.dtype != b.dtype or not torch.equal(a, b)):
            return False
    return True


@settings(max_examples=60, deadline=None)
@given(schema=SCHEMAS, rows=st.integers(0, 30), seed=st.integers(0, 99))
def test_round_trip(schema, rows, seed, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("shard") / "part.parquet"
    columns = make_columns(schema, rows, seed)
    write_shard(columns, schema, path)
    assert same(decode(pq.read_table(path), schema), expected(schema, columns))


def test_columns_of_the_format() -> None:
    types = {field.name: str(field.type) for field in shard_schema(ALL)}
    assert types == {
        "few": "int32",
        "many": "int32",
        "list": "fixed_size_list<item: int32>[3]",
        "single": "fixed_size_list<item: int32>[1]",
        "bucket": "int32",
        "x": "float",
        "y": "float",
        "y__missing": "int8",
        "__domain": "int32",
        "__label": "float",
        "__user": "int64",
        "__weight": "float",
    }
    plain = shard_schema(replace(ALL, user=None, weight=None))
    assert plain.names == [name for name in types if name not in ("__user", "__weight")]


def test_features_whose_columns_have_one_name() -> None:
    schema = Schema((Feature("x", "numeric", missing=True), Feature("x__missing", num_ids=4)), ("a",))
    with pytest.raises(SchemaError, match=r"names of their own. Received: \['x__missing'\]"):
        shard_schema(schema)


def test_what_is_written(tmp_path: Path) -> None:
    rows = ROW_GROUP_ROWS + 5
    columns = make_columns(ALL, rows)
    write_shard(columns, ALL, tmp_path / "a.parquet")
    write_shard(pa.table(columns), ALL, tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        assert file.schema_arrow.equals(shard_schema(ALL))
    assert [group.num_rows for group in groups] == [ROW_GROUP_ROWS, 5]
    assert {group.column(n).compression for group in groups for n in range(group.num_columns)} == {"ZSTD"}
    assert same(decode(pq.read_table(tmp_path / "a.parquet"), ALL), decode(pa.table(columns), ALL))


@pytest.mark.parametrize("name", ["few", "list", "x", "__domain"])
def test_an_absent_value_is_never_written(tmp_path: Path, name: str) -> None:
    columns = make_columns(ALL, 3)
    columns[name] = pa.array([None, *pa.array(columns[name]).to_pylist()[1:]], shard_schema(ALL).field(name).type)
    with pytest.raises(
        SchemaError, match=f"column '{name}' of a shard must have a value in every row. Received: '1 nulls'"
    ):
        write_shard(columns, ALL, tmp_path / "a.parquet")


def test_an_absent_element_is_never_written(tmp_path: Path) -> None:
    lists = pa.array([[1, 2, 3], [4, None, 5]], pa.list_(pa.int32(), 3))
    with pytest.raises(SchemaError, match="column 'list'"):
        write_shard(make_columns(ALL, 2) | {"list": lists}, ALL, tmp_path / "a.parquet")


def test_rows_may_come_in_any_form_of_arrow() -> None:
    columns = make_columns(ALL, 10)
    whole, table = expected(ALL, columns), pa.table(columns)
    pieces = pa.concat_tables([table.slice(0, 3), table.slice(3, 0), table.slice(3)])
    assert same(decode(pieces, ALL), whole)
    assert same(decode(table.slice(2, 5), ALL), whole.take(slice(2, 7)))
    (batch,) = table.to_batches()
    assert same(decode(batch.slice(2, 5), ALL), whole.take(slice(2, 7)))
    assert decode(table.slice(0, 0), ALL).ids.shape == (0, ALL.num_slots)


def test_fill_writes_its_rows_alone() -> None:
    columns = make_columns(ALL, 4)
    target = uninitialised(ALL, 8)
    for column in target:
        column.zero_()
    fill(target.take(slice(2, 6)), pa.table(columns), ALL)
    assert same(target.take(slice(2, 6)), expected(ALL, columns))
    assert all(not column[:2].any() and not column[6:].any() for column in target)


def test_bytes_of_a_row() -> None:
    batch = expected(ALL, make_columns(ALL, 10))
    assert row_bytes(ALL) * 10 == sum(column.numel() * column.element_size() for column in batch)
