import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hjepa_models.objectives import VICRegForm, vicreg_loss, vicreg_terms


def naive_terms(z, gamma=1.0, eps=1e-4):
    z = z.double()
    n, width = z.shape
    mean = [sum(float(z[i, j]) for i in range(n)) / n for j in range(width)]
    cov = [
        [
            sum((float(z[i, a]) - mean[a]) * (float(z[i, b]) - mean[b]) for i in range(n)) / max(n - 1, 1)
            for b in range(width)
        ]
        for a in range(width)
    ]
    variance = sum(max(0.0, gamma - (cov[j][j] + eps) ** 0.5) for j in range(width)) / width
    covariance = sum(cov[a][b] ** 2 for a in range(width) for b in range(width) if a != b) / width
    return variance, covariance


@pytest.mark.parametrize("scale", [0.1, 0.8, 3.0])
@pytest.mark.parametrize("rows", [1, 4, 5, 9])
def test_terms_equal_a_naive_float64_loop(device, scale, rows):
    z = scale * torch.randn(rows, 5, device=device) + 7
    assert [float(term) for term in vicreg_terms(z)] == pytest.approx(naive_terms(z.cpu()), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("form", "channels", "share"), [("algorithm", 1, 1.0), ("equations", 6, 1.0), ("released", 1, 0.5)]
)
def test_loss_is_the_published_sum_in_each_form(device, form, channels, share):
    first, second = 0.7 * torch.randn(2, 16, 6, device=device)
    expected = 3 * channels * float((first - second).square().mean())
    for z in (first, second):
        variance, covariance = naive_terms(z.cpu())
        expected += share * 5 * variance + 2 * covariance
    assert float(vicreg_loss(first, second, 3.0, 5.0, 2.0, form)) == pytest.approx(expected, rel=1e-4)


def test_equation_five_sums_over_channels(device):
    first, second = torch.randn(2, 16, 6, device=device)
    squares = [float((a - b) @ (a - b)) for a, b in zip(first, second, strict=True)]
    loss = vicreg_loss(first, second, 1.0, 0.0, 0.0, VICRegForm.equations)
    assert float(loss) == pytest.approx(sum(squares) / 16, rel=1e-5)


def test_the_default_is_algorithm_one_with_the_published_weights(device):
    first, second = torch.randn(2, 16, 6, device=device)
    assert torch.equal(vicreg_loss(first, second), vicreg_loss(first, second, 25.0, 25.0, 1.0, VICRegForm.algorithm))


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form='paper': unknown choice; allowed: algorithm, equations, released"):
        vicreg_loss(torch.ones(2, 2), torch.ones(2, 2), form="paper")


def test_collapse_is_expensive_and_its_gradient_finite(device):
    z = torch.zeros(16, 6, device=device, requires_grad=True)
    term = vicreg_terms(z).variance
    term.backward()
    assert float(term.detach()) == pytest.approx(0.99)
    assert z.grad.isfinite().all()


def test_traps_score_badly_as_far_as_vicreg_can_see_them(device):
    z = torch.randn(2048, 64, generator=torch.Generator().manual_seed(0)).to(device)
    isotropic = vicreg_terms(z)
    rank_one = vicreg_terms(z[:, :1] * torch.ones(64, device=device))
    shrunken = vicreg_terms(0.01 * z)
    dead = vicreg_terms(z * (torch.arange(64, device=device) < 8))
    shifted = vicreg_terms(z + 3)
    assert float(isotropic.variance) < 0.02
    assert float(isotropic.covariance) == pytest.approx(63 / 2048, rel=0.1)
    assert float(rank_one.covariance) > 50
    assert float(shrunken.variance) > 0.98
    assert float(dead.variance) > 0.8
    # A shift is the one that it cannot see; SIGReg can.
    torch.testing.assert_close(shifted, isotropic, rtol=1e-3, atol=1e-4)


@given(st.integers(2, 9), st.integers(0, 5), st.floats(0.01, 10.0), st.integers(0, 99))
def test_weights_of_zero_leave_rows_out_and_a_common_factor_changes_nothing(device, rows, more, factor, seed):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows + more, 4, generator=generator, dtype=torch.float64).to(device)
    weight = torch.cat([torch.full((rows,), factor), torch.zeros(more)]).to(device)
    torch.testing.assert_close(vicreg_terms(z, weight=weight), vicreg_terms(z[:rows]))


def test_weighted_terms_equal_a_naive_float64_covariance(device):
    z, weight = 0.6 * torch.randn(12, 5, dtype=torch.float64), torch.rand(12)
    cov = torch.cov(z.T, aweights=weight.double())
    variance, covariance = vicreg_terms(z.to(device), weight=weight.to(device))
    assert float(variance) == pytest.approx(float((1 - (cov.diagonal() + 1e-4).sqrt()).relu().mean()))
    off = cov - cov.diagonal().diag()
    assert float(covariance) == pytest.approx(float(off.square().sum() / 5))


@pytest.mark.parametrize("known", [0, 1])
def test_too_few_known_rows_are_finite(device, known):
    z = torch.randn(6, 3, device=device, requires_grad=True)
    weight = (torch.arange(6, device=device) < known).float()
    terms = vicreg_terms(z, weight=weight)
    (terms.variance + terms.covariance).backward()
    assert float(terms.variance.detach()) == pytest.approx(0.99)
    assert z.grad.isfinite().all()
