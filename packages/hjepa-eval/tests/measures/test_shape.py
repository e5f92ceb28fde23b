"""α-ReQ, isotropy, alignment, uniformity, mean cosine and CKA against loops over their definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hjepa_eval import (
    FeatureSet,
    alignment,
    alpha_req,
    cka_interval,
    cka_matrix,
    isotropy,
    jackknife,
    linear_cka,
    mean_cosine,
    uniformity,
)
from hjepa_eval.measures import cka, sphere


def features(seed, n, width, decay=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator) * torch.arange(1.0, width + 1) ** (-decay / 2) + 2.0


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_of_a_power_law_is_found_and_equals_numpys_weighted_fit(device, alpha):
    z = features(0, 4000, 150, alpha)
    found = alpha_req(z.to(device)).item()
    assert found == pytest.approx(alpha, abs=0.12)
    eigenvalues = np.linalg.eigvalsh(np.cov(z.double().numpy().T, bias=True))[::-1][3:100]
    ranks = np.arange(4, 101)
    # polyfit squares its weights.
    slope = np.polyfit(np.log(ranks), np.log(eigenvalues), 1, w=np.sqrt(1 / ranks))[0]
    assert found == pytest.approx(-slope, rel=1e-6)


def test_alpha_needs_eigenvalues_in_the_range():
    assert math.isnan(alpha_req(features(0, 50, 3)).item())
    with pytest.raises(ValueError, match="ranks"):
        alpha_req(features(0, 50, 8), ranks=(5, 5))


def naive_isoscore(z):
    """The paper's steps: principal axes, variances normed to sqrt(D), distance to isotropy, rescaling."""
    z = z.double() - z.double().mean(0)
    width = z.shape[1]
    rotated = z @ torch.linalg.eigh(z.T @ z).eigenvectors
    variance = rotated.square().mean(0)
    normed = math.sqrt(width) * variance / variance.norm()
    defect = (normed - 1).norm() / math.sqrt(2 * (width - math.sqrt(width)))
    phi = (width - defect**2 * (width - math.sqrt(width))) ** 2 / width**2
    return ((width * phi - 1) / (width - 1)).item()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), width=st.integers(2, 9), decay=st.sampled_from([0.0, 1.0, 4.0]))
def test_isotropy_is_isoscore(device, seed, width, decay):
    z = features(seed, 40, width, decay)
    assert isotropy(z.to(device)).item() == pytest.approx(naive_isoscore(z), abs=1e-9)


def test_isotropy_is_one_for_a_ball_and_zero_for_a_line(device):
    ball = torch.cat((torch.eye(6), -torch.eye(6))).to(device)
    assert isotropy(ball).item() == pytest.approx(1)
    assert isotropy(
        torch.arange(9.0, device=device)[:, None] * torch.ones(1, 4, device=device)
    ).item() == pytest.approx(0)
    assert isotropy(torch.ones(9, 4, device=device)).item() == 0
    with pytest.raises(ValueError, match="two dimensions"):
        isotropy(torch.ones(9, 1))


@pytest.mark.parametrize("elements", [1, 30, 2**24])
def test_pairs_on_the_sphere_equal_loops(device, monkeypatch, elements):
    monkeypatch.setattr(sphere, "ELEMENTS", elements)
    x, y = features(1, 14, 5), features(2, 14, 5)
    u, v = (z.double() / z.double().norm(dim=1, keepdim=True) for z in (x, y))
    pairs = [(i, j) for i in range(14) for j in range(i + 1, 14)]
    expected = math.log(sum(math.exp(-2 * float((u[i] - u[j]).square().sum())) for i, j in pairs) / len(pairs))
    assert uniformity(x.to(device)).item() == pytest.approx(expected, rel=1e-9)
    expected = sum(float((u[i] - v[i]).norm()) ** 2 for i in range(14)) / 14
    assert alignment(x.to(device), y.to(device)).item() == pytest.approx(expected, rel=1e-9)
    expected = sum(float(u[i] @ u[j]) for i, j in pairs) / len(pairs)
    assert mean_cosine(x.to(device)).item() == pytest.approx(expected, rel=1e-9)
    # However small features are.
    tiny = 2.0**-60 * x.to(device)
    assert uniformity(tiny).item() == uniformity(x.to(device)).item()
    assert mean_cosine(tiny).item() == mean_cosine(x.to(device)).item()
    assert alignment(tiny, x.to(device)).item() == 0


@pytest.mark.parametrize("elements", [1, 100, 2**24])
def test_cka_equals_its_kernel_form_and_ignores_rotation_and_scale(device, monkeypatch, elements):
    monkeypatch.setattr(cka, "ELEMENTS", elements)
    x, y = features(3, 30, 7), features(4, 30, 4)
    y[:, 0] = x[:, 0]
    centre = torch.eye(30, dtype=torch.float64) - 1 / 30
    k, m = (centre @ z.double() @ z.double().T @ centre for z in (x, y))
    expected = ((k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt()).item()
    found = linear_cka(x.to(device), y.to(device)).item()
    assert found == pytest.approx(expected, rel=1e-9)
    rotation = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(0)).double()).Q
    assert linear_cka(x.double() @ rotation * 5 - 3, y).item() == pytest.approx(expected, rel=1e-9)
    assert linear_cka(x, x).item() == pytest.approx(1)
    assert linear_cka(x, torch.ones(30, 2)).item() == 0
    names, matrix = cka_matrix(
        {n: FeatureSet(values=z, labels=torch.zeros(30).long()) for n, z in (("a", x), ("b", y))}
    )
    assert names == ["a", "b"]
    assert torch.allclose(matrix, torch.tensor([[1, expected], [expected, 1]], dtype=torch.float64))


@pytest.mark.parametrize("elements", [1, 2**24])
def test_the_interval_of_cka_is_that_of_the_jackknife(device, monkeypatch, elements):
    """Of the samples, leaving out a group at a time; the features lie far from 0, and 33 samples fill ten groups."""
    monkeypatch.setattr(cka, "ELEMENTS", elements)
    x, y = 50 + features(3, 33, 7).double(), features(4, 33, 4).double() - 90
    y[:, 0] = x[:, 0]
    expected = jackknife(torch.arange(33), lambda chosen: linear_cka(x[chosen], y[chosen]))
    found = cka_interval(x.to(device), y.to(device))
    assert (found.value, found.low, found.high) == pytest.approx(
        (expected.value, expected.low, expected.high), rel=1e-9
    )
    assert (found.n, found.method) == (33, "jackknife")
    assert found.high - found.low > 0.01
    with pytest.raises(ValueError, match="groups=17"):
        cka_interval(x, y, groups=17)


def test_wrong_shapes_are_refused_in_one_line():
    with pytest.raises(ValueError, match="same samples"):
        linear_cka(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="one size"):
        alignment(torch.zeros(3, 2), torch.zeros(4, 2))
    for function in (uniformity, mean_cosine):
        with pytest.raises(ValueError, match="two samples"):
            function(torch.zeros(1, 2))


def test_cka_of_what_is_not_finite_is_no_number():
    x = features(3, 30, 7)
    assert math.isnan(linear_cka(x, x / 0).item())


def test_features_that_are_all_zero_are_a_collapse_and_not_uniform():
    assert uniformity(torch.zeros(10, 4)).item() == 0
    half = torch.cat((torch.zeros(1, 4), torch.eye(4)[:1]))
    assert uniformity(half).item() == pytest.approx(-2)
