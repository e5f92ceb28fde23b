"""The released law against a naive collator of lists and loops, written from the behaviour of the public code."""

import math
import random
import statistics

import pytest
import torch

from hjepa_data.masks import ReleasedMaskConfig


def block_size(number, scale, aspect, height, width):
    cells = int(height * width * (scale[0] + number * (scale[1] - scale[0])))
    ratio = aspect[0] + number * (aspect[1] - aspect[0])
    h, w = round(math.sqrt(cells * ratio)), round(math.sqrt(cells / ratio))
    return min(h, height - 1), min(w, width - 1)


def block(rng, size, height, width):
    # randint is inclusive: the released code draws the corner below height - h, so the last place is never drawn.
    top, left = rng.randint(0, height - size[0] - 1), rng.randint(0, width - size[1] - 1)
    return [row * width + column for row in range(top, top + size[0]) for column in range(left, left + size[1])]


def sizes(rng, height, width):
    target = block_size(rng.random(), (0.15, 0.2), (0.75, 1.5), height, width)
    return target, block_size(rng.random(), (0.85, 1.0), (1.0, 1.0), height, width)


def image(rng, target_size, context_size, height, width):
    targets = [block(rng, target_size, height, width) for _ in range(4)]
    hidden = set().union(*targets)
    return [cell for cell in block(rng, context_size, height, width) if cell not in hidden], targets


def collate(rng, batch_size, height, width):
    target_size, context_size = sizes(rng, height, width)
    images = [image(rng, target_size, context_size, height, width) for _ in range(batch_size)]
    length = min(len(context) for context, _ in images)
    return [context[:length] for context, _ in images], sum(len(context) for context, _ in images) / batch_size


def probability(contexts, cells):
    return torch.bincount(torch.tensor(contexts).flatten(), minlength=cells) / len(contexts)


@pytest.mark.parametrize(
    ("batch_size", "batches", "worst", "mean"), [(16, 600, 0.065, 0.014), (128, 150, 0.055, 0.012)]
)
def test_context_marginals_are_those_of_the_collator(batch_size, batches, worst, mean, device):
    rng = random.Random(0)
    slow = torch.stack([probability(collate(rng, batch_size, 14, 14)[0], 196) for _ in range(batches)]).mean(0)
    config = ReleasedMaskConfig(batch_size=batch_size)
    sampler, samples = config.build(0), torch.arange(32, device=device)
    found = torch.stack([probability(sampler(step, samples).context.tolist(), 196) for step in range(600)]).mean(0)
    error = (found - slow).abs()
    # The length of the collator varies from batch to batch, here it is constant: near the cut, up to 0.05 remain.
    assert float(error.max()) < worst
    assert float(error.mean()) < mean
    rows = found.view(14, 14).mean(1)
    assert abs(float(rows[0]) - 0.75) < 0.02
    assert float(rows[12]) < 0.08
    assert float(rows[13]) == 0


@pytest.mark.parametrize("batch_size", [4, 16, 64])
def test_context_budget_is_the_expected_minimum_of_a_batch(batch_size):
    rng = random.Random(1)
    lengths = [len(collate(rng, batch_size, 14, 14)[0][0]) for _ in range(3000 // batch_size + 60)]
    error = statistics.stdev(lengths) / math.sqrt(len(lengths))
    assert (
        abs(ReleasedMaskConfig(batch_size=batch_size).num_context_tokens - statistics.mean(lengths)) < 3.5 * error + 0.5
    )


def test_larger_batches_lose_more_of_the_context():
    kept = [ReleasedMaskConfig(batch_size=size).num_context_tokens for size in (1, 16, 128, 1024)]
    lost = [1 - tokens / kept[0] for tokens in kept[1:]]
    assert lost == pytest.approx([0.27, 0.385, 0.47], abs=0.015)


@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (10, 14)])
def test_rows_and_columns_are_those_of_an_oracle_with_the_same_budget(grid, device):
    height, width = grid
    config = ReleasedMaskConfig(grid=grid)
    rng, steps, number = random.Random(2), 250, 8
    slow = {"context": [], "target": []}
    for _ in range(steps):
        shape, counts = sizes(rng, height, width), {name: torch.zeros(height * width) for name in slow}
        for _ in range(number):
            context = []
            while len(context) < config.num_context_tokens:
                context, targets = image(rng, *shape, height, width)
            kept = [cell for one in targets for cell in rng.sample(one, config.num_target_tokens)]
            for name, cells in (("context", context[: config.num_context_tokens]), ("target", kept)):
                counts[name] += torch.bincount(torch.tensor(cells), minlength=height * width)
        for name, count in counts.items():
            slow[name].append(count.view(height, width) / number)
    fast = {"context": [], "target": []}
    sampler, samples = config.build(3), torch.arange(number, device=device)
    for step in range(3 * steps):
        masks = sampler(step, samples)
        for name, index in (("context", masks.context), ("target", masks.targets)):
            fast[name].append(
                torch.bincount(index.flatten().cpu(), minlength=height * width).view(height, width) / number
            )
    for name in slow:
        for axis in (1, 2):
            expected, found = (torch.stack(counts[name]).sum(axis) for counts in (slow, fast))
            # The images of a step share their sizes: steps, not images, are independent.
            error = (expected.var(0) / len(expected) + found.var(0) / len(found)).sqrt().clamp(min=1e-3)
            deviation = (found.mean(0) - expected.mean(0)).abs() / error
            assert float(deviation.max()) < 4.5, f"{name}, axis {axis}: {deviation}"


