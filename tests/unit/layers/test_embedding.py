import pytest
import torch

from domlora.layers.embedding import EmbeddingTable, FirstOrder

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


def test_first_order_is_a_linear_model():
    term = FirstOrder([5, 3], num_dense=2)
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
    assert FirstOrder([5, 3], num_dense=0)(IDS, torch.zeros(3, 0)).shape == (3, 1)
