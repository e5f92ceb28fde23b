import pytest
import torch

from hjepa_models import (
    Canvas,
    Fpn,
    Pooling,
    Pyramid,
    PyramidConfig,
    coarsen,
    dense_canvas,
    pool_canvas,
    scatter_to_canvas,
)
from hjepa_models.grid import grid_coordinates
from hjepa_models.layers import positions
from hjepa_models.layers.level_attention import LevelAttention
from hjepa_models.layers.positions import Rotation, rotate, rotation_angles


def random_canvas(grid, device, width=16, known=0.5):
    count = torch.tensor(grid).prod()
    return Canvas(
        torch.randn(2, count, width, device=device), (torch.rand(2, count, device=device) < known).float(), grid
    )


@pytest.mark.parametrize("fpn", list(Fpn))
def test_shapes_at_the_size_of_a_base_encoder(device, fpn):
    tokens = torch.randn(2, 196, 768, device=device)
    sequence = PyramidConfig(fpn=fpn, fpn_dim=512, pooling="sequence").build((14, 14), 768, device=device)
    grid = PyramidConfig(fpn=fpn, fpn_dim=512, pooling="grid").build((14, 14), 768, device=device)
    assert [c.values.shape for c in sequence(dense_canvas(tokens, (14, 14)))] == [(2, n, 768) for n in (196, 98, 49)]
    levels = grid(dense_canvas(tokens, (14, 14)))
    assert [c.grid for c in levels] == [(14, 14), (7, 7), (4, 4)]
    assert [c.values.shape for c in levels] == [(2, n, 768) for n in (196, 49, 16)]
    assert [c.weight.shape for c in levels] == [(2, n) for n in (196, 49, 16)]


@pytest.mark.parametrize("fpn", list(Fpn))
@pytest.mark.parametrize("pooling", [Pooling.grid, Pooling.learned])
def test_no_token_is_dropped_on_a_ragged_grid(device, fpn, pooling):
    pyramid = PyramidConfig(fpn=fpn, fpn_dim=12, pooling=pooling, output_norm=False).build((37, 37), 8, device=device)
    tokens = torch.randn(1, 37 * 37, 8, device=device, requires_grad=True)
    levels = pyramid(dense_canvas(tokens, (37, 37)))
    assert [c.grid for c in levels] == [(37, 37), (19, 19), (10, 10)]
    for canvas in levels:
        assert canvas.weight.min() == 1
        (gradient,) = torch.autograd.grad(canvas.values.square().sum(), tokens, retain_graph=True)
        assert (gradient.abs().amax(-1) > 0).all()


@pytest.mark.parametrize("grid", [(9,), (5, 6), (3, 4, 5)])
@pytest.mark.parametrize("fpn", list(Fpn))
@pytest.mark.parametrize("pooling", list(Pooling))
def test_unknown_tokens_change_nothing_that_is_known(device, grid, fpn, pooling):
    pyramid = PyramidConfig(levels=3, fpn=fpn, fpn_dim=12, pooling=pooling, pad=True).build(grid, 16, device=device)
    canvas = random_canvas(grid, device)
    garbage = Canvas(torch.where(canvas.weight.unsqueeze(-1) > 0, canvas.values, 1e4), canvas.weight, grid)
    for first, second in zip(pyramid(canvas), pyramid(garbage), strict=True):
        known = first.weight > 0
        torch.testing.assert_close(first.values[known], second.values[known])


@pytest.mark.parametrize("fpn", [Fpn.add, Fpn.concat])
def test_coarse_levels_reach_the_fine_ones(device, fpn):
    pyramid = PyramidConfig(fpn=fpn, fpn_dim=12, levels=3).build((8, 8), 16, device=device)
    canvas = random_canvas((8, 8), device, known=2)
    base = pyramid(canvas)[0].values
    moved = canvas.values.clone()
    moved[:, 63] += 5
    change = (pyramid(Canvas(moved, canvas.weight, (8, 8)))[0].values - base).abs().amax((0, 2)).view(8, 8)
    assert change[7, 7] > 0
    assert change[3, 3] > 0  # seen through the coarsest level only
    assert (change > 0).sum() > 16


def test_without_fpn_and_projection_it_is_plain_pooling(device):
    pyramid = PyramidConfig(fpn="none", projection=False, output_norm=False).build((6, 6), 16, device=device)
    assert not list(pyramid.parameters())
    canvas = random_canvas((6, 6), device)
    for level, (out, plain) in enumerate(zip(pyramid(canvas), pyramid.pool(canvas), strict=True)):
        assert torch.equal(out.values, pool_canvas(canvas, level).values)
        assert torch.equal(out.values, plain.values)


