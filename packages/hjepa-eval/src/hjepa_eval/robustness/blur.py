"""Blur: defocus, frosted glass, motion, zoom. Images are [B, 3, H, W] in [0, 1]."""

import torch

from hjepa_eval.robustness.draws import Draws
from hjepa_eval.robustness.maps import (
    Images,
    convolve,
    disk_kernel,
    gaussian_blur,
    separable,
    trail_blur,
    zoom_matrix,
)


def defocus_blur(x: Images, parameters: tuple[float, float], draws: Draws) -> Images:
    """Convolution with a disk: (radius, deviation that softens its rim), pixels."""
    return convolve(x, disk_kernel(*parameters))


def motion_blur(x: Images, parameters: tuple[float, float], draws: Draws) -> Images:
    """A trail of (radius, deviation), pixels, at an angle from -45 to 45 degrees."""
    return trail_blur(x, *parameters, angle=draws.uniform(-45, 45))


def zoom_blur(x: Images, parameters: tuple[float, int], draws: Draws) -> Images:
    """Mean of the image and its zooms by 1, 1 + step, ...: (step, count)."""
    step, count = parameters
    height, width = x.shape[-2:]
    total = x.clone()
    for number in range(count):
        # The step as numpy.arange(1, ..., step) has it: of 26 pixels times 1.25, 32 or 33 hang on its last bit.
        factor = 1 + ((1 + step) - 1) * number
        total += separable(x, zoom_matrix(height, factor), zoom_matrix(width, factor))
    return total / (count + 1)


def glass_blur(x: Images, parameters: tuple[float, int, int], draws: Draws) -> Images:
    """Blurred, pixels displaced, blurred again: (deviation, reach of a displacement in pixels, rounds).

    Pixels are visited from the last to the first, and each takes the value of one up to a reach away, which may have
    changed already. The published code means to swap the two; its assignment copies, and so do the published images.
    """
    sigma, reach, rounds = parameters
    batch, channels, height, width = x.shape
    x = (gaussian_blur(x, sigma) * 255 + 1e-3).floor()
    place = torch.arange(height * width, device=x.device).view(height, width)
    interior = torch.zeros(height, width, dtype=torch.bool, device=x.device)
    interior[reach + 1 : height - reach + 1, reach + 1 : width - reach + 1] = True
    visited, here = interior.flatten(), place.flatten()
    for _ in range(rounds):
        dy, dx = (draws.integers(-reach, reach, height * width) for _ in range(2))
        source = torch.where(visited, here + dy * width + dx, here)
        # A place further on was visited before, and holds what it took itself: follow it to the end, by doubling.
        node = torch.where(visited[source] & (source > here), source, here)
        while not torch.equal(following := node.gather(1, node), node):
            node = following
        end = source.gather(1, node)
        x = x.flatten(2).gather(2, end[:, None].expand(-1, channels, -1)).view(batch, channels, height, width)
    return gaussian_blur(x / 255, sigma)
