import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hjepa_models.canvas import Canvas, dense_canvas
from hjepa_models.grid import coarsen, num_tokens
from hjepa_models.objectives import disentanglement
from hjepa_models.pooling import pool_canvas


def random_canvas(grid, width, generator, device="cpu", known=0.7):
    count = num_tokens(grid)
    values = 2 * torch.randn(3, count, width, generator=generator, dtype=torch.float64) + 1
    weight = (torch.rand(3, count, generator=generator) < known).double()
    return Canvas((values * weight.unsqueeze(-1)).to(device), weight.to(device), grid)


def naive(levels, eps):
    """Correlations written out in float64 over explicit lists of rows."""
    grid = min((level.grid for level in levels), key=num_tokens)
    pooled = []
    for level in levels:
        steps = next(k for k in range(9) if coarsen(level.grid, k) == grid)
        pooled.append(pool_canvas(level, steps))
    coarse = next(level for level in levels if level.grid == grid)
    rows = [
        (b, c, float(coarse.weight[b, c]))
        for b in range(len(coarse.weight))
        for c in range(coarse.weight.shape[1])
        if all(level.weight[b, c] > 0 for level in pooled)
    ]
    total = sum(weight for _, _, weight in rows)

    def column(level, channel):
        return [float(level.values[b, c, channel]) for b, c, _ in rows]

    def moment(first, second):
        means = [sum(x * row[2] for x, row in zip(xs, rows, strict=True)) / total for xs in (first, second)]
        products = ((x - means[0]) * (y - means[1]) * row[2] for x, y, row in zip(first, second, rows, strict=True))
        return sum(products) / total

    pairs = []
    for a in range(len(pooled)):
        for b in range(a + 1, len(pooled)):
            squares = []
            for i in range(pooled[a].values.shape[-1]):
                for j in range(pooled[b].values.shape[-1]):
                    x, y = column(pooled[a], i), column(pooled[b], j)
                    squares.append(moment(x, y) ** 2 / ((moment(x, x) + eps) * (moment(y, y) + eps)))
            pairs.append(sum(squares) / len(squares))
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("grid", [(10,), (5, 4), (3, 4, 2)])
@pytest.mark.parametrize("levels", [2, 3])
def test_equals_a_naive_float64_loop(device, grid, levels):
    generator = torch.Generator().manual_seed(levels)
    canvases = [random_canvas(coarsen(grid, level), 3 - level, generator, device) for level in range(levels)]
    cpu = [Canvas(level.values.cpu(), level.weight.cpu(), level.grid) for level in canvases]
    assert float(disentanglement(canvases, 0.1)) == pytest.approx(naive(cpu, 0.1), rel=1e-9)


def rows_canvas(rows):
    """Rows [n, D] as n images of one cell."""
    return Canvas(rows.unsqueeze(1), rows.new_ones(len(rows), 1), (1,))


def whitened(rows, width, device):
    """Rows whose channels are exactly uncorrelated, with deviation 1 and mean 0."""
    x = torch.randn(rows, width, dtype=torch.float64, device=device)
    x = torch.linalg.qr(x - x.mean(0)).Q
    return x * math.sqrt(rows)


def test_the_range_is_met_at_both_ends(device):
    x = whitened(64, 8, device)
    first, second = rows_canvas(x[:, :4]), rows_canvas(x[:, 4:])
    assert float(disentanglement([first, second])) == pytest.approx(0, abs=1e-12)
    assert float(disentanglement([first, first])) == pytest.approx(1 / 4, rel=1e-3)
    line = rows_canvas(x[:, :1] * torch.tensor([1.0, -2.0, 5.0], device=device) + 3)
    assert float(disentanglement([line, line])) == pytest.approx(1, rel=1e-3)
    constant = rows_canvas(torch.ones_like(x))
    assert float(disentanglement([constant, first])) == 0


def test_independent_rows_leave_a_floor_of_one_in_n(device):
    generator = torch.Generator().manual_seed(0)
    first, second = (rows_canvas(torch.randn(200, 40, generator=generator).to(device)) for _ in range(2))
    assert float(disentanglement([first, second])) == pytest.approx(1 / 200, rel=0.1)


@given(st.integers(0, 99), st.floats(0.2, 50.0), st.floats(-5.0, 5.0))
def test_bounded_symmetric_and_blind_to_scale_and_place(device, seed, scale, shift):
    generator = torch.Generator().manual_seed(seed)
    first = random_canvas((4, 4), 3, generator, device, known=1.0)
    second = random_canvas((2, 2), 5, generator, device, known=1.0)
    value = float(disentanglement([first, second], 1e-12))
    assert 0 <= value <= 1
    assert float(disentanglement([second, first], 1e-12)) == pytest.approx(value)
    moved = Canvas(first.values * scale + shift, first.weight, first.grid)
    assert float(disentanglement([moved, second], 1e-12)) == pytest.approx(value, rel=1e-4)


def test_what_is_unknown_does_not_matter(device):
    generator = torch.Generator().manual_seed(3)
    first = random_canvas((4, 4), 3, generator, device, known=0.4)
    second = random_canvas((2, 2), 5, generator, device, known=0.7)
    noise = [Canvas(c.values + 99 * (c.weight == 0).unsqueeze(-1), c.weight, c.grid) for c in (first, second)]
    torch.testing.assert_close(disentanglement(noise), disentanglement([first, second]))


def test_descending_it_pulls_levels_apart(device):
    generator = torch.Generator().manual_seed(0)
    fixed = torch.randn(64, 4, generator=generator).to(device)
    z = (fixed + 0.1 * torch.randn(64, 4, generator=generator).to(device)).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    before = float(disentanglement([rows_canvas(fixed), rows_canvas(z)]).detach())
    for _ in range(60):
        optimizer.zero_grad()
        disentanglement([rows_canvas(fixed), rows_canvas(z)]).backward()
        optimizer.step()
    assert float(disentanglement([rows_canvas(fixed), rows_canvas(z)]).detach()) < 0.1 * before


def test_nothing_known_is_finite(device):
    empty = Canvas(torch.zeros(2, 4, 3, device=device, requires_grad=True), torch.zeros(2, 4, device=device), (2, 2))
    loss = disentanglement([empty, dense_canvas(torch.randn(2, 4, 3, device=device), (2, 2))])
    loss.backward()
    assert float(loss.detach()) == 0
    assert empty.values.grad.isfinite().all()


def test_refuses_one_level_and_foreign_grids():
    canvas = dense_canvas(torch.randn(2, 16, 3), (4, 4))
    with pytest.raises(ValueError, match="levels: 1 given"):
        disentanglement([canvas])
    with pytest.raises(ValueError, match=r"the grid \(4, 4\) is not halved to \(3, 3\)"):
        disentanglement([canvas, dense_canvas(torch.randn(2, 9, 3), (3, 3))])


def test_half_precision_on_one_grid_is_worked_in_float32(device):
    z = torch.randn(2, 40, 4, device=device).bfloat16()
    weight = torch.ones(40, 1, device=device)
    halves, singles = (
        [Canvas(x.unsqueeze(1).to(dtype), weight.to(dtype), (1,)) for x in z]
        for dtype in (torch.bfloat16, torch.float32)
    )
    torch.testing.assert_close(disentanglement(halves), disentanglement(singles))
