import pytest
import torch

from hjepa_models import Canvas, Fpn, Pooling, Pyramid, PyramidConfig, coarsen, dense_canvas, pool_canvas


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
        ({"projection": False, "fpn": "add"}, "fpn_dim=512, not embed_dim=16"),
    ],
)
def test_bad_configs(fields, message):
    if message is None:
        Pyramid(PyramidConfig(**fields), (4, 4), 16)
        return
    with pytest.raises(ValueError, match=message):
        PyramidConfig(**fields).build((4, 4), 16)
