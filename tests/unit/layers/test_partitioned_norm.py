import pytest
import torch

from domlora.layers.partitioned_norm import PartitionedNorm

DOMAIN = torch.tensor([2, 0, 0, 2, 0, -1, 2, 1])  # domain 1 has one row, domain 3 none
EPS = 1e-3


@pytest.fixture
def norm():
    torch.manual_seed(0)
    norm = PartitionedNorm(5, num_domains=4)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(1.0, 0.5)
    return norm


@pytest.fixture
def x():
    torch.manual_seed(1)
    return 3 * torch.randn(8, 5) + 2


def standardised(x, rows):
    return (x - rows.mean(0)) / (rows.var(0, unbiased=False) + EPS).sqrt()


def own(norm, domain, z):
    return norm.weight * norm.domain_weight[domain] * z + norm.bias + norm.domain_bias[domain]


def test_training_uses_the_statistics_of_the_domain_in_the_batch(norm, x):
    y = norm(x, DOMAIN)
    for domain in (0, 2):
        rows = DOMAIN.eq(domain)
        torch.testing.assert_close(y[rows], own(norm, domain, standardised(x[rows], x[rows])))


def test_a_lonely_row_and_an_unknown_domain_use_the_whole_batch(norm, x):
    y = norm(x, DOMAIN)
    torch.testing.assert_close(y[7], own(norm, 1, standardised(x[7], x)))
    torch.testing.assert_close(y[5], norm.weight * standardised(x[5], x) + norm.bias)


def test_evaluation_does_not_depend_on_batch_mates(norm, x):
    for _ in range(3):
        norm(x + torch.randn_like(x), DOMAIN)
    norm.eval()
    together = norm(x, DOMAIN)
    alone = torch.cat([norm(x[i : i + 1], DOMAIN[i : i + 1]) for i in range(len(x))])
    assert torch.equal(together, alone)
    assert norm(x[:0], DOMAIN[:0]).shape == (0, 5)


def test_evaluation_of_domains_that_never_occurred_uses_what_is_shared(norm, x):
    norm(x, DOMAIN)
    norm.eval()
    shared = norm.weight * standardised(x, x) + norm.bias
    for domain in (-1, 1, 3):  # domain 1 had a single row: no variance of its own yet
        torch.testing.assert_close(norm(x, torch.full_like(DOMAIN, domain)), shared)


def test_the_first_batch_needs_no_warm_up_and_later_ones_are_averaged(norm, x):
    rows = DOMAIN.eq(0)
    norm(x, DOMAIN)
    torch.testing.assert_close(norm.running_mean[0], x[rows].mean(0))
    torch.testing.assert_close(norm.running_var[-1], x.var(0, unbiased=False))
    norm(x + 4, DOMAIN)
    torch.testing.assert_close(norm.running_mean[0], x[rows].mean(0) + 2)
    norm.num_batches.fill_(1000)
    before = norm.running_mean[0].clone()
    norm(x, DOMAIN)
    torch.testing.assert_close(norm.running_mean[0], 0.99 * before + 0.01 * x[rows].mean(0))
    assert norm.num_batches.tolist() == [1001, 1000, 1001, 1000, 1001]


def test_a_domain_that_is_not_in_the_batch_keeps_its_statistics(norm, x):
    norm(x, DOMAIN)
    before = norm.running_mean.clone(), norm.running_var.clone()
    norm(x[:3], torch.tensor([0, 0, 0]))
    for old, new in zip(before, (norm.running_mean, norm.running_var), strict=True):
        assert torch.equal(old[[1, 2, 3]], new[[1, 2, 3]])
        assert not torch.equal(old[0], new[0])


def test_a_frozen_layer_does_not_drift(norm, x):
    norm(x, DOMAIN)
    expected = norm.eval()(x, DOMAIN)
    norm.train().requires_grad_(False)
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    assert torch.equal(norm(x, DOMAIN), expected)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


def test_a_training_batch_of_one_row_is_normalised_as_in_evaluation(norm, x):
    norm(x, DOMAIN)
    before = norm.running_mean.clone()
    y = norm(x[:1], DOMAIN[:1])
    assert torch.equal(y, norm.eval()(x[:1], DOMAIN[:1]))
    assert torch.equal(norm.running_mean, before)


def test_permuting_rows_permutes_the_answer(norm, x):
    order = torch.tensor([5, 2, 7, 0, 1, 4, 3, 6])
    torch.testing.assert_close(norm(x, DOMAIN)[order], norm(x[order], DOMAIN[order]))


def test_gradients_are_those_of_finite_differences(norm, x):
    norm = norm.double()
    norm._update_ = lambda *_: None  # the running statistics are no part of the answer
    assert torch.autograd.gradcheck(lambda x: norm(x, DOMAIN), (x.double().requires_grad_(),))
