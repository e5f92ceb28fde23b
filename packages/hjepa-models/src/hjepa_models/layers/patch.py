"""Patches: cutting a grid of pixels into them and making a token of each."""

import math
from enum import StrEnum

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hjepa_models.grid import Grid, gather_tokens, num_tokens
from hjepa_models.layers.norm import GlobalBatchNorm

CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Stem(StrEnum):
    """How the pixels of a patch become a token."""

    linear = "linear"
    flexi = "flexi"
    conv = "conv"
    overlap = "overlap"


class StemNorm(StrEnum):
    """The norm after each convolution of a stem."""

    none = "none"
    batch = "batch"


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


class PixelProjection(nn.Module):
    """A frozen random linear map of the pixels of each patch, one for each patch size: targets that need no encoder.

    Source: BEST-RQ (arXiv 2202.01855), section 3.1, without its codebook; the targets of latent masked image modelling
    in OlmoEarth (arXiv 2511.13655).
    """

    def __init__(self, in_channels: int, patch_sizes: tuple[Grid, ...], embed_dim: int) -> None:
        super().__init__()
        for size in patch_sizes:
            self.register_buffer(_size_name(size), torch.empty(in_channels * math.prod(size), embed_dim))

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw the maps, of deviation fan_in^-1/2, from a CPU generator."""
        for weight in self.buffers():
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[0] ** -0.5)

    def forward(
        self, images: Float[Tensor, "B C *S"], index: Int[Tensor, "B K"], patch_size: Grid
    ) -> Float[Tensor, "B K D"]:
        """Return the projected patches at `index` of the grid of this patch size."""
        weight = self.get_buffer(_size_name(patch_size))
        return gather_tokens(patchify(images, patch_size), index) @ weight.to(images.dtype)


def _size_name(patch_size: Grid) -> str:
    return "patch_" + "x".join(map(str, patch_size))


class ConvStem(nn.Module):
    """Strided convolutions inside each patch, then a linear map: nothing is seen across the border of a patch."""

    def __init__(
        self,
        in_channels: int,
        patch_size: Grid,
        embed_dim: int,
        channels: tuple[int, ...],
        norm: StemNorm = StemNorm.none,
        blocks: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.in_channels, self.patch_size = in_channels, patch_size
        self.stages, size = halving_stages(in_channels, patch_size, channels, norm, blocks)
        self.proj = nn.Linear((in_channels, *channels)[-1] * math.prod(size), embed_dim)

    def forward(self, patches: Float[Tensor, "B K P"], track: bool = True) -> Float[Tensor, "B K D"]:
        """Return one token per patch; `track` lets running statistics follow."""
        pixels = patches.reshape(-1, self.in_channels, *self.patch_size)
        for stage in self.stages:
            pixels = stage(pixels, track)
        out: Tensor = self.proj(pixels.flatten(1)).view(*patches.shape[:2], -1)
        return out


class OverlapStem(nn.Module):
    """Strided convolutions over the whole image in which hidden patches are blanked first: nothing of them is seen.

    Neighbours that are visible are seen across the border of a patch, which an image without masks gains from. A hidden
    patch is not free here: the convolutions run over its blank pixels; the transformer behind them does not.

    Source: Xiao et al., "Early convolutions help transformers see better", arXiv 2106.14881; with residual blocks it is
    the hybrid of Dosovitskiy et al., arXiv 2010.11929, section 3.1.
    """

    def __init__(
        self,
        in_channels: int,
        patch_size: Grid,
        embed_dim: int,
        channels: tuple[int, ...],
        norm: StemNorm = StemNorm.none,
        blocks: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.stages, size = halving_stages(in_channels, patch_size, channels, norm, blocks)
        # What is left of a patch becomes one place: by a kernel of 3 where it is small, else by one that tiles it.
        kernel, padding = tuple(3 if n <= 2 else n for n in size), tuple(1 if n <= 2 else 0 for n in size)
        self.stages.append(Stage((in_channels, *channels)[-1], embed_dim, kernel, size, padding, norm, nn.Identity()))

    def forward(
        self, images: Float[Tensor, "B C *S"], index: Int[Tensor, "B K"] | None, grid: Grid
    ) -> Float[Tensor, "B K D"]:
        """Return the tokens at `index`, those of all patches for None."""
        tokens = self.maps(images, index, grid)[-1]
        return tokens if index is None else gather_tokens(tokens, index)

    def maps(
        self, images: Float[Tensor, "B C *S"], index: Int[Tensor, "B K"] | None, grid: Grid
    ) -> list[Float[Tensor, "B P _"]]:
        """Return the maps behind the convolutions of each of `channels`, places row-major, and then the tokens."""
        pixels = images if index is None else blank_hidden(images, index, grid)
        if pixels.ndim == 4:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        found = []
        for number, stage in enumerate(self.stages):
            if number and isinstance(stage, Stage):
                found.append(pixels)
            # Running statistics serve evaluation, which sees whole images: blanked ones do not count.
            pixels = stage(pixels, index is None)
        return [each.flatten(2).transpose(1, 2) for each in (*found, pixels)]


class Stage(nn.Module):
    """A convolution, a norm and an activation."""

    def __init__(
        self,
        width: int,
        out: int,
        kernel: Grid,
        stride: Grid,
        padding: Grid,
        norm: StemNorm,
        activation: nn.Module,
    ) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[len(kernel)]
        self.conv = convolution(width, out, kernel, stride, padding, bias=norm is StemNorm.none)  # type: ignore[arg-type]
        self.norm = GlobalBatchNorm(out) if norm is StemNorm.batch else None
        self.activation = activation

    def forward(self, x: Float[Tensor, "n C *S"], track: bool) -> Float[Tensor, "n D *T"]:
        """Return the next maps."""
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x, track)
        out: Tensor = self.activation(x)
        return out


class ResidualBlock(nn.Module):
    """Two convolutions of one width beside an identity.

    Source: He et al., "Deep residual learning", arXiv 1512.03385, figure 5, left.
    """

    def __init__(self, width: int, axes: int, norm: StemNorm) -> None:
        super().__init__()
        one, three = (1,) * axes, (3,) * axes
        self.first = Stage(width, width, three, one, one, norm, nn.ReLU())
        self.second = Stage(width, width, three, one, one, norm, nn.Identity())

    def forward(self, x: Float[Tensor, "n D *S"], track: bool) -> Float[Tensor, "n D *S"]:
        """Return maps of the same shape."""
        return functional.relu(x + self.second(self.first(x, track), track))


def halving_stages(
    in_channels: int, patch_size: Grid, channels: tuple[int, ...], norm: StemNorm, blocks: tuple[int, ...]
) -> tuple[nn.ModuleList, Grid]:
    """Return one stage per entry of `channels`, `blocks` behind each, and the places per axis left of a patch."""
    stages, size, width, axes = nn.ModuleList(), patch_size, in_channels, len(patch_size)
    strides = stage_strides(patch_size, len(channels))
    for stride, out, count in zip(strides, channels, blocks or (0,) * len(channels), strict=True):
        stages.append(Stage(width, out, (3,) * axes, stride, (1,) * axes, norm, nn.GELU()))
        stages.extend(ResidualBlock(out, axes, norm) for _ in range(count))
        size = tuple(n // s for n, s in zip(size, stride, strict=True))
        width = out
    return stages, size


def blank_hidden(images: Float[Tensor, "B C *S"], index: Int[Tensor, "B K"], grid: Grid) -> Float[Tensor, "B C *S"]:
    """Return the images with every pixel of a patch that is not in `index` set to 0."""
    hidden = torch.ones(len(images), num_tokens(grid), dtype=torch.bool, device=images.device)
    hidden = hidden.scatter_(1, index, False).view(-1, 1, *grid)
    for axis, size in enumerate(images.shape[2:], start=2):
        hidden = hidden.repeat_interleave(size // grid[axis - 2], dim=axis)
    return images.masked_fill(hidden, 0.0)
