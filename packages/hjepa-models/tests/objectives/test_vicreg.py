import pytest
import torch

from hjepa_models.objectives import vicreg_loss, vicreg_terms


def naive_terms(z, gamma=1.0, eps=1e-4):
    z = z.double()
    n, width = z.shape
    mean = [sum(float(z[i, j]) for i in range(n)) / n for j in range(width)]
    cov = [
        [sum((float(z[i, a]) - mean[a]) * (float(z[i, b]) - mean[b]) for i in range(n)) / (n - 1) for b in range(width)]
        for a in range(width)
    ]
    variance = sum(max(0.0, gamma - (cov[j][j] + eps) ** 0.5) for j in range(width)) / width
    covariance = sum(cov[a][b] ** 2 for a in range(width) for b in range(width) if a != b) / width
    return variance, covariance


@pytest.mark.parametrize("scale", [0.1, 0.8, 3.0])
def test_terms_equal_a_naive_float64_loop(device, scale):
    z = scale * torch.randn(9, 5, device=device) + 7
    assert [float(term) for term in vicreg_terms(z)] == pytest.approx(naive_terms(z.cpu()), rel=1e-3, abs=1e-6)


def test_loss_is_the_published_sum(device):
    first, second = torch.randn(2, 16, 6, device=device)
    expected = 25 * float((first - second).square().mean())
    for z in (first, second):
        variance, covariance = naive_terms(z.cpu())
        expected += 25 * variance + covariance
    assert float(vicreg_loss(first, second)) == pytest.approx(expected, rel=1e-4)


def test_collapse_is_expensive_and_its_gradient_finite(device):
    z = torch.zeros(16, 6, device=device, requires_grad=True)
    term = vicreg_terms(z).variance
    term.backward()
    assert float(term.detach()) == pytest.approx(0.99)
    assert z.grad.isfinite().all()
