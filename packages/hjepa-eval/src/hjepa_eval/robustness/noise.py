"""Noise: Gaussian, shot, impulse. Images are [B, 3, H, W] in [0, 1]."""

import torch

from hjepa_eval.robustness.draws import Draws
from hjepa_eval.robustness.maps import Images


def gaussian_noise(x: Images, deviation: float, draws: Draws) -> Images:
    """Add normal noise of a deviation."""
    return x + deviation * draws.normal(*x.shape[1:])


def shot_noise(x: Images, photons: float, draws: Draws) -> Images:
    """Count photons: Poisson(x * photons) / photons."""
    return draws.poisson(x * photons) / photons


def impulse_noise(x: Images, share: float, draws: Draws) -> Images:
    """A share of all values, channel by channel, becomes 0 or 1."""
    hit = draws.uniform(0, 1, *x.shape[1:]) < share
    return torch.where(hit, (draws.uniform(0, 1, *x.shape[1:]) < 0.5).to(x), x)
