import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from hjepa_models.objectives import random_directions, sigreg


def naive(z, directions, knots, t_max):
    """The published formula by plain loops in float64."""
    rows, total = len(z), 0.0
    for a in directions.T.double():
        values = []
        projected = [float(x @ a) for x in z.double()]
        for k in range(knots):
            t = t_max * k / (knots - 1)
            real = sum(math.cos(t * x) for x in projected) / rows
            imaginary = sum(math.sin(t * x) for x in projected) / rows
            error = (real - math.exp(-t * t / 2)) ** 2 + imaginary**2
            values.append(math.exp(-t * t / 2) * error)
        width = t_max / (knots - 1)
        total += rows * 2 * width * (sum(values) - (values[0] + values[-1]) / 2)
    return total / directions.shape[1]


@pytest.mark.parametrize("fields", [{"knots": 1}, {"num_directions": 0}, {"t_max": 0.0}])
def test_nothing_to_integrate_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        sigreg(torch.randn(8, 4), 0, **fields)


@pytest.mark.parametrize(("knots", "t_max"), [(17, 3.0), (9, 2.0)])
def test_equals_a_naive_float64_loop(device, knots, t_max):
    z = 1.5 * torch.randn(7, 6, device=device) + 0.3
    expected = naive(z.cpu(), random_directions(5, 6, 8), knots, t_max)
    assert float(sigreg(z, 5, 8, knots, t_max)) == pytest.approx(expected, rel=1e-4)


def test_gradient_is_that_of_finite_differences(device):
    z = torch.randn(2, 5, 4, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sigreg(x, 3, 6), z)


def test_views_are_separate_samples_under_the_same_directions(device):
    z = torch.randn(3, 32, 8, device=device)
    alone = torch.stack([sigreg(view, 1, 16) for view in z]).mean()
    torch.testing.assert_close(sigreg(z, 1, 16), alone)


def test_an_isotropic_normal_scores_about_one_and_collapses_score_badly(device):
    z = torch.randn(2048, 64, generator=torch.Generator().manual_seed(0)).to(device)
    isotropic = float(sigreg(z, 0))
    rank_one = float(sigreg(z[:, :1] * torch.ones(64, device=device), 0))
    tiny = float(sigreg(z * 0.01, 0))
    shifted = float(sigreg(z + 3, 0))
    constant = float(sigreg(torch.zeros_like(z), 0))
    assert isotropic == pytest.approx(1.0, abs=0.15)
    assert rank_one > 200
    assert tiny == pytest.approx(823, rel=0.01)
    assert constant > 800
    assert shifted > 2000


def test_the_statistic_of_a_normal_sample_does_not_grow_with_its_size(device):
    z = torch.randn(4096, 32, generator=torch.Generator().manual_seed(1)).to(device)
    assert float(sigreg(z[:256], 0)) == pytest.approx(float(sigreg(z, 0)), rel=0.3)


def test_it_repairs_a_collapse(device):
    # A sample in a line: descending the statistic spreads it over all axes.
    generator = torch.Generator().manual_seed(0)
    z = (torch.randn(256, 1, generator=generator) * torch.ones(4) + 0.05 * torch.randn(256, 4, generator=generator)).to(
        device
    )
    z.requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    before = float(sigreg(z.detach(), 0, 64))
    for step in range(150):
        optimizer.zero_grad()
        sigreg(z, step, 64).backward()
        optimizer.step()
    eigenvalues = torch.linalg.eigvalsh(torch.cov(z.detach().T))
    assert float(sigreg(z.detach(), 0, 64)) < 0.05 * before
    assert eigenvalues.min() > 0.5


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 40))
def test_directions_are_unit_and_pure_in_the_seed(device, seed, dim, count):
    first = random_directions(seed, dim, count, device)
    assert first.shape == (dim, count)
    assert torch.equal(first, random_directions(seed, dim, count, device))
    torch.testing.assert_close(first.norm(dim=0), torch.ones(count, device=device))
    torch.testing.assert_close(first.cpu(), random_directions(seed, dim, count), atol=1e-4, rtol=1e-4)


def test_directions_cover_the_sphere_and_differ_between_steps(device):
    draws = torch.cat([random_directions(step, 8, 512, device) for step in range(40)], dim=1)
    assert draws.mean(1).abs().max() < 0.02
    torch.testing.assert_close(draws @ draws.T / draws.shape[1] * 8, torch.eye(8, device=device), atol=0.06, rtol=0)
    cosine = (draws[:, :512] * draws[:, 512:1024]).sum(0)
    assert cosine.abs().max() < 0.999


def test_autocast_does_not_touch_the_statistic(device):
    z = torch.randn(64, 16, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        inside = sigreg(z, 1, 32)
    assert torch.equal(inside, sigreg(z, 1, 32))


@given(st.integers(0, 2**62))
def test_a_tensor_seed_gives_the_numbers_of_the_int(device, seed):
    tensor = torch.tensor(seed, dtype=torch.int64, device=device)
    assert torch.equal(random_directions(tensor, 5, 7, device), random_directions(seed, 5, 7, device))


def test_a_tensor_seed_is_not_read_on_the_host(device):
    with FakeTensorMode():
        seed = torch.empty((), dtype=torch.int64, device=device)
        assert random_directions(seed, 5, 7).device.type == device.type
        assert sigreg(torch.empty(16, 4, device=device), seed, 8).shape == ()


def test_sigreg_takes_a_tensor_seed_and_is_not_compiled_anew_when_it_changes(device):
    z = torch.randn(16, 4, device=device)
    compiled = torch.compile(lambda x, seed: sigreg(x, seed, 8), fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(4):
            x, y = (z.clone().requires_grad_() for _ in range(2))
            fast, plain = compiled(x, torch.tensor(step, device=device)), sigreg(y, step, 8)
            torch.testing.assert_close(fast, plain)
            fast.backward()
            plain.backward()
            torch.testing.assert_close(x.grad, y.grad)
