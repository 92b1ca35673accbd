import copy

import pytest
import torch
from torch import nn

from domlora.models.build import build_model

SMALL = {"embedding_dim": 4, "hidden_units": (12, 6), "dropout": 0.0}


def test_star_starts_from_the_shared_tower(schema, rows):
    model = build_model("star", schema, **SMALL).eval()
    ids, dense, domain = rows(8)
    torch.testing.assert_close(model(ids, dense, domain), model(ids, dense, torch.full_like(domain, -1)))


def test_star_reads_the_domain(schema, rows, stir):
    model = stir(build_model("star", schema, **SMALL)).eval()
    ids, dense, _ = rows(8)
    answers = [model(ids, dense, torch.full((8,), domain)) for domain in (-1, 0, 1, 2, 3)]
    for i, answer in enumerate(answers):
        assert not any(torch.allclose(answer, other) for other in answers[:i])


def test_a_mixed_batch_equals_its_pieces(schema, rows, stir):
    model = stir(build_model("star", schema, **SMALL))
    model(*rows(50, seed=1))
    model.eval()
    ids, dense, domain = rows(20)
    mixed = model(ids, dense, domain)
    for d in domain.unique():
        piece = domain == d
        torch.testing.assert_close(model(ids[piece], dense[piece], domain[piece]), mixed[piece])


class Corrected(nn.Module):
    """Stands for an adapter: wraps a Linear and adds to each row, in the batch's order."""

    def __init__(self, base, correction):
        super().__init__()
        self.base, self.correction = base, correction

    def forward(self, x):
        return self.base(x) + self.correction


@pytest.mark.parametrize("ordered", [True, False])
def test_an_adapter_around_a_layer_sees_rows_in_the_batchs_order(ordered, schema, rows, stir):
    model = stir(build_model("star", schema, **SMALL)).eval()
    ids, dense, domain = rows(8)
    domain = domain.sort().values if ordered else domain
    correction = torch.randn(8, 6)
    seen = {}
    model.tower[1].register_forward_hook(lambda _, args, y: seen.update(x=args[0], y=y))
    model.tower.set_submodule("1", Corrected(model.tower[1], correction))
    logit = model(ids, dense, domain)
    hidden = torch.relu(seen["y"] + correction)
    torch.testing.assert_close(logit, model.head(hidden).squeeze(-1))
    one = [model.tower[1].base.weight, model.tower[1].base.domain_weight.view(-1, 6, 12)]
    for i, d in enumerate(domain.tolist()):
        weight = one[0] * one[1][d] if d >= 0 else one[0]
        bias = model.tower[1].base.bias + (model.tower[1].base.domain_bias[d] if d >= 0 else 0)
        torch.testing.assert_close(seen["y"][i], weight @ seen["x"][i] + bias)


def test_a_copy_has_rows_of_its_own(schema, rows, stir):
    model = stir(build_model("star", schema, **SMALL)).eval()
    twin = copy.deepcopy(model)
    assert twin.rows is not model.rows
    assert all(layer.rows is twin.rows for layer in twin.tower)
    assert torch.equal(twin(*rows(8)), model(*rows(8)))


def test_it_exports(schema, rows, stir):
    model = stir(build_model("star", schema, **SMALL)).eval()
    size = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(model, rows(8), dynamic_shapes=({0: size}, {0: size}, {0: size}))
    for num_rows in (8, 3):
        torch.testing.assert_close(program.module()(*rows(num_rows)), model(*rows(num_rows)))
