import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hjepa_models import Canvas, Pooling, coarsen, dense_canvas, max_levels, num_tokens, pool_canvas, upsample_canvas

grids = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)


def random_canvas(grid, device, width=3, batch=2, seed=0, known=0.6):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, num_tokens(grid), width, generator=generator, dtype=torch.float64)
    weight = (torch.rand(batch, num_tokens(grid), generator=generator) < known).double()
    return Canvas(values.to(device), weight.to(device), grid)


def naive_pool(canvas, grid, level):
    """Average cell by cell with plain loops; returns values, weights."""
    stride, coarse = 2**level, coarsen(grid, level)
    places = list(itertools.product(*(range(n) for n in grid)))
    values, weights = [], []
    for cell in itertools.product(*(range(n) for n in coarse)):
        inside = [i for i, p in enumerate(places) if all(x // stride == c for x, c in zip(p, cell, strict=True))]
        w = canvas.weight[:, inside]
        total = w.sum(1, keepdim=True)
        mean = (canvas.values[:, inside] * w.unsqueeze(-1)).sum(1) / total.clamp(min=1e-300)
        values.append(torch.where(total > 0, mean, 0))
        weights.append(w.sum(1) / len(inside))
    return torch.stack(values, 1), torch.stack(weights, 1)


@given(grids, st.integers(0, 3), st.sampled_from(list(Pooling)), st.integers(0, 99))
def test_pooling_equals_a_naive_float64_loop(device, grid, level, pooling, seed):
    canvas = random_canvas(grid, device, seed=seed)
    laid = (num_tokens(grid),) if pooling is Pooling.sequence else grid
    pooled = pool_canvas(canvas, level, pooling, pad=True)
    assert pooled.grid == coarsen(laid, level)
    if level == 0:
        assert torch.equal(pooled.values, canvas.values)
        return
    values, weights = naive_pool(canvas, laid, level)
    torch.testing.assert_close(pooled.values, values)
    torch.testing.assert_close(pooled.weight, weights)


@given(grids, st.integers(1, 3), st.sampled_from(list(Pooling)))
def test_no_token_is_dropped_at_any_level(device, grid, level, pooling):
    values = torch.ones(1, num_tokens(grid), 1, device=device, requires_grad=True)
    pooled = pool_canvas(dense_canvas(values, grid), level, pooling, pad=True)
    assert pooled.weight.min() == 1
    pooled.values.sum().backward()
    assert values.grad.min() > 0


def test_unknown_tokens_change_nothing(device):
    canvas = random_canvas((5, 5), device)
    garbage = torch.where(canvas.weight.unsqueeze(-1) > 0, canvas.values, 1e6)
    for level in (1, 2):
        first, second = (pool_canvas(Canvas(v, canvas.weight, (5, 5)), level) for v in (canvas.values, garbage))
        assert torch.equal(first.values, second.values)


def test_cell_weights_favour_their_place(device):
    canvas = dense_canvas(torch.arange(16.0, device=device).view(1, 16, 1), (4, 4))
    factors = torch.tensor([[1e6], [1.0], [1.0], [1.0]], device=device)
    pooled = pool_canvas(canvas, 1, "learned", cell_weight=factors)
    torch.testing.assert_close(
        pooled.values.flatten(), torch.tensor([0.0, 2, 8, 10], device=device), atol=1e-4, rtol=1e-4
    )


def test_sequence_shapes(device):
    canvas = dense_canvas(torch.randn(1, 196, 2, device=device), (14, 14))
    assert [pool_canvas(canvas, level, "sequence").values.shape[1] for level in range(3)] == [196, 98, 49]
    with pytest.raises(ValueError, match="8 does not divide the 196 tokens"):
        pool_canvas(canvas, 3, "sequence")
    assert pool_canvas(canvas, 3, "sequence", pad=True).values.shape[1] == 25


@pytest.mark.parametrize(
    ("grid", "pooling", "pad", "levels"),
    [
        ((14, 14), "grid", False, 5),
        ((14, 14), "sequence", False, 3),
        ((14, 14), "sequence", True, 9),
        ((4, 4), "learned", False, 3),
        ((1,), "grid", False, 1),
        ((8, 16, 16), "grid", False, 5),
        ((37, 37), "sequence", False, 1),
    ],
)
def test_max_levels(grid, pooling, pad, levels):
    assert max_levels(grid, pooling, pad=pad) == levels


@given(grids)
def test_max_levels_ends_with_one_cell_and_not_before(grid):
    most = max_levels(grid)
    assert num_tokens(coarsen(grid, most - 1)) == 1
    assert most == 1 or num_tokens(coarsen(grid, most - 2)) > 1


@given(grids, st.integers(0, 99))
def test_upsampling_equals_a_naive_float64_loop(device, grid, seed):
    coarse = random_canvas(coarsen(grid, 1), device, seed=seed)
    fine = upsample_canvas(coarse, grid)
    cells = list(itertools.product(*(range(n) for n in coarse.grid)))
    for number, place in enumerate(itertools.product(*(range(n) for n in grid))):
        share = torch.zeros(len(cells), dtype=torch.float64, device=device)
        for c, cell in enumerate(cells):
            share[c] = 1
            for x, k, n in zip(place, cell, coarse.grid, strict=True):
                at = min(max((x + 0.5) / 2 - 0.5, 0), n - 1)
                share[c] *= max(0.0, 1 - abs(at - k))
        weight = coarse.weight @ share
        expected = (coarse.values * (coarse.weight * share).unsqueeze(-1)).sum(1) / weight.clamp(min=1e-300).unsqueeze(
            -1
        )
        torch.testing.assert_close(fine.weight[:, number], weight)
        torch.testing.assert_close(fine.values[:, number], torch.where(weight.unsqueeze(-1) > 0, expected, 0))


def test_upsampling_ignores_unknown_cells_and_autocast(device):
    values = torch.tensor([[[1.001], [1e6], [3.003]]], device=device)
    canvas = Canvas(values, torch.tensor([[1.0, 0.0, 1.0]], device=device), (3,))
    with torch.autocast(device.type, torch.bfloat16):
        fine = upsample_canvas(canvas, (6,)).values.flatten()
    torch.testing.assert_close(fine, torch.tensor([1.001, 1.001, 1.001, 3.003, 3.003, 3.003], device=device))
