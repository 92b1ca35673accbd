import torch
from torch import nn

from domlora.layers.mlp import MLP


def test_it_is_linear_and_relu_in_evaluation():
    tower = MLP(5, [4, 3], dropout=0.5).eval()
    x = torch.randn(6, 5)
    expected = torch.relu(tower.get_submodule("1")(torch.relu(tower.get_submodule("0")(x))))
    assert torch.equal(tower(x), expected)


def test_names_and_start():
    torch.manual_seed(0)
    tower = MLP(300, [200, 100])
    assert [name for name, module in tower.named_modules() if isinstance(module, nn.Linear)] == ["0", "1"]
    assert list(tower.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert (tower.in_features, tower.out_features) == (300, 100)
    for layer in tower:
        glorot = (2 / (layer.in_features + layer.out_features)) ** 0.5
        assert abs(layer.weight.std().item() / glorot - 1) < 0.05
        assert layer.bias.eq(0).all()


def test_dropout_is_alive_in_training_only():
    torch.manual_seed(0)
    tower, x = MLP(8, [2000], dropout=0.5), torch.randn(4, 8)
    active = tower.eval()(x) > 0
    dropped = (tower.train()(x) == 0) & active
    assert abs(dropped.sum().item() / active.sum().item() - 0.5) < 0.05
    kept = (tower(x)[active] > 0).float().mean()
    assert abs(kept.item() - 0.5) < 0.05
    assert torch.equal(tower.eval()(x), tower(x))


def test_dropout_comes_after_the_activation_and_keeps_the_mean():
    torch.manual_seed(0)
    tower, x = MLP(4, [3], dropout=0.25), torch.randn(1, 4)
    exact = tower.eval()(x)
    mean = tower.train()(x.expand(20_000, 4)).mean(0, keepdim=True)
    torch.testing.assert_close(mean, exact, rtol=0.03, atol=0.01)


def test_a_layer_can_be_replaced():
    tower, x = MLP(5, [4, 3]), torch.randn(2, 5)
    tower.set_submodule("1", nn.Identity())
    assert tower(x).shape == (2, 4)


def test_layers_of_another_kind():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    tower = MLP(5, [4], linear=Doubled)
    x = torch.randn(2, 5)
    torch.testing.assert_close(tower(x), torch.relu(2 * nn.functional.linear(x, tower[0].weight)))
