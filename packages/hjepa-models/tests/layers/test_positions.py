import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hjepa_models.grid import grid_coordinates
from hjepa_models.layers.positions import (
    ROTARY,
    GridPositions,
    Position,
    Rotation,
    _rotate_by_token,
    legacy_angles,
    rotate,
    rotation_angles,
)


def logits(query, key, coordinates, head_dim=24, theta=100.0):
    angle = rotation_angles(coordinates, head_dim, theta)[None, None]
    rotation = Rotation(angle.cos(), angle.sin())
    count = len(coordinates)
    query, key = (x.expand(1, 1, count, head_dim) for x in (query, key))
    return rotate(query, rotation) @ rotate(key, rotation).transpose(-2, -1)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_logits_depend_on_differences_of_coordinates_only(device, axes):
    query, key = torch.randn(2, 24, device=device)
    place = torch.randint(0, 30, (12, axes), device=device).float()
    shift = torch.randint(-50, 50, (axes,), device=device).float()
    torch.testing.assert_close(logits(query, key, place), logits(query, key, place + shift), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_axis_changes_the_logits(device, axis):
    query, key = torch.randn(2, 24, device=device)
    place = torch.zeros(2, 3, device=device)
    place[1, axis] = 1
    result = logits(query, key, place)[0, 0]
    assert (result[0, 1] - result[0, 0]).abs() > 1e-3


def test_rotation_equals_complex_multiplication_in_float64(device):
    x = torch.randn(1, 1, 5, 8, device=device)
    place = torch.arange(5.0, device=device).unsqueeze(1)
    angle = rotation_angles(place, 8, 10.0)
    turned = rotate(x, Rotation(angle.cos(), angle.sin()))[0, 0].double()
    for k in range(5):
        for i in range(4):
            rate = 10.0 ** (-i / 4)
            pair = complex(x[0, 0, k, i], x[0, 0, k, i + 4]) * complex(math.cos(k * rate), math.sin(k * rate))
            assert complex(turned[k, i], turned[k, i + 4]) == pytest.approx(pair, abs=1e-5)


def test_angles_stay_in_float32_under_autocast(device):
    with torch.autocast(device.type, torch.bfloat16):
        angle = rotation_angles(torch.full((1, 1), 1001.0, device=device), 8, 100.0)
    assert angle.dtype == torch.float32
    assert angle[0, 0] == 1001.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 4), (1, 1, 5, 4), (2, 1, 5, 4), (2, 3, 5, 4)])
def test_the_form_for_gpus_is_the_same_rotation_with_the_heads_of_a_token_side_by_side(device, dtype, shape):
    query = torch.randn(2, 3, 5, 8, dtype=dtype, requires_grad=True)
    angle, wish = torch.randn(shape), torch.randn(2, 3, 5, 8, dtype=dtype)
    plain = rotate(query, Rotation(angle.cos(), angle.sin()))
    placed = query.detach().to(device).requires_grad_()
    turned = _rotate_by_token(placed, angle.cos().to(device), angle.sin().to(device))
    # A GPU rounds a product and a sum at once.
    exact = {"rtol": 0.0, "atol": 0.0} if device.type == "cpu" else {}
    torch.testing.assert_close(turned.cpu(), plain, **exact)
    gradients = torch.autograd.grad(plain, query, wish)[0], torch.autograd.grad(turned, placed, wish.to(device))[0]
    torch.testing.assert_close(gradients[1].cpu(), gradients[0], **exact)
    assert turned.transpose(1, 2).is_contiguous()


def test_channels_that_axes_cannot_share_are_not_rotated(device):
    assert rotation_angles(torch.ones(1, 3, device=device), 16, 100.0)[0, 6:].tolist() == [0.0, 0.0]


def build(kind, reference=(3, 4), *, legacy=False, depth=2, std=1.0):
    positions = GridPositions(kind, 24, 2, depth, 100.0, reference, legacy)
    positions.init_weights(torch.Generator().manual_seed(0), std)
    return positions


@pytest.mark.parametrize("kind", list(Position))
def test_gathered_positions_equal_the_whole_table(device, kind):
    positions = build(kind).to(device)
    index = torch.tensor([[5, 0, 11], [2, 2, 7]], device=device)
    whole, part = (positions.embedding((3, 4), i, device) for i in (None, index))
    assert (whole is None) == (kind not in (Position.sincos, Position.learned))
    if whole is not None:
        assert torch.equal(part, whole[0][index])
    for whole, part in zip(*(positions.places((3, 4), i, device, prefix=2) for i in (None, index)), strict=True):
        assert (whole.rotation is None) == (kind not in ROTARY)
        assert (whole.bias is None) == (kind is not Position.relative)
        if whole.rotation is not None:
            for angle in ("cos", "sin"):
                all_of_them, some = getattr(whole.rotation, angle), getattr(part.rotation, angle)
                for row in range(2):
                    assert torch.equal(some[row, :, 2:], all_of_them[0, :, 2:][:, index[row]])
            assert part.rotation.sin[:, :, :2].eq(0).all()
            assert part.rotation.cos[:, :, :2].eq(1).all()
        if whole.bias is not None:
            inner = whole.bias[0, :, 2:, 2:]
            for row in range(2):
                assert torch.equal(part.bias[row, :, 2:, 2:], inner[:, index[row]][:, :, index[row]])
            assert part.bias[:, :, :2].eq(0).all()
            assert part.bias[:, :, :, :2].eq(0).all()


