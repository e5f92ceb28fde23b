"""Rotation, occlusion, lower resolution."""

import pytest
import torch

from hjepa_eval.robustness.shift import lower_resolution, occlude, rotate

IMAGES = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_right_angles_only_move_pixels():
    assert torch.equal(rotate(IMAGES, 0), IMAGES)
    for quarter in (1, 2, 3):
        assert torch.equal(rotate(IMAGES, 90 * quarter), IMAGES.rot90(quarter, (2, 3)))


def test_corners_become_the_mean_colour():
    turned = rotate(IMAGES, 45)
    assert torch.equal(turned[:, :, 0, 0], IMAGES.double().mean(dim=(2, 3)).round().to(torch.uint8))
    assert not torch.equal(turned, IMAGES)


def test_occlusion_covers_exact_shares_that_grow():
    mean = IMAGES.double().mean(dim=(2, 3), keepdim=True).round().to(torch.uint8)
    before = torch.zeros(3, 32, 32, dtype=torch.bool)
    for share in (0.0, 0.25, 0.5, 1.0):
        hidden = (occlude(IMAGES, share, patch=4) == mean).all(dim=1)
        cells = hidden.unflatten(2, (8, 4)).unflatten(1, (8, 4)).transpose(2, 3).flatten(3).all(dim=3)
        assert cells.flatten(1).sum(dim=1).tolist() == [round(share * 64)] * 3
        assert bool((hidden | ~before).all())
        before = hidden
    first, again = occlude(IMAGES, 0.5), occlude(IMAGES[1:], 0.5, samples=torch.tensor([1, 2]))
    assert torch.equal(first[1:], again)
    assert not torch.equal(first, occlude(IMAGES, 0.5, seed=1))
    same = occlude(IMAGES[:1].expand(2, -1, -1, -1), 0.5)
    assert not torch.equal(same[0], same[1])


def test_resolution_is_lost_and_the_mean_is_kept():
    assert lower_resolution(IMAGES, 1.0) is IMAGES
    half, eighth = (lower_resolution(IMAGES, share).double() for share in (0.5, 0.125))
    assert half.std() > 1.5 * eighth.std()
    assert half.mean() == pytest.approx(float(IMAGES.double().mean()), abs=1)
    # A checkerboard of 2x2 cells is grey once four cells share a pixel.
    board = (torch.arange(32) // 2 % 2)[:, None] ^ (torch.arange(32) // 2 % 2)
    board = (255 * board).to(torch.uint8).expand(1, 3, -1, -1)
    assert lower_resolution(board, 0.25).double().std() < 1


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: occlude(IMAGES, 1.5), "share=1.5"),
        (lambda: occlude(IMAGES, 0.5, patch=40), "patch=40"),
        (lambda: lower_resolution(IMAGES, 0.0), "share=0"),
        (lambda: rotate(IMAGES.float(), 3), "uint8"),
    ],
)
def test_wrong_input_is_named(call, expected):
    with pytest.raises(ValueError, match=expected):
        call()


def test_no_image_stays_no_image():
    for change in (lambda x: rotate(x, 30), lambda x: occlude(x, 0.5), lambda x: lower_resolution(x, 0.5)):
        assert change(IMAGES[:0]).shape == IMAGES[:0].shape
