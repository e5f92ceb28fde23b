"""One view is predicted from another."""

import pytest
import torch
from torch.nn import functional

from hjepa_models import (
    EncoderConfig,
    GlobalConfig,
    HJEPAConfig,
    LevelWeightsConfig,
    PredictorConfig,
    PyramidConfig,
    scatter_to_canvas,
)
from hjepa_models.crops import relate_crops
from hjepa_models.layers.norm import normalize

GRID = (4, 6)
ENCODER = {"image_size": (16, 24), "patch_size": (4, 4), "embed_dim": 32, "depth": 2, "num_heads": 2, "init_std": 0.2}
GLOBAL = GlobalConfig(hidden_dim=24, out_dim=8, objective="vicreg")


def small_config(encoder=None, **fields):
    return HJEPAConfig(
        encoder=EncoderConfig(**(ENCODER | (encoder or {}))),
        predictor=PredictorConfig(depth=1, embed_dim=24, num_heads=2),
        pyramid=PyramidConfig(levels=2),
        level_weights=LevelWeightsConfig(weights=(2.0, 0.5)),
        **({"targets": "detached", "prediction": "view", "global_level": GLOBAL} | fields),
    )


def random_crops(count, seed):
    draw = torch.Generator().manual_seed(seed)
    size = 0.4 + 0.6 * torch.rand(count, 2, generator=draw)
    start = (1 - size) * torch.rand(count, 2, generator=draw)
    mirrored = torch.randint(0, 2, (count, 1), generator=draw)
    return torch.cat([start, size, mirrored], dim=1)  # left, top, width, height, mirrored


def batch(device, size=6):
    draw = torch.Generator().manual_seed(0)
    views = [torch.randn(size, 3, 16, 24, generator=draw).to(device) for _ in range(2)]
    return views, [random_crops(size, seed).to(device) for seed in (1, 2)]


def cut(crop, grid, fine=8):
    """Where every patch looks in the image: a picture of coordinates, cut, mirrored, averaged patch by patch."""
    left, top, width, height, mirrored = crop.tolist()
    rows = top + height * (torch.arange(grid[0] * fine, dtype=torch.float64) + 0.5) / (grid[0] * fine)
    columns = left + width * (torch.arange(grid[1] * fine, dtype=torch.float64) + 0.5) / (grid[1] * fine)
    picture = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    picture = picture.flip(-1) if mirrored else picture
    return functional.avg_pool2d(picture, fine)  # [2, rows, columns]


def test_relations_are_those_of_pictures_of_coordinates():
    crop, other = random_crops(8, 1).double(), random_crops(8, 2).double()
    relation = relate_crops(crop, other, GRID)
    for row in range(8):
        seen, there = cut(crop[row], GRID), cut(other[row], GRID)
        for axis, size in enumerate(GRID):
            # The image's coordinate is linear in the token's: two tokens of the other crop say how.
            line = there[axis].select(1 - axis, 0)
            expected = (seen[axis].flatten() - line[0]) / (line[1] - line[0])
            torch.testing.assert_close(relation.places[row, :, axis], (expected + 0.5) / size)
        both = ((relation.places[row] > 0) & (relation.places[row] < 1)).all(-1)
        assert torch.equal(relation.inside[row].bool(), both)
        for axis in (0, 1):
            spread = [one[axis].max() - one[axis].min() for one in (seen, there)]
            assert float(relation.change[row, axis]) == pytest.approx(float((spread[0] / spread[1]).log2()), abs=1e-6)
    assert relation.inside.min() == 0
    assert torch.equal(relation.change[:, 2], 1 - 2 * (crop[:, 4] != other[:, 4]).double())


