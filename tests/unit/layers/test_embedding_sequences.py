"""Tables of fields that share and of sequences, against one row at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domlora.features.schema import OOV_ID, PAD_ID
from domlora.layers.embedding import EmbeddingTable, Field, FirstOrder, MixedEmbedding, PooledTable, table_for
from domlora.training.rowwise import Summing

HOW = pytest.mark.parametrize("how", ["mean", "sum", "max"])
SPARSE = pytest.mark.parametrize("sparse", [False, True])
POOLINGS = (None, "mean", "sum", "max")
REDUCE = {"mean": torch.mean, "sum": torch.sum, "max": lambda x, dim: x.max(dim).values}


@st.composite
def some_fields(draw) -> list[Field]:
    fields: list[Field] = []
    for _ in range(draw(st.integers(1, 4))):
        owners = [place for place, field in enumerate(fields) if field.owner is None]
        owner = draw(st.sampled_from([None, *owners]))
        num_ids = draw(st.integers(2, 6)) if owner is None else fields[owner].num_ids
        pooling = draw(st.sampled_from(POOLINGS))
        fields.append(Field(num_ids, owner, pooling, draw(st.integers(1, 4)) if pooling else 1))
    return fields


@st.composite
def batches(draw) -> tuple[list[Field], torch.Tensor]:
    """Padding may be anywhere, and everywhere."""
    fields = draw(some_fields())
    row = st.tuples(*[st.integers(0, field.num_ids - 1) for field in fields for _ in range(field.max_length)])
    rows = draw(st.lists(row, max_size=5))
    return fields, torch.tensor(rows, dtype=torch.int64).view(len(rows), sum(f.max_length for f in fields))


def one_by_one(fields, ids, vectors):
    """``vectors[place]`` are those of each owner."""
    found = [vectors[0].new_zeros(0, len(fields), vectors[0].shape[1])]
    for row in ids.tolist():
        slots, columns = iter(row), []
        for place, field in enumerate(fields):
            own = [next(slots) for _ in range(field.max_length)]
            rows = vectors[place if field.owner is None else field.owner]
            counted = [i for i in own if i != PAD_ID] if field.pooling else own
            reduce = REDUCE[field.pooling or "sum"]
            columns.append(reduce(rows[counted], 0) if counted else torch.zeros_like(rows[0]))
        found.append(torch.stack(columns).unsqueeze(0))
    return torch.cat(found)


def owned(fields, weight):
    """The rows of each field with rows of its own."""
    sizes = [field.num_ids if field.owner is None else 0 for field in fields]
    return torch.split(weight, sizes)


def masked(table, ids):
    return table._masked(ids + table.offsets, (ids != PAD_ID) | table.counts_padding)


@settings(max_examples=150, deadline=None)
@given(batch=batches(), seed=st.integers(0, 9), sparse=st.booleans(), below_zero=st.booleans())
def test_vectors_and_gradients_of_any_fields(batch, seed, sparse, below_zero):
    fields, ids = batch
    torch.manual_seed(seed)
    table = table_for(fields, 3).double()
    torch.nn.init.normal_(table.weight)
    if below_zero:  # a maximum that took padding for zeros would show
        table.weight.data.abs_().neg_()
    table.sparse = sparse
    expected = one_by_one(fields, ids, owned(fields, table.weight))
    upstream = torch.randn_like(expected)
    (theirs,) = torch.autograd.grad(expected + 0 * table.weight.sum(), table.weight, upstream)
    ways = [table] if type(table) is EmbeddingTable else [table, lambda ids: masked(table, ids)]
    for way in ways:
        found = way(ids)
        torch.testing.assert_close(found, expected)
        (ours,) = torch.autograd.grad(found, table.weight, upstream)
        assert ours.is_sparse == sparse
        torch.testing.assert_close(ours.to_dense(), theirs)


@settings(max_examples=60, deadline=None)
@given(batch=batches(), seed=st.integers(0, 9))
def test_rows_from_elsewhere_are_asked_for_once_and_without_padding(batch, seed):
    fields, ids = batch
    torch.manual_seed(seed)
    table = table_for(fields, 3).double()
    torch.nn.init.normal_(table.weight)
    weight, table.sparse = table.weight, True
    expected, upstream, asked = table(ids), torch.randn(len(ids), len(fields), 3).double(), []
    (theirs,) = torch.autograd.grad(expected, weight, upstream)

    def fetch(rows):
        asked.append(rows)
        return weight[rows]

    table.fetch, table.weight = fetch, torch.nn.Parameter(torch.empty(0, 3))
    found = table(ids)
    assert torch.equal(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, weight, upstream)[0], theirs.to_dense())
    assert [rows.unique().tolist() for rows in asked] == [theirs.coalesce().indices()[0].tolist()]


@settings(max_examples=40, deadline=None)
@given(batch=batches(), data=st.data())
def test_mixed_widths_and_given_vectors_of_any_fields(batch, data):
    fields, ids = batch
    owners = [place for place, field in enumerate(fields) if field.owner is None]
    widths = [data.draw(st.integers(1, 4)) if place in owners else 3 for place in range(len(fields))]
    given_places = data.draw(st.sets(st.sampled_from(owners)))
    vectors = {place: torch.randn(fields[place].num_ids, widths[place]) for place in given_places}
    layer = MixedEmbedding(fields, widths, 3, 1.0, pretrained=vectors)
    learned = {}
    for place in owners:
        if place not in given_places:
            learned.setdefault(widths[place], []).append(place)
    rows = {}
    for table, to_width, group in zip(
        layer.tables, layer.maps, [*learned.values(), *[[p] for p in sorted(given_places)]], strict=True
    ):
        for place, part in zip(group, table.weight.split([fields[p].num_ids for p in group]), strict=True):
            assert place not in given_places or torch.equal(part, vectors[place])
            rows[place] = part, to_width
    expected = [
        rows[owner][1](one_by_one([field._replace(owner=None)], part, [rows[owner][0]])).squeeze(1)
        for place, (field, part) in enumerate(zip(fields, ids.split([f.max_length for f in fields], 1), strict=True))
        for owner in [place if field.owner is None else field.owner]
    ]
    torch.testing.assert_close(layer(ids), torch.stack(expected, 1))


@settings(max_examples=40, deadline=None)
@given(batch=batches())
def test_first_order_weights_are_pooled_alike(batch):
    fields, ids = batch
    term = FirstOrder(fields, num_dense=0)
    assert term(ids, torch.zeros(len(ids), 0)).eq(0).all()
    torch.nn.init.normal_(term.table.weight)
    expected = one_by_one(fields, ids, owned(fields, term.table.weight)).sum(1) + term.bias
    torch.testing.assert_close(term(ids, torch.zeros(len(ids), 0)), expected)


ITEM_AND_PAST = [Field(6), Field(6, owner=0, pooling="mean", max_length=3)]


def with_pooling(how):
    return [ITEM_AND_PAST[0], ITEM_AND_PAST[1]._replace(pooling=how)]


@HOW
@SPARSE
def test_padding_never_counts_whatever_its_row_holds(how, sparse):
    table = PooledTable(with_pooling(how), 4, sparse=sparse)
    ids = torch.tensor([[5, 2, 3, 0], [4, 0, 0, 0], [3, OOV_ID, 0, 0]])
    before = table(ids)
    assert before[1, 1].eq(0).all()
    assert torch.equal(before[2, 1], table.weight[OOV_ID])
    with torch.no_grad():
        table.weight[PAD_ID] = torch.nan
    assert torch.equal(table(ids), before)
    assert torch.equal(masked(table, ids), before)
    assert table(torch.tensor([[PAD_ID, 2, 0, 0]]))[0, 0].isnan().all()  # an absent single value has a vector


@HOW
def test_a_sparse_gradient_has_no_row_of_padding(how):
    table = PooledTable(with_pooling(how), 4, sparse=True)
    table(torch.tensor([[5, 2, 3, 0], [4, 0, 0, 0]])).sum().backward()
    assert sorted(table.weight.grad._indices().unique().tolist()) == [2, 3, 4, 5]
    rows = Summing()(table.weight)
    assert rows.ids.tolist() == [2, 3, 4, 5]


@SPARSE
@HOW
def test_no_rows_and_nothing_but_padding(how, sparse):
    table = PooledTable(with_pooling(how)[1:1] or [Field(6, None, how, 3)], 4, sparse=sparse)
    assert table(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 1, 4)
    nothing = table(torch.zeros(2, 3, dtype=torch.int64))
    assert nothing.eq(0).all()
    nothing.sum().backward()
    assert table.weight.grad.to_dense().eq(0).all()


def test_a_pooled_table_starts_and_is_saved_as_a_plain_one():
    torch.manual_seed(3)
    table = PooledTable(ITEM_AND_PAST, 4, 0.02)
    torch.manual_seed(3)
    assert torch.equal(table.weight, torch.empty(6, 4).normal_(0.0, 0.02))
    assert list(table.state_dict()) == ["weight"]
    assert isinstance(table, EmbeddingTable)


@HOW
def test_an_id_beyond_the_table_is_refused(how):
    table = PooledTable(with_pooling(how), 4)
    with pytest.raises((IndexError, RuntimeError)):
        table(torch.tensor([[0, 6, 0, 0]]))


def test_a_sequence_is_read_with_the_given_vectors_of_another_feature():
    vectors = torch.randn(6, 5)
    layer = MixedEmbedding(ITEM_AND_PAST, [5, 4], 4, pretrained={0: vectors})
    assert [tuple(table.weight.shape) for table in layer.tables] == [(6, 5)]
    y = layer(torch.tensor([[2, 5, 3, 0]]))
    expected = torch.stack([vectors[2], (vectors[5] + vectors[3]) / 2]) @ layer.maps[0].weight.t()
    torch.testing.assert_close(y[0], expected)
    y.sum().backward()
    assert layer.tables[0].weight.grad is None


@HOW
def test_a_trace_gives_the_same_numbers(how):
    table = PooledTable(with_pooling(how), 4, 1.0)
    ids = torch.tensor([[5, 2, 3, 0], [4, 0, 0, 0], [0, 1, 1, 5]])
    batch = torch.export.Dim("batch")
    program = torch.export.export(table, (ids,), dynamic_shapes=({0: batch},), strict=False).module()
    compiled = torch.compile(table, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (ids, ids[:2], ids.repeat(3, 1)):
        torch.testing.assert_close(program(rows), table(rows))
        torch.testing.assert_close(compiled(rows), table(rows))
