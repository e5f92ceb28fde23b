import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hjepa_models.objectives import symexp, symlog


@given(st.floats(-1e30, 1e30))
def test_equals_the_formula_and_is_undone(device, value):
    x = torch.tensor(value, dtype=torch.float64, device=device)
    expected = math.copysign(math.log1p(abs(value)), value)
    assert float(symlog(x)) == pytest.approx(expected, rel=1e-12, abs=1e-300)
    assert float(symexp(symlog(x))) == pytest.approx(value, rel=1e-12, abs=1e-300)


@given(st.floats(-80.0, 80.0))
def test_symexp_equals_the_formula(device, value):
    x = torch.tensor(value, dtype=torch.float64, device=device)
    assert float(symexp(x)) == pytest.approx(math.copysign(math.expm1(abs(value)), value), rel=1e-12, abs=1e-300)


def test_known_values_and_extremes(device):
    x = torch.tensor([0.0, 1e-20, math.e - 1, -(math.e - 1), 3e38, -3e38], device=device)
    wanted = torch.tensor([0.0, 1e-20, 1.0, -1.0, 88.5967, -88.5967], device=device)
    torch.testing.assert_close(symlog(x), wanted, rtol=1e-5, atol=0)
    assert symexp(torch.tensor([-1e3, 1e3], device=device)).tolist() == [-math.inf, math.inf]
    assert symlog(torch.tensor([-math.inf, math.inf], device=device)).tolist() == [-math.inf, math.inf]


@pytest.mark.parametrize("function", [symlog, symexp])
def test_nan_is_not_hidden(device, function):
    assert function(torch.tensor(math.nan, device=device)).isnan()


def test_the_derivative_is_right_everywhere_even_at_zero(device):
    x = torch.tensor([-2.0, -1e-9, 0.0, 1e-9, 2.0, 1e20], dtype=torch.float64, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(symlog(x).sum(), x)
    torch.testing.assert_close(gradient, 1 / (1 + x.detach().abs()))
    small = x[:5].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(symexp(small).sum(), small)
    torch.testing.assert_close(gradient, small.detach().abs().exp())
    for function in (symlog, symexp):
        assert torch.autograd.gradcheck(function, small)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=8))
def test_both_are_odd_and_rise(device, values):
    x = torch.tensor(sorted(values), dtype=torch.float64, device=device)
    for function in (symlog, lambda y: symexp(y / 1e5)):
        assert torch.equal(function(-x), -function(x))
        assert (function(x).diff() >= 0).all()