def test_learned_pooling_starts_as_the_mean_and_learns(device):
    learned, plain = (
        PyramidConfig(pooling=pooling).build((5, 6), 16, device=device) for pooling in (Pooling.learned, Pooling.grid)
    )
    learned.load_state_dict(plain.state_dict(), strict=False)
    canvas = random_canvas((5, 6), device)
    for first, second in zip(learned(canvas), plain(canvas), strict=True):
        torch.testing.assert_close(first.values, second.values)
        torch.testing.assert_close(first.weight, second.weight)
    learned(canvas)[2].values.pow(3).sum().backward()
    assert learned.cell_logits[1].grad.abs().sum() > 0


def test_output_norm_fixes_the_scale(device):
    pyramid = PyramidConfig(fpn="concat", fpn_dim=12).build((6, 6), 16, device=device)
    for canvas in pyramid(random_canvas((6, 6), device)):
        torch.testing.assert_close(
            canvas.values.std(-1, unbiased=False), torch.ones_like(canvas.weight), atol=1e-2, rtol=0
        )


@pytest.mark.parametrize("fpn", list(Fpn))
@pytest.mark.parametrize("grid", [(9,), (5, 6), (3, 4, 5)])
def test_each_level_has_its_bottleneck(device, fpn, grid):
    config = PyramidConfig(fpn=fpn, level_dims=(12, 6, 2), pooling="learned", output_norm=False)
    pyramid = config.build(grid, 16, device=device)
    count = torch.tensor(grid).prod()
    levels = pyramid(dense_canvas(torch.randn(40, count, 16, device=device), grid))
    for canvas, width in zip(levels, (12, 6, 2), strict=True):
        assert canvas.values.shape[-1] == 16
        rows = canvas.values.flatten(0, 1)
        assert torch.linalg.matrix_rank(rows - rows.mean(0)) <= width


@pytest.mark.parametrize("fpn", list(Fpn))
@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("grid", [(9,), (5, 6), (3, 4, 5)])
def test_attention_between_levels_sees_known_cells_only(device, fpn, pooling, grid):
    config = PyramidConfig(fpn=fpn, fpn_dim=12, level_dims=(12, 24, 16), pooling=pooling, pad=True, attention_heads=2)
    pyramid = config.build(grid, 16, device=device)
    canvas = random_canvas(grid, device)
    garbage = Canvas(torch.where(canvas.weight.unsqueeze(-1) > 0, canvas.values, 1e4), canvas.weight, grid)
    levels = pyramid(canvas)
    for first, second in zip(levels, pyramid(garbage), strict=True):
        torch.testing.assert_close(first.values[first.weight > 0], second.values[first.weight > 0])
    torch.stack([level.values.pow(3).mean() for level in levels]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pyramid.parameters())


def test_attention_brings_the_coarse_level_to_the_fine_one(device):
    pyramid = PyramidConfig(levels=2, attention_heads=2).build((8, 8), 16, device=device)
    canvas = random_canvas((8, 8), device, known=2)
    base = pyramid(canvas)[0].values
    moved = canvas.values.clone()
    moved[:, 63, :8] += 5  # half of the channels: the norms of the keys take away what all have in common
    change = (pyramid(Canvas(moved, canvas.weight, (8, 8)))[0].values - base).abs().amax((0, 2))
    assert change.min() > 1e-3


def test_attention_between_levels_equals_a_loop_in_float64(device):
    """Shares weigh the keys, places turn queries and keys."""
    layer = LevelAttention(8, 6, 1).to(device)
    fine, coarse = random_canvas((4, 4), device, width=8), pool_canvas(random_canvas((4, 4), device, width=6), 1)
    out = layer(fine, coarse, 0, (1.0, 1.0)).values.detach()
    places = {0: grid_coordinates((4, 4)), 1: grid_coordinates((2, 2)) * 2 + 0.5}
    query = layer.query(layer.query_norm(fine.values))
    key, value = layer.key_value(layer.key_norm(coarse.values)).chunk(2, -1)
    turned = []
    for x, level in ((query, 0), (key, 1)):
        angle = rotation_angles(places[level].to(device), 8, 100.0)
        turned.append(rotate(x.unsqueeze(1), Rotation(angle.cos(), angle.sin()))[:, 0].double())
    for b in range(2):
        for i in range(16):
            score = (turned[0][b, i] @ turned[1][b].T / 8**0.5).exp() * coarse.weight[b].double()
            mixed = (score / score.sum()) @ value[b].double()
            expected = fine.values[b, i].double() + layer.proj(mixed.float()).double()
            torch.testing.assert_close(out[b, i].double(), expected, atol=1e-5, rtol=1e-4)


