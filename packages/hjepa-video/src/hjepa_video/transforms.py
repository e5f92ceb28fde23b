"""Views of a clip: one box and one flip for all of its frames."""

from __future__ import annotations

from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional as F

from hjepa_data.errors import refuse
from hjepa_data.random import Draws
from hjepa_data.transforms.crop import ViewGroup, resized_crop_box

__all__ = ["center_view", "random_view"]


def random_view(frames: UInt8[Tensor, "T H W 3"], view: ViewGroup, *draws_key: int) -> UInt8[Tensor, "3 T h w"]:
    """Cut a random-resized crop out of a clip, the same box and flip in every frame.

    Args:
        frames: RGB frames.
        view: Size, scale, aspect, flip and interpolation; its ``count`` is not looked at.
        draws_key: (seed, epoch, sample, view number): what the random numbers are a function of.

    Returns:
        The view, channels first.
    """
    draws = Draws(*draws_key)
    left, top, width, height = resized_crop_box(draws, frames.shape[2], frames.shape[1], view.scale, view.ratio)
    flip = draws.uniform() < view.flip
    out = _resized(frames[:, top : top + height, left : left + width], view)
    return out.flip(3) if flip else out


def center_view(
    frames: UInt8[Tensor, "T H W 3"], view: ViewGroup, crop_fraction: float = 1.0
) -> UInt8[Tensor, "3 T h w"]:
    """Cut the centre of a clip: the largest box of the view's aspect, times ``crop_fraction``.

    Args:
        frames: RGB frames.
        view: Size and interpolation.
        crop_fraction: Part of the box's sides that is kept, in (0, 1].

    Returns:
        The view, channels first.

    Raises:
        ValueError: ``crop_fraction`` is out of its range.
    """
    if not 0 < crop_fraction <= 1:
        refuse("crop_fraction", crop_fraction, "no part of the sides", "allowed: above 0 and at most 1")
    full_height, full_width = frames.shape[1:3]
    scale = min(full_height / view.size[0], full_width / view.size[1]) * crop_fraction
    height = min(full_height, max(1, round(view.size[0] * scale)))
    width = min(full_width, max(1, round(view.size[1] * scale)))
    top, left = (full_height - height) // 2, (full_width - width) // 2
    return _resized(frames[:, top : top + height, left : left + width], view)


def _resized(box: UInt8[Tensor, "T H W 3"], view: ViewGroup) -> UInt8[Tensor, "3 T h w"]:
    pixels = box.permute(0, 3, 1, 2)
    pixels = F.interpolate(pixels, size=view.size, mode=view.interpolation.value, antialias=True)
    return pixels.transpose(0, 1).contiguous()
