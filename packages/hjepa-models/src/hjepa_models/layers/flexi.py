"""Patch embedding at any patch size: one set of weights, resized by the pseudo-inverse of the resize of a patch."""

from fractions import Fraction
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from hjepa_models._validation import check_axes
from hjepa_models.grid import Grid, num_tokens
from hjepa_models.layers.patch import LinearStem

Rows = list[list[Fraction]]


def resize_patch_weights(
    weight: Float[Tensor, "D P"], channels: int, old: Grid, new: Grid, *, antialias: bool = True
) -> Float[Tensor, "D Q"]:
    r"""Resize the weights of a patch embedding, so that a resized patch gives the token of the patch.

    With the matrix $B$ of the linear resize of a patch from `old` to `new` pixels (`align_corners=False`):

    $$\hat w = (B^T)^+ w = \arg\min_{\hat w}\ \mathbb{E}_{x \sim \mathcal{N}(0, I)}\,
    (\langle x, w\rangle - \langle Bx, \hat w\rangle)^2$$

    Where no axis shrinks, $\langle Bx, \hat w\rangle = \langle x, w\rangle$ for every patch $x$. The resize is
    separable and so is its pseudo-inverse: one small matrix per axis, computed in rational numbers the first time that
    a pair of sizes is met and a constant from then on.

    Args:
        weight: one row per channel of the token, its pixels in the order (channel, axis 0, axis 1, ...).
        channels: channels of a pixel.
        old: pixels per axis of the patch that `weight` reads.
        new: pixels per axis of the patch that the result reads.
        antialias: on an axis that shrinks, a new pixel averages all that it covers, so that every weight counts and
            gets a gradient. False reads the two nearest pixels only, as the release of FlexiViT does: from 8 to 2, the
            weights of half the pixels are lost. Nothing changes on an axis that grows.

    Returns:
        The resized weights in the dtype of `weight`, computed at least in float32.

    Raises:
        ValueError: for patches of different numbers of axes, or weights that do not fit `old`.

    Source:
        Beyer et al. 2022 (FlexiViT, arXiv 2212.08013), section 3.4, equation 4 (PI-resize).

    >>> resize_patch_weights(torch.tensor([[2.0, 4.0]]), 1, (2,), (4,)).sum()
    tensor(6.)
    """
    old, new = check_axes("old", old), check_axes("new", new)
    if len(old) != len(new):
        raise ValueError(
            f"new={new}: has {len(new)} axes where old={old} has {len(old)}; allowed: as many axes; "
            "give one size per axis to both"
        )
    if weight.shape[1] != channels * num_tokens(old):
        raise ValueError(
            f"weight of shape {tuple(weight.shape)}: a row does not read {channels} channels of a patch {old}; "
            f"allowed: {channels * num_tokens(old)} columns; check channels and old"
        )
    if old == new:
        return weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    resized = weight.to(dtype).reshape(len(weight), channels, *old)
    with torch.autocast(weight.device.type, enabled=False):
        for axis, (before, after) in enumerate(zip(old, new, strict=True), start=2):
            if before != after:
                matrix = _axis_matrix(_constant(before), _constant(after), antialias, dtype, weight.device)
                resized = (resized.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
    return resized.flatten(1).to(weight.dtype)


class FlexiPatchEmbed(LinearStem):
    """The linear stem at any patch size; it holds the weights of one size and resizes them for every other.

    Source: Beyer et al. 2022 (FlexiViT, arXiv 2212.08013), section 3.4.
    """

    def __init__(self, in_channels: int, patch_size: Grid, embed_dim: int, *, antialias: bool = True) -> None:
        super().__init__(in_channels, patch_size, embed_dim)
        self.in_channels, self.patch_size, self.antialias = in_channels, patch_size, antialias
        # Marks the function for the compiler, in place; not where it is defined, since that imports the compiler.
        torch.compiler.assume_constant_result(_axis_matrix)  # type: ignore[no-untyped-call]

    def forward(self, patches: Float[Tensor, "B K P"], patch_size: Grid | None = None) -> Float[Tensor, "B K D"]:
        """Return one token per patch.

        Args:
            patches: pixels of each patch in the order (channel, axis 0, axis 1, ...).
            patch_size: pixels per axis of these patches; None means those of the weights, which then serve as they are.

        Returns:
            The tokens.

        Raises:
            ValueError: for patches of another size than `patch_size` says.
        """
        patch_size = self.patch_size if patch_size is None else check_axes("patch_size", patch_size)
        if patches.shape[-1] != self.in_channels * num_tokens(patch_size):
            raise ValueError(
                f"patch_size={patch_size}: the patches hold {patches.shape[-1]} values; "
                f"allowed: {self.in_channels * num_tokens(patch_size)} for {self.in_channels} channels; "
                "give the size that the patches were cut with"
            )
        if patch_size == self.patch_size:
            return super().forward(patches)
        weight = resize_patch_weights(
            self.proj.weight, self.in_channels, self.patch_size, patch_size, antialias=self.antialias
        )
        return torch.nn.functional.linear(patches, weight, self.proj.bias)


def _constant(size: int) -> int:
    # A compiler that has met two values of a number makes it a symbol; the length of a range it takes for a constant.
    return len(range(size))


def _axis_matrix(old: int, new: int, antialias: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    rows = torch.tensor(pseudo_inverse(old, new, antialias), dtype=torch.float64, device="cpu")
    return rows.to(device, dtype, non_blocking=True)


@cache
def pseudo_inverse(old: int, new: int, antialias: bool) -> list[list[float]]:
    """Return the pseudo-inverse of the transposed resize along one axis, one row per new pixel.

    The resize always has full rank, so the normal equations give it exactly.
    """
    resize = axis_resize(old, new, antialias)
    thin = _transpose(resize) if new > old else resize
    solved = _solve(_products(thin), thin)
    return [[float(value) for value in row] for row in (_transpose(solved) if new > old else solved)]


def axis_resize(old: int, new: int, antialias: bool) -> Rows:
    """Return the matrix of the linear resize along one axis: one row per new pixel, each of sum 1."""
    scale = Fraction(old, new)
    reach = max(scale, Fraction(1)) if antialias else Fraction(1)
    rows = []
    for pixel in range(new):
        centre = (pixel + Fraction(1, 2)) * scale
        hat = [max(Fraction(0), 1 - abs(place + Fraction(1, 2) - centre) / reach) for place in range(old)]
        rows.append([value / sum(hat) for value in hat])
    return rows


def _transpose(matrix: Rows) -> Rows:
    return [list(column) for column in zip(*matrix, strict=True)]


def _products(matrix: Rows) -> Rows:
    return [[sum((a * b for a, b in zip(x, y, strict=True) if a and b), Fraction(0)) for y in matrix] for x in matrix]


def _solve(matrix: Rows, right: Rows) -> Rows:
    """Solve a positive definite system by elimination."""
    rows = [[*left, *values] for left, values in zip(matrix, right, strict=True)]
    for number in range(len(rows)):
        pivot = rows[number][number]
        rows[number] = [value / pivot if value else value for value in rows[number]]
        for other, row in enumerate(rows):
            factor = row[number]
            if other != number and factor:
                rows[other] = [a - factor * b if b else a for a, b in zip(row, rows[number], strict=True)]
    return [row[len(rows) :] for row in rows]
