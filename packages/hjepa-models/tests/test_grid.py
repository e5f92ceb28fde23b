import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hjepa_models.grid import (
    coarsen,
    gather_tokens,
    grid_coordinates,
    num_tokens,
    sincos_positions,
    upsampling_matrix,
)

grids = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@given(grids)
def test_coordinates_are_row_major(device, grid):
    expected = list(itertools.product(*(range(size) for size in grid)))
    assert grid_coordinates(grid, device=device).tolist() == [list(map(float, point)) for point in expected]


def test_coordinates_on_another_grid_span_the_reference(device):
    same = grid_coordinates((7, 7), (14, 14), device)
    assert same[0].tolist() == [0.5, 0.5]
    assert same[-1].tolist() == [12.5, 12.5]
    fine = grid_coordinates((28,), (14,), device).flatten()
    torch.testing.assert_close(fine.view(14, 2).mean(1), torch.arange(14.0, device=device))


@given(grids, st.integers(0, 4))
def test_coarse_grids_cover_the_fine_grid(grid, level):
    coarse = coarsen(grid, level)
    for size, small in zip(grid, coarse, strict=True):
        assert small * 2**level >= size > (small - 1) * 2**level


def test_sincos_matches_a_loop_in_float64(device):
    grid, dim, theta = (3, 4, 2), 20, 100.0
    table = sincos_positions(grid_coordinates(grid, device=device), dim, theta)
    count = dim // 6
    for row, point in zip(table.tolist(), itertools.product(*(range(size) for size in grid)), strict=True):
        expected = []
        for x in point:
            rates = [theta ** (-i / count) for i in range(count)]
            expected += [math.sin(x * rate) for rate in rates] + [math.cos(x * rate) for rate in rates]
        assert row == pytest.approx(expected + [0.0] * (dim - len(expected)), abs=1e-5)


def test_every_place_has_its_own_sincos_code(device):
    table = sincos_positions(grid_coordinates((14, 14), device=device), 96)
    assert torch.cdist(table, table).add(torch.eye(196, device=device) * 9).min() > 0.1


def test_gather_tokens_takes_each_samples_own_rows(device):
    values = torch.randn(3, 10, 4, device=device)
    index = torch.stack([torch.randperm(10)[:5] for _ in range(3)]).to(device)
    expected = torch.stack([values[b][index[b]] for b in range(3)])
    assert torch.equal(gather_tokens(values, index), expected)


@pytest.mark.parametrize(("grid", "mode"), [((8,), "linear"), ((6, 8), "bilinear"), ((4, 6, 2), "trilinear")])
def test_upsampling_equals_torch_interpolation(device, grid, mode):
    coarse = coarsen(grid, 1)
    values = torch.randn(2, 3, *coarse, device=device)
    expected = torch.nn.functional.interpolate(values, size=grid, mode=mode, align_corners=False)
    matrix = upsampling_matrix(grid, coarse, 2, device)
    assert matrix.shape == (num_tokens(grid), num_tokens(coarse))
    torch.testing.assert_close(values.flatten(2) @ matrix.T, expected.flatten(2), atol=1e-6, rtol=1e-5)


@given(grids, st.integers(1, 2))
def test_upsampling_reproduces_constants_on_ragged_grids(device, grid, level):
    matrix = upsampling_matrix(grid, coarsen(grid, level), 2**level, device)
    torch.testing.assert_close(matrix.sum(1), torch.ones(num_tokens(grid), device=device))


def test_upsampling_keeps_cells_of_a_ragged_axis_in_place(device):
    matrix = upsampling_matrix((5,), (3,), 2, device)
    ramp = torch.tensor([0.5, 2.5, 4.5], device=device)
    torch.testing.assert_close(matrix @ ramp, torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0], device=device))
