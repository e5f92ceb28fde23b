"""Colour augmentation of a whole batch on its device, with its own factors for every image and view.

Tint, brightness, contrast, saturation, hue and greyscale are affine in the colour of a pixel: their product is one
3x3 matrix and one offset for an image: one pass over the pixels. Hue turns the chroma plane of YIQ, which is close to a
shift of HSV's hue. Between these steps nothing is clipped; then come blur and solarization, in the order of BYOL.

Source: Grill et al., "Bootstrap your own latent" (arXiv 2006.07733), appendix B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torch.nn import functional

from hjepa_data.errors import refuse
from hjepa_data.random import uniform

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "ColorAugment", "ColorConfig", "normalize"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_COLOR = 5
_CHANGED, _CHANGE, _GRAYSCALE, _BLUR, _SOLARIZE, _SIGMA, _TINT = 0, slice(1, 5), 5, 6, 7, 8, slice(9, 12)
_LUMA = (0.299, 0.587, 0.114)
_TO_YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))
_EYE = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
_KEEP_LUMA, _COS, _SIN = (
    ((1, 0, 0), (0, 0, 0), (0, 0, 0)),
    ((0, 0, 0), (0, 1, 0), (0, 0, 1)),
    ((0, 0, 0), (0, 0, -1), (0, 1, 0)),
)
_FROM_YIQ = tuple(map(tuple, torch.linalg.inv(torch.tensor(_TO_YIQ, dtype=torch.float64)).tolist()))


@dataclass(kw_only=True, slots=True)
class ColorConfig:
    """How colours are changed.

    Attributes:
        probability: of a change of brightness, contrast, saturation and hue (all or none).
        brightness: factors are drawn from 1 - b to 1 + b.
        contrast: likewise, about the mean grey of the image.
        saturation: likewise, about the grey of the pixel.
        hue: turns are drawn from -h to h, in full turns; at most 0.5.
        grayscale: probability of a grey image.
        tint: gain of each channel, drawn from exp(-t) to exp(t) log-uniformly, for every image: other light.
        blur: probability of a Gaussian blur; 1, 0.1 and 0.5 for the two global and the local views of DINO.
        blur_sigma: range of the blur's standard deviation, pixels; uniform. The kernel reaches three times as far.
        solarize: probability that values above the threshold are inverted.
        solarize_threshold: from 0 to 1.
    """

    probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.2
    tint: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, ...] = (0.1, 2.0)
    solarize: float = 0.0
    solarize_threshold: float = 0.5

    def __post_init__(self) -> None:
        self.blur_sigma = tuple(self.blur_sigma)
        for name in ("probability", "grayscale", "blur", "solarize", "brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                refuse(name, getattr(self, name), "out of range", "allowed: 0 to 1")
        if not 0 <= self.tint <= 3:
            refuse("tint", self.tint, "out of range", "allowed: 0 to 3, in units of log gain")
        if not 0 <= self.hue <= 0.5:
            refuse("hue", self.hue, "out of range", "allowed: 0 to 0.5 turns")
        if len(self.blur_sigma) != 2 or not 0 < self.blur_sigma[0] <= self.blur_sigma[1] < math.inf:
            refuse("blur_sigma", self.blur_sigma, "no range", "allowed: 0 < smallest <= largest, pixels")
        if not 0 <= self.solarize_threshold <= 1:
            refuse("solarize_threshold", self.solarize_threshold, "out of range", "allowed: 0 to 1")

    def build(self, seed: int) -> ColorAugment:
        """Build the augmentation.

        Args:
            seed: of its random numbers.

        Returns:
            The augmentation.
        """
        return ColorAugment(self, seed)


class ColorAugment:
    """Colour augmentation of batches, a pure function of (seed, step, sample, view).

    Args:
        config: how colours are changed.
        seed: of the random numbers.
    """

    _NUM_DRAWS = 12

    def __init__(self, config: ColorConfig, seed: int) -> None:
        self.config = config
        self._seed = seed

    def __call__(
        self, images: Num[Tensor, "B 3 *S"], step: int, sample: Int[Tensor, " B"], view: int
    ) -> Float[Tensor, "B 3 *S"]:
        """Augment a batch.

        Args:
            images: uint8 pixels, or floats in [0, 1]; images or clips, a clip is changed as a whole.
            step: number of the step (or of the epoch).
            sample: number of each image in its source, on the images' device.
            view: number of the view.

        Returns:
            Floats in [0, 1].

        Raises:
            ValueError: the images have not three channels, or are of other integers.
        """
        if images.ndim < 3 or images.shape[1] != 3:
            refuse("images", tuple(images.shape), "colours need three channels", "allowed: [B, 3, H, W]")
        config = self.config
        pixels = to_unit(images)
        draws = uniform(self._seed, _COLOR, step, view, sample, n=self._NUM_DRAWS)
        flat = pixels.flatten(2)
        matrix, offset, chosen = _color_affine(config, draws, flat.mean(2))
        pixels = torch.baddbmm(offset, matrix, flat).clamp_(0, 1).view_as(pixels)
        if config.blur:
            low, high = config.blur_sigma
            # A blur this narrow is the identity in float32, so the images that were not chosen pass unchanged.
            none = _constant((1e-3,), pixels.device)
            sigma = torch.where(chosen[:, _BLUR], low + (high - low) * draws[:, _SIGMA], none)
            pixels = _gaussian_blur(pixels, sigma, high)
        if config.solarize:
            bright = _per_image(chosen[:, _SOLARIZE], pixels) & (pixels >= config.solarize_threshold)
            pixels = torch.where(bright, 1 - pixels, pixels)
        return pixels


def normalize(
    images: Num[Tensor, "B C *S"],
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Float[Tensor, "B C *S"]:
    """Turn pixels into what a model takes: (x - mean) / std for each channel.

    Args:
        images: uint8 pixels, or floats in [0, 1].
        mean: of each channel, on the scale of 0 to 1.
        std: of each channel, on the scale of 0 to 1.

    Returns:
        Floats.

    Raises:
        ValueError: mean and std have not a number for each channel, or the images are of other integers.
    """
    _check_type(images)
    channels = images.shape[1]
    if len(mean) != channels or len(std) != channels:
        refuse(
            "mean", tuple(mean), f"images have {channels} channels", f"allowed: {channels} numbers in mean and in std"
        )
    scale = 1 / 255 if images.dtype == torch.uint8 else 1.0
    shape = (1, channels) + (1,) * (images.ndim - 2)
    # x * (scale / std) - mean / std: one multiplication and one addition a pixel.
    factor = _constant(tuple(scale / s for s in std), images.device).view(shape)
    offset = _constant(tuple(-m / s for m, s in zip(mean, std, strict=True)), images.device).view(shape)
    dtype = torch.float32 if images.dtype == torch.uint8 else images.dtype
    return torch.addcmul(offset.to(dtype), images, factor.to(dtype))


@lru_cache(maxsize=64)
def _constant(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """Keep a constant on its device: making it anew would wait for the device in every step."""
    return torch.tensor(values, device=device, dtype=torch.float32)


def to_unit(images: Num[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
    """Turn uint8 pixels into float32 in [0, 1]; floats are cast."""
    _check_type(images)
    return images * _constant((1 / 255,), images.device) if images.dtype == torch.uint8 else images.float()


def _check_type(images: Tensor) -> None:
    if images.dtype != torch.uint8 and not images.is_floating_point():
        refuse("images", str(images.dtype), "pixels of unknown range", "allowed: uint8, or floats in [0, 1]")


def _color_affine(
    config: ColorConfig, draws: Float[Tensor, "B 12"], channel_mean: Float[Tensor, "B 3"]
) -> tuple[Float[Tensor, "B 3 3"], Float[Tensor, "B 3 1"], Bool[Tensor, "B 12"]]:
    """Matrix and offset of tint, brightness, contrast, saturation, hue and greyscale, in this order; what is chosen."""
    device, never = draws.device, (0.0,)
    # One comparison and one product for all draws: a small operation costs its launch.
    probability = (config.probability, *never * 4, config.grayscale, config.blur, config.solarize, *never * 4)
    chosen = draws < _constant(probability, device)
    strength = (config.brightness, config.contrast, config.saturation, config.hue)
    change = (2 * draws - 1) * _constant((0.0, *strength, *never * 4, *(config.tint,) * 3), device)
    gain = torch.exp(change[:, _TINT])
    change = change[:, _CHANGE] * chosen[:, _CHANGED, None]
    factor = 1 + change[:, :3]
    rest = 1 - factor
    brightness, contrast, saturation = factor.unbind(1)
    angle = 2 * math.pi * change[:, 3]
    luma = _constant(_LUMA, device)
    grey = luma.expand(3, 3)
    scale = brightness * contrast
    # Contrast c about the mean grey m of the brightened image: c x + (1 - c) m.
    offset = (rest[:, 1] * brightness * ((gain * channel_mean.float()) @ luma))[:, None].expand(-1, 3)
    mixed = torch.addcmul(rest[:, 2, None, None] * grey, saturation[:, None, None], _constant(_EYE, device))
    matrix = _hue_rotation(angle) @ mixed
    matrix = torch.where(chosen[:, _GRAYSCALE, None, None], grey @ matrix, matrix)
    # All steps after the tint keep grey at its place, so that the offset passes through them as it is.
    return matrix * scale[:, None, None] * gain[:, None, :], offset[:, :, None], chosen


def _hue_rotation(angle: Float[Tensor, " B"]) -> Float[Tensor, "B 3 3"]:
    keep, cos, sin = (_constant(part, angle.device) for part in (_KEEP_LUMA, _COS, _SIN))
    angle = angle[:, None, None]
    turn = torch.addcmul(torch.addcmul(keep, angle.cos(), cos), angle.sin(), sin)
    return _constant(_FROM_YIQ, angle.device) @ turn @ _constant(_TO_YIQ, angle.device)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (images.ndim - 1))


def _gaussian_blur(
    images: Float[Tensor, "B C *S"], sigma: Float[Tensor, " B"], largest: float
) -> Float[Tensor, "B C *S"]:
    # Three deviations hold 99.7 % of the kernel; with two a blur is a tenth narrower than its name.
    radius = min(math.ceil(3 * largest), min(images.shape[-2:]) - 1)
    exponent = _constant(tuple(-(place**2) for place in range(-radius, radius + 1)), images.device)
    kernel = torch.exp(exponent / (2 * sigma[:, None] ** 2))
    kernel = kernel / kernel.sum(1, keepdim=True)
    planes = images.shape[1:-2].numel()
    weight = kernel.repeat_interleave(planes, dim=0)[:, None]
    x = images.reshape(1, -1, *images.shape[-2:])
    x = functional.pad(x, (radius,) * 4, mode="reflect")
    x = functional.conv2d(x, weight[:, :, None, :], groups=x.shape[1])
    x = functional.conv2d(x, weight[:, :, :, None], groups=x.shape[1])
    return x.view_as(images)