@pytest.mark.parametrize("reference", [(5,), (3, 4), (2, 3, 2)])
def test_relative_bias_is_one_number_per_offset_and_head(device, reference):
    positions = build(Position.relative, reference).to(device)
    (place, again) = positions.places(reference, None, device)
    assert place.bias is again.bias  # shared by the layers
    coordinates = grid_coordinates(reference, device=device).long()
    table = positions.table.view(*(2 * n - 1 for n in reference), 2)
    for i, at in enumerate(coordinates):
        for j, other in enumerate(coordinates):
            offset = tuple((at - other + torch.tensor(reference, device=device) - 1).tolist())
            assert torch.equal(place.bias[0, :, i, j], table[offset])


def test_mixed_frequencies_turn_the_axes_of_each_head_and_layer(device):
    """Untrained, every head sees the axial frequencies along axes of its own, so their lengths are the same."""
    positions = build(Position.rope_mixed).to(device)
    rate = 100.0 ** (-torch.arange(3, device=device) / 3)
    lengths = positions.frequencies.norm(dim=-1)
    torch.testing.assert_close(lengths, rate.repeat(2).expand_as(lengths), atol=1e-5, rtol=1e-5)
    assert (positions.frequencies[0, 0] - positions.frequencies[0, 1]).abs().max() > 0.1
    assert (positions.frequencies[0, 0] - positions.frequencies[1, 0]).abs().max() > 0.1
    first, second = positions.places((3, 4), None, device)
    assert first.rotation.cos.shape == (1, 2, 12, 6)
    assert not torch.equal(first.rotation.cos, second.rotation.cos)
    with torch.no_grad():  # with the axes unturned it is axial RoPE
        positions.frequencies.zero_()
        positions.frequencies[:, :, :3, 0] = positions.frequencies[:, :, 3:, 1] = rate
    axial = build(Position.rope).places((3, 4), None, device)[0].rotation
    mixed = positions.places((3, 4), None, device)[0].rotation
    torch.testing.assert_close(mixed.cos[:, :1], axial.cos)
    torch.testing.assert_close(mixed.sin[:, 1:], axial.sin)


def test_legacy_rotation_is_not_relative_and_the_right_one_is(device):
    query, key = torch.randn(2, 1, 1, 1, 24, device=device)
    products = {}
    for legacy, angles in ((False, rotation_angles), (True, legacy_angles)):
        for shift in (0, 5):
            near, far = (angles(torch.tensor([[x, x]], device=device), 24, 100.0) for x in (shift + 1.0, shift + 3.0))
            turned = [rotate(x, Rotation(a.cos(), a.sin(), legacy)) for x, a in ((query, near), (key, far))]
            products[legacy, shift] = float((turned[0] * turned[1]).sum())
    assert products[False, 0] == pytest.approx(products[False, 5], abs=1e-4)
    assert abs(products[True, 0] - products[True, 5]) > 1e-2


@pytest.mark.parametrize(("old", "new"), [((14, 14), (28, 28)), ((6, 9), (12, 18)), ((8, 6), (4, 6)), ((3, 4), (5, 9))])
def test_a_learned_table_is_interpolated_like_an_image(device, old, new):
    positions = build(Position.learned, old).to(device)
    seen = positions.embedding(new, None, device)[0]
    image = positions.table.T.reshape(1, 24, *old)
    expected = torch.nn.functional.interpolate(image, size=new, mode="bilinear", align_corners=False)
    torch.testing.assert_close(seen, expected[0].flatten(1).T, atol=1e-5, rtol=1e-5)


@given(st.integers(2, 6), st.integers(2, 6), st.sampled_from([1, 2, 3]))
def test_rotary_positions_of_a_finer_grid_keep_the_extent(height, width, factor):
    """A cell of the coarse grid lies where the mean of the finer tokens inside it lies."""
    positions = build(Position.rope, (height, width))
    coordinates = grid_coordinates((height * factor, width * factor), positions.reference)
    cells = coordinates.view(height, factor, width, factor, 2).mean((1, 3)).flatten(0, 1)
    torch.testing.assert_close(cells, grid_coordinates((height, width)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("factor", [2, 3])
def test_relative_bias_of_a_finer_grid_keeps_the_extent(device, factor):
    """A table that is linear in the offset stays that line in coarse tokens."""
    positions = build(Position.relative, (4, 5)).to(device)
    with torch.no_grad():
        offsets = grid_coordinates((7, 9), device=device) - torch.tensor([3.0, 4.0], device=device)
        positions.table.copy_(torch.stack([offsets[:, 0], offsets[:, 1]], -1))
    bias = positions.places((4 * factor, 5 * factor), None, device)[0].bias[0]
    place = grid_coordinates((4 * factor, 5 * factor), device=device) / factor
    limit = torch.tensor([3.0, 4.0], device=device)
    expected = (place[:, None] - place[None]).clamp(-limit, limit).permute(2, 0, 1)
    torch.testing.assert_close(bias, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [Position.learned, Position.relative, Position.rope_mixed])
def test_gradients_reach_what_is_learned(device, kind):
    positions = build(kind).to(device)
    place = positions.places((6, 8), None, device)
    for one in place:
        for value in (one.bias, *(one.rotation or ())):
            if isinstance(value, torch.Tensor):
                (value.sum() * 0.5).backward(retain_graph=True)
    if kind is Position.learned:
        positions.embedding((6, 8), None, device).sum().backward()
    gradients = [p.grad for p in positions.parameters()]
    assert len(gradients) == 1
    assert gradients[0].abs().sum() > 0
