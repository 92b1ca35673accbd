import pytest
import torch

from domlora.layers.embedding import EmbeddingTable, Field, FirstOrder, MixedEmbedding, table_for

IDS = torch.tensor([[4, 0], [0, 2], [4, 1]])


def test_each_slot_reads_its_own_rows():
    table = EmbeddingTable([5, 3], embedding_dim=4)
    expected = torch.stack([torch.stack([table.weight[a], table.weight[5 + b]]) for a, b in IDS.tolist()])
    assert torch.equal(table(IDS), expected)
    table.sparse = True
    assert torch.equal(table(IDS), expected)


def test_sparse_and_dense_gradients_agree():
    table = EmbeddingTable([5, 3], embedding_dim=4)
    weights = torch.randn(3, 2, 4)
    (table(IDS) * weights).sum().backward()
    dense = table.weight.grad
    table.weight.grad, table.sparse = None, True
    (table(IDS) * weights).sum().backward()
    assert table.weight.grad.is_sparse
    torch.testing.assert_close(table.weight.grad.to_dense(), dense)
    assert dense[1].eq(0).all()
    assert dense[4].ne(0).all()


def test_start():
    torch.manual_seed(0)
    assert EmbeddingTable([2000], 16, init_std=0.02).weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert EmbeddingTable([5], 1, init_std=0.0).weight.eq(0).all()


@pytest.mark.parametrize("sparse", [True, False])
def test_no_rows_and_no_slots(sparse):
    assert EmbeddingTable([5, 3], 4, sparse=sparse)(torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 2, 4)
    assert EmbeddingTable([], 4, sparse=sparse)(torch.zeros(3, 0, dtype=torch.int64)).shape == (3, 0, 4)


def test_an_id_beyond_the_table_is_refused():
    with pytest.raises((IndexError, RuntimeError)):
        EmbeddingTable([5, 3], 4)(torch.tensor([[0, 3]]))


def test_offsets_are_not_saved():
    assert list(EmbeddingTable([5, 3], 4).state_dict()) == ["weight"]


def test_features_that_share_read_the_same_rows():
    table = EmbeddingTable([5, 3, 5, 3], embedding_dim=4, owners=[0, 1, 0, 1])
    ids = torch.tensor([[4, 0, 2, 1], [0, 2, 4, 2]])
    assert table.weight.shape == (8, 4)
    y = table(ids)
    assert torch.equal(y[:, :2], EmbeddingTable.forward(table_with(table.weight, [5, 3]), ids[:, :2]))
    assert torch.equal(y[:, 2:], EmbeddingTable.forward(table_with(table.weight, [5, 3]), ids[:, 2:]))


def test_an_owner_may_stand_behind_those_that_share():
    table = EmbeddingTable([5, 3, 5], embedding_dim=4, owners=[2, 1, 2])
    assert table.weight.shape == (8, 4)
    assert torch.equal(table(torch.tensor([[4, 2, 4]])).squeeze(0), table.weight[[7, 2, 7]])


def table_with(weight, num_ids):
    table = EmbeddingTable(num_ids, weight.shape[1])
    table.weight = weight
    return table


def test_a_table_without_sequences_is_the_plain_one():
    torch.manual_seed(3)
    table = table_for([Field(5), Field(3)], 4, 0.02)
    assert type(table) is EmbeddingTable
    torch.manual_seed(3)
    assert torch.equal(table.weight, torch.empty(8, 4).normal_(0.0, 0.02))


def mixed(**options):
    torch.manual_seed(0)
    return MixedEmbedding([Field(n) for n in (5, 3, 4, 6, 2)], [4, 2, 7, 2, 4], 4, **options)


MIXED_IDS = torch.tensor([[4, 2, 3, 5, 1], [0, 0, 0, 0, 0], [1, 2, 1, 4, 0]])


@pytest.mark.parametrize("given", [(), (0,), (1, 2), (2, 4)])
def test_mixed_widths_leave_as_one_width_and_in_order(given):
    sizes, widths = [5, 3, 4, 6, 2], [4, 2, 7, 2, 4]
    pretrained = {slot: torch.randn(sizes[slot], widths[slot]) for slot in given}
    layer = mixed(pretrained=pretrained)
    y = layer(MIXED_IDS)
    assert y.shape == (3, 5, 4)
    learned = [slot for slot in range(5) if slot not in given]
    groups = [[s for s in learned if widths[s] == width] for width in dict.fromkeys(widths[s] for s in learned)]
    groups += [[slot] for slot in given]
    for table, to_width, slots in zip(layer.tables, layer.maps, groups, strict=True):
        start = 0
        for slot in slots:
            vectors = table.weight[start : start + sizes[slot]]
            start += sizes[slot]
            assert slot not in given or torch.equal(vectors, pretrained[slot])
            expected = vectors[MIXED_IDS[:, slot]]
            expected = expected @ to_width.weight.t() if widths[slot] != 4 else expected
            torch.testing.assert_close(y[:, slot], expected)
        assert start == len(table.weight)


def test_a_group_of_the_right_width_has_no_map():
    layer = mixed(pretrained={0: torch.ones(5, 4), 1: torch.ones(3, 2)})
    assert {name for name, _ in layer.named_parameters()} == {
        *(f"tables.{number}.weight" for number in range(5)),
        "maps.0.weight",  # of slot 2
        "maps.1.weight",  # of slot 3
        "maps.4.weight",  # of slot 1, given
    }
    assert layer.state_dict().keys() == dict(layer.named_parameters()).keys()


@pytest.mark.parametrize(("trainable", "frozen"), [((), {2, 3}), ((2,), {2}), ((1, 2), set())])
def test_only_frozen_vectors_have_no_gradient(trainable, frozen):
    layer = mixed(pretrained={1: torch.randn(3, 2), 2: torch.randn(4, 7)}, trainable=trainable)  # tables 2 and 3
    layer(MIXED_IDS).square().sum().backward()
    assert {number for number, table in enumerate(layer.tables) if table.weight.grad is None} == frozen


@pytest.mark.parametrize("width", [2, 64])
def test_maps_keep_the_scale(width):
    torch.manual_seed(0)
    layer = MixedEmbedding([Field(2000)], [width], 16, init_std=0.02)
    assert layer(torch.arange(2000).view(-1, 1)).std().item() == pytest.approx(0.02, rel=0.25)
    layer = MixedEmbedding([Field(2000)], [width], 16, pretrained={0: torch.randn(2000, width)})
    assert layer(torch.arange(2000).view(-1, 1)).std().item() == pytest.approx(1.0, rel=0.25)


@pytest.mark.parametrize("sparse", [True, False])
def test_mixed_without_rows(sparse):
    layer = mixed()
    for table in layer.tables:
        table.sparse = sparse
    assert layer(MIXED_IDS[:0]).shape == (0, 5, 4)


def test_first_order_is_a_linear_model():
    term = FirstOrder([Field(5), Field(3)], num_dense=2)
    dense = torch.randn(3, 2)
    assert term(IDS, dense).eq(0).all()
    with torch.no_grad():
        for parameter in term.parameters():
            parameter.normal_()
    expected = [
        term.bias + term.table.weight[a] + term.table.weight[5 + b] + dense[i] @ term.dense.weight[0]
        for i, (a, b) in enumerate(IDS.tolist())
    ]
    torch.testing.assert_close(term(IDS, dense), torch.stack(expected))


def test_first_order_without_dense_columns():
    assert FirstOrder([Field(5), Field(3)], num_dense=0)(IDS, torch.zeros(3, 0)).shape == (3, 1)
