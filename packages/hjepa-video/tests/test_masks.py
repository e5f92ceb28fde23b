import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hjepa_video import TubeMaskConfig, long_range, short_range
from hjepa_video.masks import keep_some

KINDS = {"short": short_range(), "long": long_range()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(2, 4, 4), (3, 6, 6), (4, 8, 8), (8, 14, 14), (2, 6, 10)])
def test_budgets_are_exact_and_context_and_targets_apart(device, kind, grid):
    masks = KINDS[kind].build(grid, seed=0)
    sample = torch.arange(500, device=device)
    drawn = masks(3, sample)
    assert drawn.context.shape == (500, masks.num_context_tokens)
    assert drawn.targets.shape == (500, 1, masks.num_target_tokens)
    count = grid[0] * grid[1] * grid[2]
    seen = torch.zeros(500, count, dtype=torch.long, device=device).scatter_add_(
        1, drawn.context, torch.ones_like(drawn.context)
    )
    assert seen.max() == 1
    hidden = torch.zeros(500, count, dtype=torch.bool, device=device).scatter_(1, drawn.targets[:, 0], True)
    assert not (hidden & (seen > 0)).any()
    tube = hidden.view(500, grid[0], -1)
    assert torch.equal(tube, tube[:, :1].expand_as(tube))
    # Fewer than one draw in ten is short of hidden cells and repeats some.
    assert (hidden.sum(1) < masks.num_target_tokens).float().mean() < 0.1


def test_the_two_kinds_hide_what_they_say(device):
    short, long = (kind.build((2, 16, 16), seed=0) for kind in (short_range(), long_range()))
    assert 0.45 < short.target_cells / 256 < 0.6
    assert 0.7 < long.target_cells / 256 < 0.85
    assert short.num_context_tokens == 2 * 51
    assert long.num_context_tokens == 2 * 20


def test_every_cell_is_predicted_and_short_range_masks_see_every_cell(device):
    for name, kind in KINDS.items():
        drawn = kind.build((1, 6, 6), seed=1)(0, torch.arange(3000, device=device))
        assert torch.bincount(drawn.targets.flatten(), minlength=36).min() > 0
        seen = torch.bincount(drawn.context.flatten(), minlength=36).view(6, 6)
        # Blocks of 70 % always cover the middle: long-range masks predict it from the rim.
        assert (seen[2:4, 2:4] == 0).all() if name == "long" else seen.min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_budgets_do_not_depend_on_the_seed(kind):
    assert len({KINDS[kind].build((1, 16, 16), seed=seed).num_target_tokens for seed in range(4)}) == 1


def test_masks_are_a_function_of_seed_step_and_sample(device):
    masks = short_range().build((2, 8, 8), seed=0)
    sample = torch.arange(10, device=device)
    whole = masks(5, sample)
    part = masks(5, sample[3:7])
    assert torch.equal(whole.context[3:7], part.context)
    assert torch.equal(whole.targets[3:7], part.targets)
    for other in (masks(6, sample), short_range().build((2, 8, 8), seed=1)(5, sample)):
        assert not torch.equal(whole.targets, other.targets)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 30), allowed=st.integers(1, 30), count=st.integers(1, 30))
def test_kept_places_are_allowed_and_repeat_only_where_they_must(device, seed, n, allowed, count):
    allowed, count = min(allowed, n), min(count, n)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(5, n, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(n, generator=generator)[:allowed]] = True
    random = torch.randint(-(2**62), 2**62, (5, n), generator=generator)
    kept = keep_some(mask.to(device), random.to(device), count).cpu()
    assert kept.shape == (5, count)
    for row, places in zip(mask, kept, strict=True):
        assert row[places].all()
        times = torch.bincount(places, minlength=n)[row]
        assert times.max() - times.min() <= 1
        assert places.tolist() == sorted(places.tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_blocks": 0}, "num_blocks"),
        ({"block_scale": 1.0}, "block_scale"),
        ({"target_ratio": 0.0}, "target_ratio"),
        ({"block_aspect": (1.5, 0.75)}, "block_aspect"),
        ({"block_aspect": (0.75,)}, "block_aspect"),
        ({"context_ratio": 0.0}, "context_ratio"),
        ({"context_ratio": float("nan")}, "context_ratio"),
    ],
)
def test_config_refuses_what_makes_no_sense(change, message):
    with pytest.raises(ValueError, match=message) as raised:
        TubeMaskConfig(**change)
    assert "\n" not in str(raised.value)


def test_a_budget_that_cannot_be_met_and_a_grid_without_time_are_refused():
    with pytest.raises(ValueError, match="context_ratio"):
        TubeMaskConfig(num_blocks=2, block_scale=0.7, context_ratio=0.5).build((2, 8, 8), seed=0)
    # Eight blocks of 15 % hide a little more than half of the picture.
    with pytest.raises(ValueError, match=r"target_ratio=0\.9: 0\.0% of the draws hide 230 of the 256.*about 0\.51"):
        TubeMaskConfig(target_ratio=0.9).build((2, 16, 16), seed=0)
    assert TubeMaskConfig(target_ratio=0.5).build((2, 16, 16), seed=0).num_target_tokens == 2 * 128
    with pytest.raises(ValueError, match="grid"):
        short_range().build((8, 8), seed=0)
