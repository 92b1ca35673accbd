"""Tables that begin with some of their rows, or with none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from domlora.errors import EngineError
from domlora.features.schema import Feature, Schema
from domlora.layers import rows
from domlora.layers.embedding import EmbeddingTable, Field, PooledTable
from domlora.layers.rows import cut_tables, empty_tables, stretch_of
from domlora.models.build import build_model

SCHEMA = Schema((Feature("user", num_ids=9), Feature("item", num_ids=7)), domains=("a", "b", "c"))


@given(
    num_rows=st.integers(0, 200),
    width=st.integers(1, 9),
    parts=st.integers(1, 7),
    chunk=st.sampled_from([16, 48, 1 << 20]),
)
def test_stretches_are_the_whole_table_and_leave_the_same_numbers_to_come(
    num_rows: int, width: int, parts: int, chunk: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_CHUNK", chunk)
        torch.manual_seed(1)
        whole, after = EmbeddingTable([num_rows], width, 0.3).weight, torch.rand(3)
        found = []
        for part in range(parts):
            torch.manual_seed(1)
            with cut_tables(part, parts):
                table = EmbeddingTable([num_rows], width, 0.3)
            assert table.stretch == stretch_of(num_rows, part, parts)
            assert torch.equal(torch.rand(3), after)
            found.append(table.weight)
    assert torch.equal(torch.cat(found), whole)


@pytest.mark.parametrize(
    "options", [{"name": "deepfm"}, {"name": "pepnet"}, {"name": "mlp", "embedding_dims": {"item": 3}}]
)
def test_a_model_is_the_same_but_for_the_rows_of_its_tables(options: dict[str, object]) -> None:
    torch.manual_seed(1)
    whole = build_model(schema=SCHEMA, **options).state_dict()
    torch.manual_seed(1)
    with cut_tables(1, 3):
        model = build_model(schema=SCHEMA, **options)
    tables = {f"{n}.weight": m.stretch for n, m in model.named_modules() if isinstance(m, EmbeddingTable) and m.stretch}
    assert tables
    for name, weight in model.state_dict().items():
        expected = whole[name][tables[name].start : tables[name].stop] if name in tables else whole[name]
        assert torch.equal(weight, expected), name


def test_a_table_that_is_cut_says_nothing() -> None:
    ids = torch.zeros(2, 1, dtype=torch.int64)
    with cut_tables(0, 2):
        tables = [EmbeddingTable([5], 2), PooledTable([Field(5, pooling="mean")], 2)]
    for table in tables:
        with pytest.raises(EngineError, match="rows 0 to 3 of 5"):
            table(ids)


def test_empty_tables_have_a_shape_and_take_what_they_are_given() -> None:
    torch.manual_seed(1)
    model = build_model("deepfm", SCHEMA)
    with empty_tables():
        empty = build_model("deepfm", SCHEMA)
    assert empty.embedding.weight.is_meta
    assert empty.embedding.weight.shape == model.embedding.weight.shape
    empty.load_state_dict(model.state_dict(), assign=True)
    ids, dense, domain = (
        torch.ones(4, SCHEMA.num_slots, dtype=torch.int64),
        torch.zeros(4, SCHEMA.num_dense),
        torch.arange(4) % 3,
    )
    assert torch.equal(empty.eval()(ids, dense, domain), model.eval()(ids, dense, domain))


def test_a_context_ends_also_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), empty_tables():
        _ = 1 / 0
    assert not EmbeddingTable([3], 2).weight.is_meta
