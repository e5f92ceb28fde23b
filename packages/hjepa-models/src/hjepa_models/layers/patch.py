"""Patches: cutting a grid of pixels into them and embedding each of them alone."""

import math
from enum import StrEnum

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hjepa_models.grid import Grid

CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Stem(StrEnum):
    """How the pixels of a patch become a token."""

    linear = "linear"
    conv = "conv"


def patchify(images: Float[Tensor, "B C *S"], patch_size: tuple[int, ...]) -> Float[Tensor, "B N P"]:
    """Cut images into patches: row-major over the grid, pixels of a patch in the order (channel, axis 0, axis 1, ...).

    Args:
        images: pixels, any number of axes, each divisible by the patch.
        patch_size: pixels of a patch per axis.

    Returns:
        Patches with P = C * prod(patch_size) values.
    """
    axes = range(len(patch_size))
    whole = " ".join(f"(g{axis} p{axis})" for axis in axes)
    cells, pixels = (" ".join(f"{letter}{axis}" for axis in axes) for letter in "gp")
    sizes = {f"p{axis}": patch_size[axis] for axis in axes}
    return rearrange(images, f"b c {whole} -> b ({cells}) (c {pixels})", **sizes)


def stage_strides(patch_size: Grid, stages: int) -> list[tuple[int, ...]]:
    """Return the stride of each stage of a patch stem: 2 on every axis that can still be halved, else 1."""
    strides, size = [], patch_size
    for _ in range(stages):
        strides.append(tuple(2 if n % 2 == 0 else 1 for n in size))
        size = tuple(n // s for n, s in zip(size, strides[-1], strict=True))
    return strides


class LinearStem(nn.Module):
    """One linear map from the pixels of a patch to its token."""

    def __init__(self, in_channels: int, patch_size: Grid, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels * math.prod(patch_size), embed_dim)

    def forward(self, patches: Float[Tensor, "B K P"]) -> Float[Tensor, "B K D"]:
        """Return one token per patch."""
        out: Tensor = self.proj(patches)
        return out


class ConvStem(nn.Module):
    """Strided convolutions inside each patch, then a linear map: nothing is seen across the border of a patch."""

    def __init__(self, in_channels: int, patch_size: Grid, embed_dim: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.in_channels, self.patch_size = in_channels, patch_size
        convolution = CONVOLUTIONS[len(patch_size)]
        layers: list[nn.Module] = []
        size, width = patch_size, in_channels
        for stride, out in zip(stage_strides(patch_size, len(channels)), channels, strict=True):
            layers += [convolution(width, out, kernel_size=3, stride=stride, padding=1), nn.GELU()]  # type: ignore[arg-type]
            size = tuple(n // s for n, s in zip(size, stride, strict=True))
            width = out
        self.convolutions = nn.Sequential(*layers)
        self.proj = nn.Linear(width * math.prod(size), embed_dim)

    def forward(self, patches: Float[Tensor, "B K P"]) -> Float[Tensor, "B K D"]:
        """Return one token per patch."""
        pixels = patches.reshape(-1, self.in_channels, *self.patch_size)
        out: Tensor = self.proj(self.convolutions(pixels).flatten(1)).view(*patches.shape[:2], -1)
        return out