@pytest.mark.parametrize("position", ["rope", "rope_mixed", "sincos"])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("reference", [(), (8, 12)])
def test_patches_that_lie_on_patches_are_predicted_as_hidden_ones_are(device, position, reference, half):
    encoder = EncoderConfig(**ENCODER, position=position, position_grid=reference)
    predictor = small_config({"position": position, "position_grid": reference}).build(device=device).predictor
    assert predictor.positions.reference == (reference or encoder.grid)
    with torch.no_grad():
        predictor.change.weight.zero_()
    context = torch.randn(3, 24, 32, device=device)
    crop = random_crops(3, 3).to(device)
    order = torch.arange(24, device=device).expand(3, -1)
    other = relate_crops(random_crops(3, 4).to(device), crop, GRID)
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        expected = predictor(context, order, order[:, None])[:, 0]
        same = predictor.across(context, relate_crops(crop, crop, GRID))
        torch.testing.assert_close(same, expected, **({"atol": 0.01, "rtol": 0.0} if half else {}))
        tokens = torch.zeros(3, 24, 24, device=device, dtype=expected.dtype)
        added = predictor.positions.add(tokens, GRID, None), predictor.positions.at(tokens, tokens[..., :2])[0]
        assert added[0].dtype == added[1].dtype  # the residual stream's
        assert (predictor.across(context, other) - expected).abs().max() > 1e-3


def test_a_change_of_size_or_direction_is_told_to_the_predictor(device):
    predictor = small_config().build(device=device).predictor
    context, relation = torch.randn(2, 24, 32, device=device), relate_crops(*(random_crops(2, 1).to(device),) * 2, GRID)
    one = predictor.across(context, relation)
    for field in range(3):
        change = relation.change.clone()
        change[:, field] -= 1
        assert (predictor.across(context, relation._replace(change=change)) - one).abs().max() > 1e-4


@pytest.mark.parametrize("objective", ["smooth_l1", "patch_discrimination"])
@pytest.mark.parametrize("targets", ["detached", "online", "ema", "pooled"])
@pytest.mark.parametrize("centred", [False, True])
@torch.no_grad()
def test_loss_is_that_of_both_directions_one_by_one(device, objective, targets, centred):
    model = small_config(targets=targets, objective=objective, center_targets=centred).build(device=device).eval()
    views, crops = batch(device)
    output = model(views, None, None, 0, crops)
    target = model.target_encoder or model.encoder
    wanted = torch.cat([target(view) for view in views])
    wanted = normalize(wanted - wanted.mean(0)) if centred else normalize(wanted)
    found = {0: 0.0, 1: 0.0}
    for own, other in ((0, 1), (1, 0)):
        relation = relate_crops(crops[own], crops[other], GRID)
        guess = model.predictor.across(model.encoder(views[other]), relation)
        inside = relation.inside.flatten().nonzero().flatten()
        for row in range(6):
            places = relation.inside[row].nonzero().T
            assert places.numel()
            tokens = wanted[own * 6 + row, places[0]][None]
            levels = zip(
                model.pyramid(scatter_to_canvas(guess[row, places[0]][None], places, GRID)),
                model.target_levels(scatter_to_canvas(tokens, places, GRID)),
                strict=True,
            )
            for level, (prediction, wish) in enumerate(levels):
                found[level] += float(model.losses.level(prediction, wish)) / 12
        assert 0 < len(inside) < 6 * 24
    for level, loss in found.items():
        assert float(output.level_losses[str(level)]) == pytest.approx(loss, rel=1e-4)
    expected = 2 * found[0] + 0.5 * found[1] + float(output.level_losses["global"])
    assert float(output.loss) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("global_level", [GLOBAL, None])
@pytest.mark.parametrize("targets", ["detached", "online", "ema", "pooled"])
def test_gradients_reach_all_that_trains(device, targets, global_level):
    kept = {"vicreg_weight": 0.1, "sigreg_weight": 0.1} if targets == "online" else {}
    model = small_config(targets=targets, global_level=global_level, **kept).build(device=device)
    views, crops = batch(device)
    assert not model.needs_masks(0)
    with torch.autocast(device.type, torch.bfloat16):
        output = model(views, None, None, 0, crops)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("target_"):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    rows = {name: len(one) for name, one in output.embeddings.items()}
    assert rows == {"encoder": 6, "0": 12, "1": 12} | ({"global": 6} if global_level else {})


def test_a_view_is_predicted_from_the_other_alone(device):
    model = small_config(global_level=None, targets="ema").build(device=device).eval()
    views, crops = batch(device)
    seen = []
    across = model.predictor.across

    def record(context, relation, grid):
        seen.append(across(context, relation, grid))
        return seen[-1]

    model.predictor.across = record
    model(views, None, None, 0, crops)
    model([views[0] + 1, views[1]], None, None, 0, crops)
    # The first half is the first view as the second one sees it.
    assert torch.equal(seen[0][:6], seen[1][:6])
    assert (seen[0][6:] - seen[1][6:]).abs().min(-1).values.max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_may_be_of_another_dtype(device, dtype):
    model = small_config(targets="ema", global_level=None).build(device=device).to(dtype)
    views, crops = batch(device)
    assert model([view.to(dtype) for view in views], None, None, 0, crops).loss.isfinite()


