import pytest
import torch

from domlora.layers.embedding import EmbeddingTable, FirstOrder, MixedEmbedding

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


def test_given_vectors():
    vectors = torch.randn(5, 4)
    table = EmbeddingTable.from_pretrained(vectors)
    assert torch.equal(table(IDS[:, :1]).squeeze(1), vectors[IDS[:, 0]])
    assert not table.weight.requires_grad
    assert EmbeddingTable.from_pretrained(vectors, freeze=False).weight.requires_grad


def mixed(**options):
    torch.manual_seed(0)
    return MixedEmbedding([5, 3, 4, 6, 2], [4, 2, 7, 2, 4], 4, **options)


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


@pytest.mark.parametrize("freeze", [True, False])
def test_only_frozen_vectors_have_no_gradient(freeze):
    layer = mixed(pretrained={2: torch.randn(4, 7)}, freeze=freeze)
    layer(MIXED_IDS).square().sum().backward()
    frozen = [name for name, parameter in layer.named_parameters() if parameter.grad is None]
    assert frozen == (["tables.2.weight"] if freeze else [])


@pytest.mark.parametrize("width", [2, 64])
def test_maps_keep_the_scale(width):
    torch.manual_seed(0)
    layer = MixedEmbedding([2000], [width], 16, init_std=0.02)
    assert layer(torch.arange(2000).view(-1, 1)).std().item() == pytest.approx(0.02, rel=0.25)
    layer = MixedEmbedding([2000], [width], 16, pretrained={0: torch.randn(2000, width)})
    assert layer(torch.arange(2000).view(-1, 1)).std().item() == pytest.approx(1.0, rel=0.25)


@pytest.mark.parametrize("sparse", [True, False])
def test_mixed_without_rows(sparse):
    layer = mixed()
    for table in layer.tables:
        table.sparse = sparse
    assert layer(MIXED_IDS[:0]).shape == (0, 5, 4)


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
