"""What SharedBottom, MMoE and PLE have in common, and what makes each of them itself. Numbers: tests/reference."""

import copy

import pytest
import torch

from domlora.adapters.attach import attach_
from domlora.features.schema import Feature, Schema
from domlora.layers.mlp import MLP
from domlora.models.build import build_model

SMALL = {"embedding_dim": 4, "hidden_units": (12, 6), "dropout": 0.0, "domain_units": (5,)}
DEEP = {"num_levels": 2, "num_experts": 2, "num_own_experts": 2}
THREE = pytest.mark.parametrize(
    ("name", "options"),
    [("shared_bottom", {}), ("mmoe", {}), ("ple", {}), ("ple", DEEP)],
    ids=["shared_bottom", "mmoe", "ple", "ple of two levels"],
)


def of_domains(model):
    """Parameters with a row for each domain."""
    parts = ("domain_mlp.", "head.", "gate.", "own_experts.", "own_gates.")
    return {name: p for name, p in model.named_parameters() if name.startswith(parts)}


@THREE
def test_all_domains_start_alike(name, options, schema, rows):
    model = build_model(name, schema, **SMALL, **options).eval()
    ids, dense, domain = rows(8)
    torch.testing.assert_close(model(ids, dense, domain), model(ids, dense, torch.full_like(domain, -1)))


@THREE
def test_it_reads_the_domain(name, options, schema, rows, stir):
    model = stir(build_model(name, schema, **SMALL, **options)).eval()
    for parameter in of_domains(model).values():
        torch.nn.init.normal_(parameter)
    ids, dense, _ = rows(8)
    answers = [model(ids, dense, torch.full((8,), domain)) for domain in (-1, 0, 1, 2, 3)]
    for i, answer in enumerate(answers):
        assert not any(torch.allclose(answer, other) for other in answers[:i])


@THREE
@pytest.mark.parametrize("ordered", [True, False])
def test_a_mixed_batch_equals_its_pieces(name, options, ordered, schema, rows, stir):
    model = stir(build_model(name, schema, **SMALL, **options)).eval()
    ids, dense, domain = rows(20)
    domain = domain.sort().values if ordered else domain
    mixed = model(ids, dense, domain)
    for d in domain.unique():
        piece = domain == d
        torch.testing.assert_close(model(ids[piece], dense[piece], domain[piece]), mixed[piece])


@THREE
def test_a_batch_trains_the_own_parts_of_its_domains_alone(name, options, schema, rows, stir):
    model = stir(build_model(name, schema, **SMALL, **options))
    ids, dense, domain = rows(64)
    model(ids, dense, domain.clamp(min=0)).square().sum().backward()
    own = of_domains(model)
    assert all(len(parameter) == 4 for parameter in own.values())
    for parameter in own.values():
        assert parameter.grad.ne(0).any(1).tolist() == [True, True, True, False]
    shared = {n: p for n, p in model.named_parameters() if n not in own}
    assert all(parameter.grad.any() for parameter in shared.values())


@THREE
def test_an_unknown_domain_uses_the_mean_of_what_is_a_domains_own(name, options, schema, rows, stir):
    model = stir(build_model(name, schema, **SMALL, **options)).double().eval()
    mean = copy.deepcopy(model)
    for parameter in of_domains(mean).values():
        parameter.data = parameter.data.mean(0, keepdim=True).expand_as(parameter)
    ids, dense, domain = rows(8)
    unknown = torch.full_like(domain, -1)
    torch.testing.assert_close(model(ids, dense.double(), unknown), mean(ids, dense.double(), domain.clamp(min=0)))


@THREE
def test_a_copy_has_rows_of_its_own(name, options, schema, rows, stir):
    model = stir(build_model(name, schema, **SMALL, **options)).eval()
    twin = copy.deepcopy(model)
    cells = {id(module.rows) for module in twin.modules() if hasattr(module, "rows")}
    assert cells == {id(twin.rows)}
    assert twin.rows is not model.rows
    assert torch.equal(twin(*rows(8)), model(*rows(8)))


@THREE
def test_it_compiles_and_exports(name, options, schema, rows, stir):
    model = stir(build_model(name, schema, **SMALL, **options)).eval()
    size = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(model, rows(8), dynamic_shapes=({0: size}, {0: size}, {0: size})).module()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for num_rows in (8, 3):
        torch.testing.assert_close(program(*rows(num_rows)), model(*rows(num_rows)))
        torch.testing.assert_close(compiled(*rows(num_rows)), model(*rows(num_rows)))