def test_views_beside_the_first_two_are_not_encoded_for_nothing(device):
    model = small_config(global_level=None, targets="ema").build(device=device)
    views, crops = batch(device)
    seen = []
    model.encoder.register_forward_hook(lambda _, arguments, __: seen.append(len(arguments[0])))
    model([*views, views[0]], None, None, 0, [*crops, crops[0]])
    assert seen == [12]


def test_views_may_change_places(device):
    model = small_config().build(device=device).eval()
    views, crops = batch(device)
    there, back = (model(views[::way], None, None, 0, crops[::way]).loss for way in (1, -1))
    torch.testing.assert_close(there, back)


def test_crops_that_share_nothing_have_no_loss(device):
    model = small_config(global_level=None, targets="ema").build(device=device)
    views, _ = batch(device, 2)
    apart = [torch.tensor([[left, 0.0, 0.5, 1.0, 0.0]] * 2, device=device) for left in (0.0, 0.5)]
    output = model(views, None, None, 0, apart)
    output.loss.backward()
    assert output.loss.item() == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("by_level", [False, True])
def test_vicreg_leaves_out_images_whose_crops_share_nothing(device, by_level):
    model = small_config(vicreg_weight=0.1, vicreg_levels=by_level).build(device=device)
    views, crops = batch(device)
    for crop, left in zip(crops, (0.0, 0.5), strict=True):
        crop[0] = torch.tensor([left, 0.0, 0.5, 1.0, 0.0])
    term = model(views, None, None, 0, crops).level_losses["vicreg"]
    others = model([view[1:] for view in views], None, None, 0, [crop[1:] for crop in crops]).level_losses["vicreg"]
    torch.testing.assert_close(term, others)


def test_prediction_at_every_other_step_needs_no_crops_between(device):
    model = small_config(predict_every=2).build(device=device)
    views, crops = batch(device)
    assert set(model(views, None, None, 0).level_losses) == {"global"}
    assert set(model(views, None, None, 1, crops).level_losses) == {"0", "1", "global"}
    with pytest.raises(ValueError, match="crops: none given; prediction=view"):
        model(views, None, None, 1)


def test_wrong_crops_and_views(device):
    model = small_config().build(device=device)
    views, crops = batch(device)
    with pytest.raises(ValueError, match=r"crops of shapes \(5, 5\), \(6, 5\)"):
        model(views, None, None, 0, [crops[0][:5], crops[1]])
    with pytest.raises(ValueError, match="allowed: 2 or more with masked_views=1, prediction=view"):
        small_config(global_level=None).build(device=device)(views[:1], None, None, 0, crops[:1])
    with pytest.raises(ValueError, match=r"views of shapes .*: one is not predicted from the other"):
        model([views[0], views[1][..., :16]], None, None, 0, crops)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="a width or height is not above 0"):
            model(views, None, None, 0, [crops[0], torch.zeros_like(crops[1])])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"masked_views": 2}, "masked_views=2: has no meaning with prediction=view; allowed: 1"),
        ({"instance_weight": 0.1}, "instance_weight=0.1: has no meaning"),
        ({"contrast": "batch"}, "contrast=batch: has no meaning with prediction=view; allowed: image"),
        ({"encoder": {"rope_legacy": True}}, "rope_legacy=True: has no meaning"),
        ({"targets": "projection"}, "targets other than projection"),
        ({"encoder": {"position": "learned"}}, "position=learned: has weights for the places of a grid"),
        ({"prediction": "veiw"}, "did you mean 'view'"),
    ],
)
def test_what_does_not_go_with_views_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        small_config(**fields)


def test_a_predictor_of_hidden_patches_knows_no_crops(device):
    predictor = small_config(prediction="hidden").build(device=device).predictor
    crop = random_crops(2, 1).to(device)
    with pytest.raises(ValueError, match="views=False"):
        predictor.across(torch.randn(2, 24, 32, device=device), relate_crops(crop, crop, GRID))
