import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hjepa_models.objectives.kl import categorical_kl, dynamics_kl, kl_balance


def probabilities(logits):
    weights = [math.exp(float(x)) for x in logits]
    return [w / sum(weights) for w in weights]


def naive_kl(first, second):
    return sum(p * math.log(p / q) for p, q in zip(probabilities(first), probabilities(second), strict=True))


def laws(device, rows=5, groups=3, classes=4, dtype=torch.float32, scale=2.0):
    first, second = scale * torch.randn(2, rows, groups, classes, dtype=dtype, device=device)
    return first.requires_grad_(), second.requires_grad_()


@given(st.integers(2, 9), st.floats(0.0, 8.0), st.integers(0, 2**31))
def test_divergence_equals_a_naive_float64_loop_and_is_not_negative(device, classes, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    first, second = scale * torch.randn(2, 3, classes, generator=generator)
    expected = [naive_kl(*pair) for pair in zip(first, second, strict=True)]
    kl = categorical_kl(first.to(device), second.to(device))
    assert kl.tolist() == pytest.approx(expected, rel=1e-4, abs=2e-6)
    assert kl.min() > -1e-6
    torch.testing.assert_close(categorical_kl(first + 3, first - 5), torch.zeros(3), atol=1e-6, rtol=0)


def test_balance_equals_a_naive_float64_loop(device):
    posterior, prior = laws(device, rows=8, scale=0.9)
    rows = [
        sum(naive_kl(*pair) for pair in zip(q, p, strict=True))
        for q, p in zip(posterior.detach().cpu(), prior.detach().cpu(), strict=True)
    ]
    assert min(rows) < 1.7 < max(rows)
    out = kl_balance(posterior, prior, free_bits=1.7, dynamics=0.5, representation=0.1)
    assert out.loss.item() == pytest.approx(0.6 * sum(max(1.7, row) for row in rows) / 8, rel=1e-5)
    assert float(out.kl) == pytest.approx(sum(rows) / 8, rel=1e-5)
    assert not out.kl.requires_grad
    assert dynamics_kl(posterior, prior, 1.7).item() == pytest.approx(sum(max(1.7, row) for row in rows) / 8, rel=1e-5)


def test_each_term_trains_one_side_with_its_weight(device):
    posterior, prior = laws(device)
    full = torch.autograd.grad(categorical_kl(posterior, prior).sum(-1).mean(), (posterior, prior))
    for dynamics, representation in ((0.5, 0.1), (1.0, 0.0), (0.0, 1.0)):
        loss = kl_balance(posterior, prior, 0.0, dynamics, representation).loss
        balanced = torch.autograd.grad(loss, (posterior, prior))
        torch.testing.assert_close(balanced[0], representation * full[0])
        torch.testing.assert_close(balanced[1], dynamics * full[1])


def test_free_bits_stop_the_gradient_row_by_row(device):
    posterior, prior = laws(device, rows=2)
    with torch.no_grad():
        prior[0] = posterior[0] + 0.1 * torch.randn_like(prior[0])
    out = kl_balance(posterior, prior, free_bits=1.0)
    out.loss.backward()
    for logits in (posterior, prior):
        assert not logits.grad[0].any()
        assert logits.grad[1].abs().max() > 1e-3
    alone = kl_balance(posterior[:1], prior[:1], free_bits=1.0, dynamics=0.5, representation=0.1)
    assert alone.loss.item() == pytest.approx(0.6)
    assert 0 < float(alone.kl) < 0.2


def test_gradients_are_those_of_finite_differences(device):
    posterior, prior = laws(device, dtype=torch.float64)
    assert torch.autograd.gradcheck(categorical_kl, (posterior, prior))
    assert torch.autograd.gradcheck(lambda p: kl_balance(posterior.detach(), p, 0.0, 1.0, 0.0).loss, prior)
    assert torch.autograd.gradcheck(lambda q: kl_balance(q, prior.detach(), 0.0, 0.0, 1.0).loss, posterior)


def test_half_precision_and_near_certain_laws_stay_finite(device):
    posterior, prior = laws(device, scale=60.0)
    with torch.autocast(device.type, torch.bfloat16):
        out = kl_balance(posterior.bfloat16(), prior.bfloat16())
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert float(out.loss.detach()) > 10
    assert posterior.grad.isfinite().all()
    assert prior.grad.isfinite().all()
    torch.testing.assert_close(out.loss, kl_balance(posterior.bfloat16().float(), prior.bfloat16().float()).loss)
