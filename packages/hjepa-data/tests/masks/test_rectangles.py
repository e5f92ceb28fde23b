"""Boxes on a grid: counts of free cells against the cells themselves."""

import pytest
import torch

from hjepa_data.masks.rectangles import blocked_cells, free_cells, line_origin, line_table


@pytest.mark.parametrize("grid", [(2, 2), (7, 12), (16, 9)])
@pytest.mark.parametrize("targets", [1, 2, 5])
def test_free_cells_are_those_that_no_box_blocks(grid, targets):
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        size = torch.stack([torch.randint(1, side + 1, (targets + 1,), generator=rng) for side in grid], dim=-1)
        start = (torch.rand(50, targets + 1, 2, generator=rng) * (torch.tensor(grid) + 1 - size)).long()
        longest = max(grid)
        origin = line_origin(size, longest)
        origin[-1, 0] = line_origin(size[-1, 0], longest, negative=True)
        blocked = blocked_cells(line_table(longest), start, origin, grid)
        assert free_cells(start, size).tolist() == (~blocked).sum(-1).tolist()
