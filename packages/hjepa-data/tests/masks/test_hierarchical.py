"""Hierarchical masks: whole cells, at every level up to the one asked for."""

import itertools

import pytest
import torch

from hjepa_data.masks import BlockMaskConfig, HierarchicalMaskConfig, MultiBlockConfig, RandomMaskConfig


def cell_of(number, grid, level):
    """The coarse cell of a token, by division alone."""
    place = []
    for side in reversed(grid):
        place.append(number % side >> level)
        number //= side
    return tuple(reversed(place))


@pytest.mark.parametrize(
    ("grid", "level", "law"),
    [
        ((14, 14), 1, "multiblock"),
        ((24, 16), 2, "multiblock"),
        ((16, 16), 2, "block"),
        ((8, 8, 8), 1, "block"),
        ((16, 8), 3, "random"),
        ((48,), 2, "random"),
        ((7, 5), 0, "random"),
    ],
)
def test_cells_are_whole_at_every_level(grid, level, law, device):
    config = HierarchicalMaskConfig(grid=grid, level=level, law=law)
    masks = config.build(0)(0, torch.arange(40, device=device))
    for fine in range(level + 1):
        per_cell = 2 ** (fine * len(grid))
        for image in range(40):
            for tokens in (masks.context[image].tolist(), *masks.targets[image].tolist()):
                cells = [cell_of(token, grid, fine) for token in tokens]
                assert len(set(cells)) * per_cell == len(tokens) == len(set(tokens))


@pytest.mark.parametrize(
    ("law", "cells"), [("multiblock", MultiBlockConfig), ("block", BlockMaskConfig), ("random", RandomMaskConfig)]
)
def test_cells_follow_the_law_of_the_coarse_grid(law, cells, device):
    samples = torch.arange(50, device=device)
    fine = HierarchicalMaskConfig(grid=(16, 24), level=1, law=law).build(5)(2, samples)
    coarse = cells(grid=(8, 12)).build(5)(2, samples)
    table = torch.tensor(
        [8 * 0 + (row // 2) * 12 + column // 2 for row, column in itertools.product(range(16), range(24))]
    )
    for image in range(50):
        assert table[fine.context[image].cpu()].unique().tolist() == coarse.context[image].tolist()
        for block, expected in zip(fine.targets[image].cpu(), coarse.targets[image].tolist(), strict=True):
            assert table[block].unique().tolist() == expected


def test_budgets_are_tokens(device):
    config = HierarchicalMaskConfig(grid=(16, 16), target_tokens=32, context_tokens=64, num_targets=3)
    masks = config.build(0)(0, torch.arange(10, device=device))
    assert masks.context.shape == (10, 64)
    assert masks.targets.shape == (10, 3, 32)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"level": 2}, ("level=2", "14x14", "multiples of 2^2", "0 to 1", "16x16")),
        ({"level": -1}, ("level=-1", "0 to 1")),
        ({"context_tokens": 50}, ("context_tokens=50", "2x2=4 tokens", "48 or 52")),
        ({"target_tokens": 3}, ("target_tokens=3", "allowed: 4,")),
        ({"context_tokens": 0}, ("context_tokens=0", "allowed: 4,")),
        ({"context_tokens": 120}, ("7x7 cells of 4 tokens, counted in cells", "30 context cells")),
        ({"law": "stripes"}, ("law='stripes'", "multiblock, block, random")),
        ({"law": "random", "num_targets": 4}, ("num_targets=4", "one target set")),
        ({"law": "random", "target_scale": (0.1, 0.2)}, ("no blocks",)),
        ({"law": "block", "target_scale": (0.501, 0.502)}, ("law='block'", "no box of whole cells", "nearest")),
        ({"grid": (8, 8, 8)}, ("law='multiblock'", "blocks are spatial", "tube=True")),
        ({"grid": (8,)}, ("law='multiblock'", "1 axes")),
    ],
)
def test_what_cannot_be_is_refused_with_numbers(fields, words):
    with pytest.raises(ValueError, match="allowed") as caught:
        HierarchicalMaskConfig(**fields).build(0)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)
