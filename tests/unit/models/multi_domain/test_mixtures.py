import torch

from domlora.models.build import build_model

SMALL = {"embedding_dim": 4, "hidden_units": (12, 6), "dropout": 0.0}


def answer_without(model, part, inputs):
    """The logits with a submodule's output set to zero."""
    hook = model.get_submodule(part).register_forward_hook(lambda *args: torch.zeros_like(args[-1]))
    logit = model(*inputs)
    hook.remove()
    return logit


def test_every_part_counts(schema, rows, stir):
    for name, parts in {
        "sar_net": ["attention", "transform", "tower.0", "tower.1", "own_experts.0", "gate"],
        "m3oe": ["representation", "tower.0", "tower.1", "tower.2", "own_expert", "gate", "domain_mlp"],
    }.items():
        model = stir(build_model(name, schema, **SMALL)).eval()
        for part in parts:
            assert not torch.allclose(answer_without(model, part, rows(8)), model(*rows(8))), (name, part)


def test_sar_nets_attention_weighs_features_with_weights_of_mean_one(schema, rows, stir):
    model = stir(build_model("sar_net", schema, **SMALL)).eval()
    x = model.embedding(rows(8)[0])
    factor = (model._attended(x, rows(8)[2]) / x).detach()  # one factor a feature
    torch.testing.assert_close(factor, factor[:, :, :1].expand_as(factor))
    torch.testing.assert_close(factor.mean((1, 2)), torch.ones(8))
    assert factor.std() > 0.01


def test_sar_nets_transform_starts_as_the_identity(schema, rows):
    model = build_model("sar_net", schema, **SMALL).eval()
    seen = []
    model.gate.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids, dense, domain = rows(8)
    model(ids, dense, domain)
    torch.testing.assert_close(seen[0], model._attended(model.embedding(ids), domain).flatten(1))


def test_m3oe_balances_own_and_mean_experts(schema, rows, stir):
    """With a share of one the other domains do not count, with zero all rows have the same expert."""
    model = stir(build_model("m3oe", schema, **SMALL)).eval()
    ids, dense, _ = rows(8)
    domain = torch.zeros(8, dtype=torch.int64)
    answers = {}
    for share in (30.0, -30.0):
        with torch.no_grad():
            model.own_share.fill_(share)
            before = model(ids, dense, domain)
            model.own_expert[0].weight[1] += 1.0  # another domain's
            answers[share] = torch.allclose(before, model(ids, dense, domain))
    assert answers == {30.0: True, -30.0: False}


def test_m3oes_gate_teaches_the_representation_nothing(schema, rows, stir):
    model = stir(build_model("m3oe", schema, **SMALL))
    seen = []
    model.gate.register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    model(*rows(8))
    assert seen == [False]


def test_options(schema):
    sar_net = build_model("sar_net", schema, num_experts=3, num_own_experts=2, attention_units=5, **SMALL)
    assert (len(sar_net.tower), len(sar_net.own_experts), sar_net.gate.out_features) == (3, 2, 5)
    assert sar_net.attention[0].out_features == 5
    m3oe = build_model("m3oe", schema, num_experts=3, domain_units=(5, 4), **SMALL)
    assert (len(m3oe.tower), m3oe.gate.out_features, m3oe.head.in_features) == (
        4,
        3,
        4,
    )  # the task's expert is one more
