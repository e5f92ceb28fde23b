"""Block and random masks against slow oracles on grids of one to three axes."""

import itertools
import math
import random

import pytest
import torch

from hjepa_data.masks import BlockMaskConfig, RandomMaskConfig

DRAWS = 6000


def oracle_block(config, rng, shapes):
    box = rng.choice(shapes)
    starts = [rng.randint(0, length - side) for length, side in zip(config.grid, box, strict=True)]
    inside, outside = [], []
    for number, place in enumerate(itertools.product(*map(range, config.grid))):
        hidden = all(start <= at < start + side for at, start, side in zip(place, starts, box, strict=True))
        (inside if hidden else outside).append(number)
    return rng.sample(outside, config.num_context_tokens), rng.sample(inside, config.num_target_tokens)


def oracle_shapes(config):
    shapes = []
    cells = math.prod(config.grid)
    for box in itertools.product(*(range(1, length + 1) for length in config.grid)):
        covered = [side / length for side, length in zip(box, config.grid, strict=True)]
        like_the_grid = max(covered) <= config.max_aspect * min(covered) + 1e-9
        if config.block_scale[0] * cells <= math.prod(box) <= config.block_scale[1] * cells and like_the_grid:
            shapes.append(box)
    return shapes


@pytest.mark.parametrize("grid", [(30,), (7, 9), (4, 5, 6)])
def test_block_marginals_equal_those_of_the_oracle(grid, device):
    config = BlockMaskConfig(grid=grid)
    shapes = oracle_shapes(config)
    assert sorted(map(tuple, config.shapes.tolist())) == sorted(shapes)
    rng, cells = random.Random(0), math.prod(grid)
    slow = {"context": torch.zeros(cells), "target": torch.zeros(cells)}
    for _ in range(DRAWS):
        for name, chosen in zip(slow, oracle_block(config, rng, shapes), strict=True):
            slow[name][chosen] += 1
    masks = config.build(1)(4, torch.arange(4 * DRAWS, device=device))
    for name, index in (("context", masks.context), ("target", masks.targets)):
        found = torch.bincount(index.flatten().cpu(), minlength=cells) / (4 * DRAWS)
        expected = slow[name] / DRAWS
        error = (expected * (1 - expected) / DRAWS * 1.25).sqrt().clamp(min=1e-3)
        # The largest of up to 120 deviations: 4.5 standard errors are passed by chance once in 1,000 runs.
        assert float(((found - expected).abs() / error).max()) < 4.5, name


def test_hidden_cells_are_one_box(device):
    config = BlockMaskConfig(grid=(6, 8, 8), context_tokens=4)
    targets = config.build(0)(0, torch.arange(300, device=device)).targets[:, 0]
    spans = [targets // 64, targets // 8 % 8, targets % 8]
    volume = math.prod([span.amax(1) - span.amin(1) + 1 for span in spans])
    assert int(volume.max()) <= 0.6 * 384
    assert int(volume.min()) >= config.num_target_tokens


@pytest.mark.parametrize("grid", [(40,), (5, 8), (2, 4, 5)])
def test_random_masks_choose_every_cell_and_pair_alike(grid, device):
    config = RandomMaskConfig(grid=grid)
    masks = config.build(0)(0, torch.arange(DRAWS, device=device))
    target = torch.zeros(DRAWS, 40, dtype=torch.float64, device=device).scatter_(1, masks.targets[:, 0], 1)
    context = torch.zeros(DRAWS, 40, dtype=torch.float64, device=device).scatter_(1, masks.context, 1)
    assert config.num_target_tokens == 24
    assert config.num_context_tokens == 10
    for chosen, tokens in ((target, 24), (context, 10)):
        one, two = tokens / 40, tokens * (tokens - 1) / (40 * 39)
        assert float((chosen.mean(0) - one).abs().max()) < 4.5 * math.sqrt(one * (1 - one) / DRAWS)
        pairs = (chosen.T @ chosen / DRAWS)[~torch.eye(40, dtype=torch.bool, device=device)]
        assert float((pairs - two).abs().max()) < 5 * math.sqrt(two * (1 - two) / DRAWS)
    both = 24 / 40 * 10 / 39
    across = (target.T @ context / DRAWS)[~torch.eye(40, dtype=torch.bool, device=device)]
    assert float((across - both).abs().max()) < 5 * math.sqrt(both * (1 - both) / DRAWS)


@pytest.mark.parametrize(
    ("law", "fields", "words"),
    [
        (BlockMaskConfig, {"block_scale": (0.6, 0.5)}, ("no range of areas",)),
        (BlockMaskConfig, {"max_aspect": 0.5}, ("max_aspect=0.5",)),
        (BlockMaskConfig, {"block_scale": (0.51, 0.51)}, ("no box of whole cells", "hold 100 cells", "0.5102")),
        (BlockMaskConfig, {"target_tokens": 100}, ("target_tokens=100", "smallest box holds 99 cells", "1 to 99")),
        (BlockMaskConfig, {"context_ratio": 0.5}, ("context_ratio=0.5", "98 context", "up to 117 of 196", "1 to 79")),
        (BlockMaskConfig, {"context_tokens": 80}, ("context_tokens=80", "1 to 79 cells")),
        (BlockMaskConfig, {"context_tokens": 0}, ("context_tokens=0",)),
        (BlockMaskConfig, {"grid": ()}, ("no grid",)),
        (BlockMaskConfig, {"grid": (8, 1), "tube": True}, ("one cell",)),
        (RandomMaskConfig, {"target_ratio": 0.8}, ("context_ratio=0.25", "49 context", "156 targets", "1 to 40")),
        (RandomMaskConfig, {"target_tokens": 196}, ("target_tokens=196", "1 to 195")),
        (RandomMaskConfig, {"context_tokens": 80}, ("context_tokens=80", "1 to 79")),
        (RandomMaskConfig, {"context_tokens": -1}, ("context_tokens=-1",)),
        (RandomMaskConfig, {"target_ratio": 1.0}, ("target_ratio=1.0", "below 1")),
        (RandomMaskConfig, {"grid": (4, 0)}, ("no grid",)),
    ],
)
def test_what_cannot_be_is_refused_with_numbers(law, fields, words):
    with pytest.raises(ValueError, match="allowed") as caught:
        law(**fields)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)
