import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from domlora.adapters.attach import freeze_
from domlora.layers.clusters import ClusterLinear, ClusterRouter
from domlora.layers.domain_linear import DomainRows


def clouds(num_rows=300, spread=0.1, seed=0):
    """Rows around three directions, and which one each belongs to."""
    g = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 3, (num_rows,), generator=g)
    directions = torch.eye(3, 6) + 0.5  # far from orthogonal, as embedded features are
    length = torch.rand(num_rows, 1, generator=g) + 0.01
    return length * (directions[truth] + spread * torch.randn(num_rows, 6, generator=g)), truth


def test_one_move_by_hand():
    router = ClusterRouter(6, 2, momentum=0.7, temperature=0.3, num_steps=2).double()
    x, _ = clouds(5)
    x = x.double()
    before = router.running_mean.numpy().copy()
    u = (x / x.norm(dim=1, keepdim=True)).numpy()
    centres = before
    for _ in range(2):
        moved = np.zeros_like(before)
        for row in u:
            scores = np.exp(centres @ row / 0.3)
            moved += np.outer(scores / scores.sum(), row)
        centres = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    expected = 0.7 * before + 0.3 * centres
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    cluster = router(x)
    np.testing.assert_allclose(router.running_mean.numpy(), expected)
    assert cluster.tolist() == [int(np.argmax(expected @ row)) for row in u]


def test_clusters_are_found():
    torch.manual_seed(1)
    router = ClusterRouter(6, 3)
    for step in range(60):
        router(clouds(seed=step)[0])
    x, truth = clouds(seed=99)
    pairs = set(zip(truth.tolist(), router.eval()(x).tolist(), strict=True))
    assert len(pairs) == 3  # each direction one cluster, each cluster one direction


def test_a_high_temperature_lets_centres_fall_together():
    """Why the softmax is not over plain products: the default keeps apart what 1 does not."""
    apart = []
    for temperature in (1.0, 0.05):
        torch.manual_seed(1)
        router = ClusterRouter(6, 3, temperature=temperature)
        for step in range(200):
            router(clouds(seed=step)[0])
        centres = router.running_mean
        apart.append((1 - (centres @ centres.t())[0, 1:]).max().item())
    assert apart[0] < 1e-4 < 0.1 < apart[1]


def test_the_length_of_a_row_does_not_matter():
    router, (x, _) = ClusterRouter(6, 3).eval(), clouds()
    assert torch.equal(router(x), router(100 * x))


def test_centres_stay_in_evaluation_and_when_frozen():
    router, (x, _) = ClusterRouter(6, 3), clouds()
    before = router.running_mean.clone()
    router.eval()(x)
    assert torch.equal(router.running_mean, before)
    model = nn.ModuleDict({"router": router.train(), "adapted": nn.Linear(1, 1)})
    freeze_(model)
    model.train()
    router(x)
    assert torch.equal(router.running_mean, before)


def test_centres_move_in_training_and_are_saved():
    router, (x, _) = ClusterRouter(6, 3), clouds()
    before = router.running_mean.clone()
    router(x)
    assert not torch.equal(router.running_mean, before)
    torch.testing.assert_close(router.running_mean.norm(dim=1), torch.ones(3))
    other = ClusterRouter(6, 3)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.eval()(x), router.eval()(x))


@pytest.mark.parametrize("x", [torch.zeros(0, 6), torch.zeros(4, 6)], ids=["no rows", "rows of zeros"])
def test_rows_without_a_direction(x):
    router = ClusterRouter(6, 3)
    assert router(x).shape == (len(x),)
    assert router.running_mean.isfinite().all()


def test_no_gradient_passes():
    x = clouds()[0].requires_grad_()
    assert not ClusterRouter(6, 3)(x).requires_grad


CLUSTER = torch.tensor([1, 0, 2, 0, 1])


def make_layer():
    torch.manual_seed(0)
    rows = DomainRows()
    layer = ClusterLinear(4, 3, 5, rows)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0, 0.5)
    rows.group_(CLUSTER)
    return layer


@pytest.mark.parametrize("compiled", [False, True])
def test_what_an_adapter_is_merged_into(compiled, monkeypatch):
    layer, x = make_layer(), torch.randn(5, 4)
    plain = layer.plain(7)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    torch.testing.assert_close(plain(x), layer(x))
    with torch.no_grad():
        plain.weight.add_(2.0)
        plain.bias.add_(3.0)
    torch.testing.assert_close(plain(x), layer(x) + F.linear(x, torch.full((3, 4), 2.0), torch.full((3,), 3.0)))


def test_merged_layers_and_others_refuse_each_others_state():
    layer = make_layer()
    assert set(layer.plain(0).state_dict()) == set(layer.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(layer.plain(0).state_dict())
