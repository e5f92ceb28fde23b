import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hjepa_eval import lidar


def naive_lidar(z, delta, eps):
    """Equations 1 to 4 in loops, with the inverse root taken as a matrix function."""
    n, q, width = z.shape
    z = z.double()
    centres = [sum(z[i, j] for j in range(q)) / q for i in range(n)]
    mean = sum(centres) / n
    between = sum(torch.outer(c - mean, c - mean) for c in centres) / n
    within = sum(torch.outer(z[i, j] - centres[i], z[i, j] - centres[i]) for i in range(n) for j in range(q)) / (n * q)
    values, vectors = torch.linalg.eigh(within + delta * torch.eye(width, dtype=torch.float64))
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    eigenvalues = torch.linalg.eigvalsh(root @ between @ root).clamp_min(0).tolist()
    total = sum(eigenvalues)
    p = [eigenvalue / total + eps for eigenvalue in eigenvalues]
    return math.exp(-sum(x * math.log(x) for x in p))


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(2, 12),
    q=st.integers(2, 5),
    width=st.integers(1, 8),
    noise=st.sampled_from([0.0, 0.1, 3.0]),
)
def test_equals_the_published_formula(device, seed, n, q, width, noise):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 1, width, generator=generator) + noise * torch.randn(n, q, width, generator=generator)
    expected = naive_lidar(z, 1e-4, 1e-7)
    assert lidar(z.to(device)).item() == pytest.approx(expected, rel=1e-5)


def test_directions_that_only_views_differ_in_do_not_count(device):
    """RankMe sees 8 directions; 4 of them are noise of the views."""
    generator = torch.Generator().manual_seed(0)
    told = torch.randn(500, 1, 4, generator=generator).expand(-1, 10, -1) + 0.1 * torch.randn(
        500, 10, 4, generator=generator
    )
    z = torch.cat((told, torch.randn(500, 10, 4, generator=generator)), dim=2)
    assert lidar(z.to(device)).item() == pytest.approx(4, abs=0.15)


def test_a_collapse_is_the_floor_and_wrong_shapes_are_refused(device):
    assert lidar(torch.ones(5, 3, 4, device=device)).item() == pytest.approx(1, abs=1e-4)
    for shape in ((4, 3), (1, 3, 2), (3, 1, 2)):
        with pytest.raises(ValueError, match="shape"):
            lidar(torch.zeros(shape))
    with pytest.raises(ValueError, match="delta"):
        lidar(torch.zeros(3, 3, 2), delta=0.0)
