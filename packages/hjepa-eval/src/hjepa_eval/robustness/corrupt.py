"""One call for all corruptions: uint8 in, uint8 out, every number drawn from (seed, sample, corruption, severity)."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from hjepa_eval.robustness import blur, digital, noise, weather
from hjepa_eval.robustness.draws import Draws
from hjepa_eval.robustness.maps import Images
from hjepa_eval.robustness.severity import PARAMETERS, SEVERITIES, Corruption, Strength, strength_of

_SMALLEST = 16
_FUNCTIONS: dict[Corruption, Callable[[Images, Any, Draws], Images]] = {
    Corruption.gaussian_noise: noise.gaussian_noise,
    Corruption.shot_noise: noise.shot_noise,
    Corruption.impulse_noise: noise.impulse_noise,
    Corruption.defocus_blur: blur.defocus_blur,
    Corruption.glass_blur: blur.glass_blur,
    Corruption.motion_blur: blur.motion_blur,
    Corruption.zoom_blur: blur.zoom_blur,
    Corruption.snow: weather.snow,
    Corruption.frost: weather.frost,
    Corruption.fog: weather.fog,
    Corruption.brightness: weather.brightness,
    Corruption.contrast: digital.contrast,
    Corruption.elastic_transform: digital.elastic_transform,
    Corruption.pixelate: digital.pixelate,
    Corruption.jpeg_compression: digital.jpeg_compression,
}


def corrupt(
    images: UInt8[Tensor, "B 3 H W"],
    corruption: Corruption | str,
    severity: int,
    *,
    samples: Int[Tensor, " B"] | None = None,
    seed: int = 0,
    strength: Strength | str | None = None,
) -> UInt8[Tensor, "B 3 H W"]:
    """Corrupt images as ImageNet-C does.

    A result is a function of the image, its sample number, the corruption, the severity and the seed: the same in any
    batch. All but frost follow the published code (without its assets, frost is drawn and not photographed). The files
    of the published ImageNet-C and 64x64-ImageNet-C went through a last JPEG of quality 85, which is left out here.

    Args:
        images: Pixels from 0 to 255, at least 16 on a side; the result is on their device.
        corruption: One of the 15.
        severity: 1 to 5.
        samples: Numbers of the images in their data set; None: 0, 1, ...
        seed: Of all that is random.
        strength: Which published values are taken; None: those for the size of the images (strength_of).

    Returns:
        The corrupted images; values are cut off to whole levels, as in the published sets.

    Raises:
        ValueError: Where a name, the severity or the images are none of these.

    Source:
        Hendrycks and Dietterich 2019 (arXiv 1903.12261), section 4 and appendix B.
    """
    if corruption not in tuple(Corruption):
        raise ValueError(f"corruption={corruption}: unknown; allowed: {', '.join(Corruption)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity={severity}: unknown; allowed: 1 to 5")
    if strength is not None and strength not in tuple(Strength):
        raise ValueError(f"strength={strength}: unknown; allowed: {', '.join(Strength)}, or None for the images' size")
    check_images(images, samples)
    if not len(images):
        return images
    corruption, severity = Corruption(corruption), int(severity)
    chosen = strength_of(min(images.shape[-2:])) if strength is None else Strength(strength)
    parameters = PARAMETERS[chosen][corruption][severity - 1]
    draws = Draws(seed, numbers(images, samples), corruption, severity, device=images.device)
    changed = _FUNCTIONS[corruption](images.float() / 255, parameters, draws)
    # A thousandth of a level is what float32 may have lost.
    return (changed.clamp(0, 1) * 255 + 1e-3).floor().to(torch.uint8)


def check_images(images: Tensor, samples: Tensor | None) -> None:
    """Refuse what is no batch of RGB images, or has not one sample number an image."""
    if images.dtype is not torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images {images.dtype} {tuple(images.shape)}: they must be uint8 [B, 3, H, W]")
    if min(images.shape[-2:]) < _SMALLEST:
        raise ValueError(f"images {tuple(images.shape)}: too small; allowed: {_SMALLEST} pixels and more on a side")
    if samples is not None and (samples.shape != images.shape[:1] or samples.is_floating_point()):
        raise ValueError(
            f"samples {samples.dtype} {tuple(samples.shape)}: give an integer for each of the {len(images)} images"
        )


def numbers(images: Tensor, samples: Tensor | None) -> Int[Tensor, " B"]:
    """The sample numbers of images: those given, or 0, 1, ..."""
    return torch.arange(len(images)) if samples is None else samples
