import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hjepa_eval import alpha_req, effective_rank, isotropy, judge_collapse, lidar, rankme, spread


def naive_rank(z, eps, centred):
    """The formula, by singular values in Python floats."""
    z = z.double() - (z.double().mean(0) if centred else 0)
    sigma = torch.linalg.svdvals(z).tolist()
    total = sum(sigma)
    p = [s / total + eps for s in sigma]
    return math.exp(-sum(x * math.log(x) for x in p if x > 0))


def test_isotropic_features_have_full_rank(device):
    z = torch.eye(16, device=device)
    assert rankme(z).item() == pytest.approx(16, rel=1e-5)
    both = torch.cat((z, -z))
    assert effective_rank(both).item() == pytest.approx(16, rel=1e-9)


def test_rank_one_and_no_variance_are_the_floor(device):
    one = torch.arange(1.0, 9.0, device=device)[:, None] * torch.ones(1, 5, device=device)
    assert rankme(one).item() == pytest.approx(1, abs=1e-4)
    assert effective_rank(one).item() == pytest.approx(1, abs=1e-9)
    constant = torch.full((8, 5), 3.3, device=device)
    assert effective_rank(constant).item() == 1.0
    assert rankme(torch.zeros(8, 5, device=device)).item() == pytest.approx(1, abs=1e-4)


def test_rankme_adds_its_epsilon_to_every_share(device):
    z = torch.zeros(400, 300, device=device)
    z[:, 0] = 1.0
    p = [1 + 1e-7] + [1e-7] * 299
    assert rankme(z).item() == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)), rel=1e-9)
    assert rankme(z).item() > 1.0004


def test_a_constant_offset_moves_rankme_and_not_the_effective_rank(device):
    generator = torch.Generator().manual_seed(0)
    z = (torch.randn(25_600, 384, generator=generator) + 10.0).to(device)
    assert rankme(z).item() == pytest.approx(98, abs=1.5)
    assert effective_rank(z).item() == pytest.approx(383.3, abs=0.1)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000), n=st.integers(12, 40), width=st.integers(1, 10), scale=st.sampled_from([1e-3, 1.0, 50])
)
def test_equal_the_published_formulas(device, seed, n, width, scale):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, width, generator=generator) * torch.logspace(0, -2, width) * scale
    assert rankme(z.to(device)).item() == pytest.approx(naive_rank(z, 1e-7, centred=False), rel=1e-5)
    assert effective_rank(z.to(device)).item() == pytest.approx(naive_rank(z, 0.0, centred=True), rel=1e-5)
    assert 1 - 1e-9 <= effective_rank(z.to(device)).item() <= min(n - 1, width) + 1e-9


@pytest.mark.parametrize(("n", "width"), [(300, 120), (60, 120)])
def test_what_is_rounding_in_a_gram_matrix_does_not_count(device, n, width):
    generator = torch.Generator().manual_seed(0)
    steep = torch.randn(n, width, generator=generator, dtype=torch.float64) * torch.logspace(0, -9, width)
    assert rankme(steep.to(device)).item() == pytest.approx(naive_rank(steep, 1e-7, centred=False), rel=1e-5)
    one = torch.randn(n, 1, generator=generator) @ torch.randn(1, width, generator=generator)
    p = [1 + 1e-7] + [1e-7] * (min(n, width) - 1)
    expected = math.exp(-sum(x * math.log(x) for x in p))
    assert rankme(one.double().to(device)).item() == pytest.approx(expected, rel=1e-6)


def test_spread_is_the_standard_deviation_of_each_dimension(device):
    z = torch.tensor([[0.0, 0.0, 5.0], [2.0, 4.0, 5.0]], device=device)
    found = spread(z)
    root = math.sqrt(2)
    assert (found.minimum, found.median, found.maximum) == pytest.approx((0.0, root, 2 * root))
    assert found.mean == pytest.approx(root)


def test_shapes_without_a_spectrum_are_refused():
    for function in (rankme, effective_rank, spread):
        with pytest.raises(ValueError, match="shape"):
            function(torch.zeros(4))
    with pytest.raises(ValueError, match="two samples"):
        spread(torch.zeros(1, 3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_told_in_one_line(bad):
    z = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    z[3, 2] = bad
    for measure in (rankme, effective_rank, alpha_req, isotropy, judge_collapse, lambda z: lidar(z.view(10, 4, 8))):
        with pytest.raises(ValueError, match="z: NaN or infinity"):
            measure(z)
