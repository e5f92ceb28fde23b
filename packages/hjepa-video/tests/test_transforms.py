import pytest
import torch

from hjepa_data import ViewGroup
from hjepa_video import center_view, random_view
from hjepa_video.testing import moving_frames


def gradient(frames=4, height=40, width=60):
    """Frames whose pixels tell their place: red grows down, green to the right, blue is the time."""
    clip = torch.zeros(frames, height, width, 3, dtype=torch.uint8)
    clip[..., 0] = torch.linspace(0, 255, height).to(torch.uint8)[:, None]
    clip[..., 1] = torch.linspace(0, 255, width).to(torch.uint8)
    clip[..., 2] = torch.arange(frames)[:, None, None]
    return clip


def test_all_frames_are_cut_by_one_box_and_flipped_together():
    view = ViewGroup(size=(16, 24), scale=(0.2, 0.6))
    flips = set()
    for sample in range(20):
        out = random_view(gradient(), view, 0, 0, sample, 0)
        assert out.shape == (3, 4, 16, 24)
        assert out.dtype == torch.uint8
        assert torch.equal(out[:2], out[:2, :1].expand(2, 4, 16, 24))
        assert torch.equal(out[2, :, 0, 0], torch.arange(4, dtype=torch.uint8))
        flips.add(bool(out[1, 0, 0, 0] > out[1, 0, 0, -1]))
    assert flips == {True, False}


def test_a_view_is_a_function_of_its_key():
    clip, view = moving_frames(4), ViewGroup(size=(32, 32))
    first = random_view(clip, view, 1, 2, 3, 0)
    assert torch.equal(first, random_view(clip, view, 1, 2, 3, 0))
    for key in ((2, 2, 3, 0), (1, 3, 3, 0), (1, 2, 4, 0), (1, 2, 3, 1)):
        assert not torch.equal(first, random_view(clip, view, *key))


def test_the_whole_picture_at_its_own_size_is_unchanged():
    clip = moving_frames(3)
    view = ViewGroup(size=(96, 128), scale=(1.0, 1.0), ratio=(128 / 96, 128 / 96), flip=0.0)
    expected = clip.permute(3, 0, 1, 2)
    assert torch.equal(random_view(clip, view, 0, 0, 0, 0), expected)
    assert torch.equal(center_view(clip, view), expected)


def test_the_centre_is_the_middle_of_the_right_aspect():
    out = center_view(gradient(), ViewGroup(size=(20, 20)), crop_fraction=0.5)
    # Of 60 columns the middle 20, of 40 rows the middle 20: columns 20..39, rows 10..29.
    assert out.shape == (3, 4, 20, 20)
    assert out[1, 0, 0].tolist() == gradient()[0, 0, 20:40, 1].tolist()
    assert out[0, 0, :, 0].tolist() == gradient()[0, 10:30, 0, 0].tolist()
    with pytest.raises(ValueError, match="crop_fraction"):
        center_view(gradient(), ViewGroup(size=(20, 20)), crop_fraction=0.0)