def test_sizes_come_from_one_number(device):
    config = ReleasedMaskConfig()
    for number in torch.linspace(0, 0.999, 200).tolist():
        assert config.target_size(number) == block_size(number, (0.15, 0.2), (0.75, 1.5), 14, 14)
        assert config.context_size(number) == (13, 13)
    assert config.num_target_tokens == 30
    # At one step the blocks of all images have one size, which later steps change.
    boxes = set()
    for step in range(40):
        targets = config.build(0)(step, torch.arange(400, device=device)).targets.flatten(0, 1)
        height = (targets // 14).amax(1) - (targets // 14).amin(1) + 1
        width = (targets % 14).amax(1) - (targets % 14).amin(1) + 1
        boxes.add((int(height.max()), int(width.max())))
    assert {(5, 6), (6, 6), (7, 5)} <= boxes <= {(5, 6), (6, 5), (6, 6), (7, 5), (8, 5)}


def test_context_is_the_first_cells_in_raster_order(device):
    masks = ReleasedMaskConfig(target_tokens=30).build(0)(0, torch.arange(500, device=device))
    assert float((masks.context[:, -1] // 14).float().mean()) < 9
    # A cell before the last one is context, or hidden by a block, or in the last column.
    context = torch.zeros(500, 196, device=device).scatter_(1, masks.context, 1)
    target = torch.zeros(500, 196, device=device).scatter_(1, masks.targets.flatten(1), 1)
    before = torch.arange(196, device=device) < masks.context[:, -1:]
    unused = before & (context + target == 0)
    unused[:, 13::14] = False
    # Blocks hold 30 to 40 cells and keep 30.
    assert float(unused.sum(1).float().mean()) < 4 * 10


def test_images_whose_every_draw_fails_keep_the_law(device):
    sampler = ReleasedMaskConfig(batch_size=16).build(0)
    sampler._num_candidates = dict.fromkeys(sampler._num_candidates, 1)
    for step in range(10):
        masks = sampler(step, torch.arange(200, device=device))
        context = torch.zeros(200, 196, dtype=torch.bool, device=device).scatter_(1, masks.context, True)
        assert bool((context.sum(1) == 60).all())
        assert not bool(context.gather(1, masks.targets.flatten(1)).any())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"grid": (14,)}, ("grid=(14,)", "2 spatial axes")),
        ({"grid": (4, 14, 14)}, ("tube=True",)),
        ({"grid": (1, 14)}, ("last row",)),
        ({"target_tokens": 31}, ("target_tokens=31", "smallest block has 30 cells", "1 to 30")),
        ({"context_tokens": 196}, ("1 to 195",)),
        ({"context_tokens": 110}, ("context_tokens=110", "110 context cells", "14x14", "up to about")),
        ({"batch_size": 0}, ("batch_size=0",)),
        ({"num_targets": 0}, ("at least one",)),
        ({"target_scale": (0.3, 0.2)}, ("no range of areas",)),
        ({"context_scale": (0.0, 0.2)}, ("no range of areas",)),
        ({"target_aspect": (2.0, 1.0)}, ("no range of aspects",)),
    ],
)
def test_what_cannot_be_is_refused_with_numbers(fields, words):
    with pytest.raises(ValueError, match="allowed") as caught:
        ReleasedMaskConfig(**fields).build(0)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_size_that_only_one_step_in_thousands_draws():
    """Step 4454 draws blocks of 198 cells, a size that none of the 1024 levels has, where Kt is 200."""
    config = ReleasedMaskConfig(
        grid=(32, 32), target_scale=(0.2, 0.3), target_aspect=(0.5, 2.0), context_tokens=64, num_targets=2
    )
    assert config.target_size(0.08001822233200073) == (11, 18)
    assert config.target_cells == 200
    masks = config.build(seed=0)(4454, torch.arange(3))
    assert masks.targets.shape == (3, 2, 200)
    for context, targets in zip(masks.context, masks.targets, strict=True):
        assert not set(context.tolist()) & set(targets.flatten().tolist())


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_grid_of_thousands_of_cells_is_planned_in_seconds():
    config = ReleasedMaskConfig(grid=(96, 96))
    assert config.build(seed=0)(0, torch.arange(2)).context.shape == (2, config.context_cells)


def test_the_budget_of_a_large_grid_is_that_of_counted_cells():
    """The number that marking each of the 4,096 cells of each trial gave."""
    assert ReleasedMaskConfig(grid=(64, 64)).context_cells == 1271