def test_attention_measures_places_on_the_configured_grid(device):
    """At another resolution a token is a part of a configured one; cells of level 1 are twice those of level 0."""
    pyramid = PyramidConfig(levels=2, attention_heads=2).build((4, 6), 16, device=device)
    scales = []
    pyramid.attention[0].register_forward_pre_hook(lambda _m, args: scales.append(args[3]))
    for grid in ((4, 6), (8, 3)):
        pyramid(random_canvas(grid, device))
    assert scales == [(1.0, 1.0), (0.5, 2.0)]
    layer, fine, coarse = pyramid.attention[0], random_canvas((4, 6), device), random_canvas((2, 3), device, known=2)
    first, second = (layer(fine, coarse, level, scale).values for level, scale in ((1, (1.0, 1.0)), (0, (2.0, 2.0))))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("fpn", list(Fpn))
@pytest.mark.parametrize("level_dims", [(), (12, 10, 8)])
def test_known_places_are_all_that_level_0_computes(device, fpn, level_dims):
    config = PyramidConfig(levels=3, fpn=fpn, fpn_dim=12, level_dims=level_dims)
    pyramid = config.build((6, 6), 16, device=device)
    index = torch.tensor([[3, 7, 7, 30], [0, 1, 2, 35]], device=device)
    canvas = scatter_to_canvas(torch.randn(2, 4, 16, device=device), index, (6, 6))
    for one, other in zip(pyramid(canvas), pyramid(canvas, index), strict=True):
        assert torch.equal(one.weight, other.weight)
        known = one.weight > 0
        torch.testing.assert_close(one.values[known], other.values[known])


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_other_numbers_of_levels(device, levels):
    pyramid = PyramidConfig(levels=levels, fpn="add", fpn_dim=8).build((14, 14), 16, device=device)
    assert [c.grid for c in pyramid(random_canvas((14, 14), device))] == [coarsen((14, 14), n) for n in range(levels)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": 4}, "levels=4: more than the grid .4, 4. admits.*allowed: 1 to 3"),
        ({"levels": 3, "pooling": "sequence", "fpn": "none"}, None),
        ({"levels": 0}, "levels=0"),
        ({"fpn": "ad"}, "allowed: none, add, concat; did you mean 'add'"),
        ({"projection": False, "fpn": "add"}, "leaves widths .512, 512, 512. inside the pyramid, not embed_dim=16"),
        ({"level_dims": (8, 4)}, "2 entries for levels=3"),
        ({"level_dims": (8, 4, 0)}, "level_dims=.8, 4, 0.: needs one positive size"),
        ({"level_dims": (16, 16, 8), "projection": False}, "projection=False"),
        ({"attention_heads": 3}, "attention_heads=3: does not divide the width 16"),
        ({"attention_heads": 8}, "attention_heads=8: does not divide the width 16 into even heads of 4"),
        ({"attention_heads": 2, "levels": 1}, "no coarser one to attend to"),
        ({"level_dims": 8}, "level_dims=8: no sequence"),
        ({"position_grid": (4, 4)}, "position_grid=.4, 4.: attention_heads=0 looks at no place"),
        ({"position_grid": (4,), "attention_heads": 2}, "position_grid=.4,.: has other axes than the grid .4, 4."),
    ],
)
def test_bad_configs(fields, message):
    if message is None:
        Pyramid(PyramidConfig(**fields), (4, 4), 16)
        return
    with pytest.raises(ValueError, match=message):
        PyramidConfig(**fields).build((4, 4), 16)


def test_attention_between_levels_takes_the_form_of_other_devices_too(monkeypatch):
    """Rotations of the CPU and of a GPU are written apart: both see the shapes of this layer."""
    pyramid = PyramidConfig(levels=2, attention_heads=1).build((4, 4), 16)
    canvas = dense_canvas(torch.randn(2, 16, 16), (4, 4))
    plain = pyramid(canvas)[0].values
    monkeypatch.setattr(positions.Tensor, "is_cpu", False)
    torch.testing.assert_close(pyramid(canvas)[0].values, plain)
