import pytest
import torch

from hjepa_models import (
    HJEPA,
    EncoderConfig,
    HJEPAConfig,
    Position,
    PredictorConfig,
    PyramidConfig,
    StateConfig,
    load_pretrained,
    save_pretrained,
)
from hjepa_models.layers.positions import TABLES
from hjepa_models.resolution import at_resolution

STATE = StateConfig(recurrent_dim=16, hidden_dim=16, num_groups=2, num_classes=4)
SIZES = {"square": ((224, 224), (448, 448)), "not square": ((64, 96), (128, 96)), "smaller": ((96, 96), (64, 96))}


def build(device, position, size, patch=16, pyramid=None, **encoder):
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "init_std": 0.2}
    return HJEPAConfig(
        encoder=EncoderConfig(image_size=size, patch_size=(patch, patch), position=position, **(sizes | encoder)),
        predictor=PredictorConfig(depth=1, embed_dim=24, num_heads=2, state=STATE),
        pyramid=PyramidConfig(**({"levels": 3, "pooling": "learned", "fpn": "add", "fpn_dim": 16} | (pyramid or {}))),
    ).build(seed=1, device=device)


@pytest.mark.parametrize("position", list(Position))
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_a_resized_model_sees_what_the_old_one_interpolates(device, position, sizes):
    """Made its own or met by the way, a new resolution gives the same features at every level and predictions."""
    old, new = sizes
    model = build(device, position, old).eval()
    resized = at_resolution(model, new)
    assert resized.config.encoder.grid == tuple(n // 16 for n in new)
    images = torch.randn(2, 3, *new, device=device)
    for level in model.feature_levels:
        expected = model.features(images, level, "none")
        torch.testing.assert_close(resized.features(images, level, "none"), expected, atol=1e-4, rtol=1e-3)
    context = model.encoder(images)[:, :8]
    index = torch.arange(8, device=device).expand(2, -1)
    target = torch.arange(10, 22, device=device).view(1, 3, 4).expand(2, -1, -1)
    expected = model.predictor(context, index, target, model.encoder.grid_of(images))
    torch.testing.assert_close(resized.predictor(context, index, target), expected, atol=1e-4, rtol=1e-3)
    foreseen, _ = model.predictor.rollout(context, target, model.encoder.grid_of(images), 0)
    torch.testing.assert_close(resized.predictor.rollout(context, target, resized.encoder.grid, 0)[0], foreseen)


@pytest.mark.parametrize("position", [Position.rope, Position.learned])
@pytest.mark.parametrize("pooling", ["grid", "sequence"])
def test_attention_between_levels_sees_interpolated_places_too(device, position, pooling):
    pyramid = {"attention_heads": 2, "pooling": pooling, "pad": True, "fpn": "none"}
    model = build(device, position, (64, 64), pyramid=pyramid).eval()
    for level in model.pyramid.attention:
        torch.nn.init.normal_(level.query.weight)
        torch.nn.init.normal_(level.key_value.weight)
    model.target_pyramid.load_state_dict(model.pyramid.state_dict())
    images = torch.randn(2, 3, 128, 96, device=device)
    larger = at_resolution(model, (128, 96))
    again = at_resolution(larger, (128, 96))
    for resized in (larger, again):
        for level in range(3):
            expected = model.features(images, level, "none")
            torch.testing.assert_close(resized.features(images, level, "none"), expected, atol=1e-4, rtol=1e-3)
    if position is Position.rope:
        extended = at_resolution(model, (128, 96), "extend")
        assert extended.config.pyramid.position_grid == ()
        assert at_resolution(larger, (256, 192), "extend").pyramid.reference == ((8, 8) if pooling == "grid" else (64,))
        assert not torch.allclose(extended.features(images, 0), model.features(images, 0), atol=1e-3)


def test_what_is_frozen_stays_so(device):
    model = build(device, Position.learned, (64, 64))
    model.encoder.positions.table.requires_grad_(False)
    resized = at_resolution(model, (128, 96))
    flags = {name: parameter.requires_grad for name, parameter in resized.named_parameters()}
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not flags["encoder.positions.table"]


def test_distances_that_cannot_be_kept_are_refused(device):
    model = build(device, Position.rope, (64, 64), position_grid=(3, 3))
    assert at_resolution(model, (128, 128), "extend").config.encoder.position_grid == (6, 6)
    with pytest.raises(ValueError, match=r"positions=extend: \(3, 3\) positions over \(4, 4\) tokens make no whole"):
        at_resolution(model, (96, 96), "extend")


@pytest.mark.parametrize("position", list(Position))
def test_the_same_size_changes_nothing(device, position):
    model = build(device, position, (64, 96)).train()
    again = at_resolution(model, (64, 96))
    assert again.training
    state = again.state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(state[key], value, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("position", [Position.learned, Position.relative])
def test_tables_train_at_the_new_resolution(device, position):
    model = at_resolution(build(device, position, (64, 64)), (128, 96))
    rows = 8 * 6 if position is Position.learned else 15 * 11
    assert model.encoder.positions.table.shape[0] == rows
    assert model.target_encoder.positions.table.shape[0] == rows
    assert model.predictor.positions.table.shape[0] == rows
    model.encoder(torch.randn(1, 3, 128, 96, device=device)).square().sum().backward()
    assert (model.encoder.positions.table.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("position", [p for p in Position if p not in TABLES])
def test_extended_positions_keep_the_distance_of_tokens(device, position):
    """A corner of the larger image, encoded alone, is what the whole smaller image is."""
    model = build(device, position, (64, 64)).eval()
    extended = at_resolution(model, (128, 128), "extend")
    images = torch.randn(2, 3, 128, 128, device=device)
    corner = (torch.arange(8).unsqueeze(1) * 0 + torch.arange(4)).to(device)  # columns 0 to 3 of each row
    index = (torch.arange(4, device=device).unsqueeze(1) * 8 + corner[:4]).flatten().expand(2, -1)
    inside, whole = extended.encoder(images, index), model.encoder(images[:, :, :64, :64])
    torch.testing.assert_close(inside, whole, atol=1e-4, rtol=1e-4)
    interpolated = at_resolution(model, (128, 128)).encoder(images, index)
    assert (interpolated - whole).abs().max() > 1e-2
    back = at_resolution(extended, (64, 64), "extend")
    torch.testing.assert_close(back.encoder(images[:, :, :64, :64]), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("position", [Position.learned, Position.relative])
def test_tables_cannot_extend(device, position):
    with pytest.raises(ValueError, match=r"positions=extend: position=.* is a table"):
        at_resolution(build(device, position, (64, 64)), (128, 128), "extend")


@pytest.mark.parametrize(("positions", "message"), [("extend", "image_size=None keeps the size"), ("foo", "unknown")])
def test_positions_that_would_change_nothing_are_refused_at_load_time(tmp_path, positions, message):
    save_pretrained(build(None, Position.rope, (64, 64)), tmp_path)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path, positions=positions)


@pytest.mark.parametrize("positions", ["interpolate", "extend"])
def test_the_resolution_changes_at_load_time(device, tmp_path, positions):
    model = build(device, Position.rope, (64, 64))
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path, device, image_size=(128, 96), positions=positions)
    assert not loaded.training
    images = torch.randn(1, 3, 128, 96, device=device)
    expected = at_resolution(model, (128, 96), positions).eval().features(images, 1, "none")
    assert torch.equal(loaded.features(images, 1, "none"), expected)
    again = HJEPA.from_pretrained(tmp_path, device)
    assert again.config == model.config


def test_a_size_that_patches_cannot_tile_is_refused(device):
    with pytest.raises(ValueError, match="axis 1 has 100 pixels"):
        at_resolution(build(device, Position.rope, (64, 64)), (64, 100))
