import math

import pytest
import torch

from hjepa_models.layers.positions import GridPositions, Position, Rotation, rotate, rotation_angles


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


def test_channels_that_axes_cannot_share_are_not_rotated(device):
    assert rotation_angles(torch.ones(1, 3, device=device), 16, 100.0)[0, 6:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", list(Position))
def test_gathered_positions_equal_the_whole_table(device, kind):
    positions = GridPositions(kind, 24, 2, 100.0, (3, 4))
    index = torch.tensor([[5, 0, 11], [2, 2, 7]], device=device)
    whole, part = (positions.embedding((3, 4), i, device) for i in (None, index))
    assert (whole is None) == (kind is Position.rope)
    if whole is not None:
        assert torch.equal(part, whole[0][index])
    whole, part = (positions.rotation((3, 4), i, device, prefix=2) for i in (None, index))
    assert (whole is None) == (kind is Position.sincos)
    if whole is not None:
        for all_of_them, some in zip(whole, part, strict=True):
            assert torch.equal(some[:, 0, 2:], all_of_them[0, 0, 2:][index])
        assert torch.equal(part.sin[:, :, :2], torch.zeros_like(part.sin[:, :, :2]))
        assert torch.equal(part.cos[:, :, :2], torch.ones_like(part.cos[:, :, :2]))
