"""How strong each corruption is at severities 1 to 5, for the image sizes that have published values."""

from enum import StrEnum
from typing import Any


class Corruption(StrEnum):
    """The 15 corruptions of ImageNet-C, in the order of its table."""

    gaussian_noise = "gaussian_noise"
    shot_noise = "shot_noise"
    impulse_noise = "impulse_noise"
    defocus_blur = "defocus_blur"
    glass_blur = "glass_blur"
    motion_blur = "motion_blur"
    zoom_blur = "zoom_blur"
    snow = "snow"
    frost = "frost"
    fog = "fog"
    brightness = "brightness"
    contrast = "contrast"
    elastic_transform = "elastic_transform"
    pixelate = "pixelate"
    jpeg_compression = "jpeg_compression"


class Strength(StrEnum):
    """Which published values are taken."""

    cifar = "cifar"
    """CIFAR-10-C: 32 pixels."""
    small = "small"
    """64x64-ImageNet-C: 64 pixels."""
    imagenet = "imagenet"
    """ImageNet-C: 224 pixels."""


def strength_of(short_side: int) -> Strength:
    """The published values whose image size is nearest: up to 47 pixels, up to 111, and above."""
    return Strength.cifar if short_side < 48 else Strength.small if short_side < 112 else Strength.imagenet


SEVERITIES = (1, 2, 3, 4, 5)

# Lengths are pixels; those of elastic_transform are shares of the short side. Zooms are (step, count). Values of
# Hendrycks and Dietterich: make_imagenet_c, make_imagenet_64_c and make_cifar_c.
PARAMETERS: dict[Strength, dict[Corruption, tuple[Any, ...]]] = {
    Strength.imagenet: {
        Corruption.gaussian_noise: (0.08, 0.12, 0.18, 0.26, 0.38),
        Corruption.shot_noise: (60, 25, 12, 5, 3),
        Corruption.impulse_noise: (0.03, 0.06, 0.09, 0.17, 0.27),
        Corruption.defocus_blur: ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        Corruption.glass_blur: ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        Corruption.motion_blur: ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        Corruption.zoom_blur: ((0.01, 12), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11)),
        Corruption.snow: (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        Corruption.frost: ((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
        Corruption.fog: ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        Corruption.brightness: (0.1, 0.2, 0.3, 0.4, 0.5),
        Corruption.contrast: (0.4, 0.3, 0.2, 0.1, 0.05),
        # 244 instead of 224 pixels is in the published code.
        Corruption.elastic_transform: tuple(
            tuple(244 / 224 * part for part in one)
            for one in ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
        ),
        Corruption.pixelate: (0.6, 0.5, 0.4, 0.3, 0.25),
        Corruption.jpeg_compression: (25, 18, 15, 10, 7),
    },
    Strength.small: {
        Corruption.gaussian_noise: (0.04, 0.08, 0.12, 0.15, 0.18),
        Corruption.shot_noise: (250, 100, 50, 30, 15),
        Corruption.impulse_noise: (0.01, 0.02, 0.05, 0.08, 0.14),
        Corruption.defocus_blur: ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
        Corruption.glass_blur: ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
        Corruption.motion_blur: ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
        Corruption.zoom_blur: ((0.01, 7), (0.01, 12), (0.01, 16), (0.01, 21), (0.01, 26)),
        Corruption.snow: (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.8), (0.1, 0.2, 1, 0.5, 10, 4, 0.8), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
        ),
        Corruption.frost: ((1, 0.3, 0.3), (0.9, 0.4, 0.3), (0.8, 0.45, 0.3), (0.75, 0.5, 0.3), (0.7, 0.55, 0.3)),
        Corruption.fog: ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
        Corruption.brightness: (0.1, 0.2, 0.3, 0.4, 0.5),
        Corruption.contrast: (0.4, 0.3, 0.2, 0.1, 0.05),
        Corruption.elastic_transform: (
            (0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02),
        ),
        Corruption.pixelate: (0.9, 0.8, 0.7, 0.6, 0.5),
        Corruption.jpeg_compression: (65, 58, 50, 40, 25),
    },
    Strength.cifar: {
        Corruption.gaussian_noise: (0.04, 0.06, 0.08, 0.09, 0.1),
        Corruption.shot_noise: (500, 250, 100, 75, 50),
        Corruption.impulse_noise: (0.01, 0.02, 0.03, 0.05, 0.07),
        Corruption.defocus_blur: ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        Corruption.glass_blur: ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        Corruption.motion_blur: ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        Corruption.zoom_blur: ((0.01, 7), (0.01, 12), (0.01, 16), (0.01, 21), (0.01, 26)),
        Corruption.snow: (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        Corruption.frost: ((1, 0.2, 0.2), (1, 0.3, 0.2), (0.9, 0.4, 0.2), (0.85, 0.4, 0.2), (0.75, 0.45, 0.2)),
        Corruption.fog: ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        Corruption.brightness: (0.05, 0.1, 0.15, 0.2, 0.3),
        Corruption.contrast: (0.75, 0.5, 0.4, 0.3, 0.15),
        Corruption.elastic_transform: (
            (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03),
        ),
        Corruption.pixelate: (0.95, 0.9, 0.85, 0.75, 0.65),
        Corruption.jpeg_compression: (80, 65, 58, 50, 40),
    },
}  # fmt: skip