@THREE
def test_the_default_adapters_stand_beside_every_shared_layer(name, options, schema):
    model = build_model(name, schema, **SMALL, **options)
    shared = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and n.startswith("tower.")]
    experts = {"shared_bottom": 1, "mmoe": 4, "ple": options.get("num_levels", 1) * 2}[name]
    assert len(shared) == 2 * experts
    attach_(model, 4, include=["tower.*"])
    assert {n.removesuffix(".lora_A") for n, _ in model.named_parameters() if n.endswith("lora_A")} == set(shared)


WIDE = Schema(tuple(Feature(f"c{i}", num_ids=2) for i in range(3)), tuple("abcdefghij"))


@pytest.mark.parametrize(
    ("name", "options", "own"),
    [
        ("shared_bottom", {}, 64 * 64 + 64 + 65),
        ("shared_bottom", {"domain_units": (32, 16)}, 64 * 32 + 32 + 32 * 16 + 16 + 17),
        ("mmoe", {}, 385 * 4 + 64 * 64 + 64 + 65),
        ("ple", {}, 139_712 + 385 * 3 + 64 * 64 + 64 + 65),
        ("ple", {"num_own_experts": 2, "num_levels": 2}, 2 * (139_712 + 57_792) + 450 * 4 + 4225),
    ],
)
def test_parameters_of_a_domain_as_the_docs_count_them(name, options, own):
    model = build_model(name, WIDE, embedding_dim=128, **options)
    assert sum(parameter[0].numel() for parameter in of_domains(model).values()) == own
    one = Schema(WIDE.features, ("a",))
    fewer = sum(p.numel() for p in build_model(name, one, embedding_dim=128, **options).parameters())
    assert sum(p.numel() for p in model.parameters()) - fewer == 9 * own


def test_experts_start_apart(schema):
    for model in (build_model("mmoe", schema, **SMALL), build_model("ple", schema, **SMALL, **DEEP)):
        first = [module[0].weight for module in model.tower.modules() if isinstance(module, MLP)]
        assert len(first) > 1
        assert all(not torch.equal(first[0], other) for other in first[1:])
    first, second = model.own_experts[0]
    assert not torch.equal(first[0].weight, second[0].weight)


def test_a_gate_chooses_its_expert(schema, rows, stir):
    """With a gate that is sure of one expert the model is a shared bottom of that expert."""
    mmoe = stir(build_model("mmoe", schema, **SMALL, num_experts=3)).eval()
    torch.nn.init.zeros_(mmoe.gate.weight)
    mmoe.gate.bias.data = 1000 * torch.eye(3)[torch.tensor([2, 0, 1, 1])]
    bottom = build_model("shared_bottom", schema, **SMALL).eval()
    ids, dense, domain = rows(30)
    for d, expert in enumerate((2, 0, 1)):
        bottom.load_state_dict(mmoe.state_dict(), strict=False)
        bottom.tower.load_state_dict(mmoe.tower[expert].state_dict())
        here = domain == d
        torch.testing.assert_close(
            mmoe(ids[here], dense[here], domain[here]), bottom(ids[here], dense[here], domain[here])
        )


def test_only_a_level_with_another_above_has_a_shared_gate(schema):
    for num_levels in (1, 2, 3):
        model = build_model("ple", schema, **SMALL, num_levels=num_levels)
        assert len(model.shared_gates) == num_levels - 1
        assert len(model.own_gates) == len(model.own_experts) == len(model.tower) == num_levels


def test_own_experts_see_the_rows_of_their_domain_alone(schema, rows, monkeypatch):
    model = build_model("ple", schema, **SMALL, num_own_experts=1)
    ids, dense, domain = rows(30)
    seen = []
    linear, addmm = torch.nn.functional.linear, torch.addmm
    layer = model.own_experts[0][0][0]

    def watch(*_):
        monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: seen.append(len(args[0])) or linear(*args))
        monkeypatch.setattr(torch, "addmm", lambda *args, out: seen.append(len(args[1])) or addmm(*args, out=out))

    layer.register_forward_pre_hook(watch)
    layer.register_forward_hook(lambda *_: monkeypatch.undo())
    model(ids, dense, domain)
    assert seen == [int((domain == d).sum()) for d in (-1, 0, 1, 2)]
