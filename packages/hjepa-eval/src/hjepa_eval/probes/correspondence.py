"""Correspondence: does the nearest patch in another view of an image show the same place?"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hjepa_eval.probes.accuracy import check_finite
from hjepa_eval.probes.rows import unit


def crop_matches(
    first: Float[Tensor, "n 4"],
    second: Float[Tensor, "n 4"],
    grid: tuple[int, int],
    *,
    first_flipped: Bool[Tensor, " n"] | None = None,
    second_flipped: Bool[Tensor, " n"] | None = None,
) -> Int[Tensor, "n N"]:
    """The patch of a second crop that shows the place of each patch of a first crop of the same image.

    Args:
        first: Boxes of the first crops: top, left, height, width, in pixels of the image.
        second: Boxes of the second crops.
        grid: Rows and columns of patches of both.
        first_flipped: Which first crops are mirrored left to right.
        second_flipped: Which second crops are.

    Returns:
        Number of the patch that holds the centre of each patch, -1 where it lies outside of the second crop.
    """
    rows, columns = grid
    y = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    x = (torch.arange(columns, dtype=torch.float64) + 0.5) / columns
    place = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1).expand(len(first), -1, 2)
    place = _flip(place, first_flipped)
    a, b = first.double().cpu(), second.double().cpu()
    image = a[:, None, :2] + place * a[:, None, 2:]
    place = _flip((image - b[:, None, :2]) / b[:, None, 2:], second_flipped)
    cell = (place * torch.tensor([rows, columns])).floor().long()
    inside = ((place >= 0) & (place < 1)).all(dim=-1)
    return torch.where(inside, cell[..., 0] * columns + cell[..., 1], -1)


def correspondence_accuracy(
    first: Float[Tensor, "n N D"],
    second: Float[Tensor, "n N D"],
    matches: Int[Tensor, "n N"],
    grid: tuple[int, int],
    *,
    tolerance: int = 0,
) -> Float[Tensor, " n"]:
    """Share of the patches of each image whose nearest patch (cosine) of the other view is the one that matches.

    Args:
        first: Patch tokens of the first view.
        second: Patch tokens of the second view.
        matches: Right patch of the second view for each of the first, -1 where there is none (crop_matches).
        grid: Rows and columns of patches.
        tolerance: A patch counts as right up to so many patches away, in rows and in columns.

    Returns:
        Shares in [0, 1]; NaN for an image without any match (leave it out of the mean).

    Raises:
        ValueError: Where shapes disagree or tokens are not finite.
    """
    if first.ndim != 3 or not len(first) or first.shape != second.shape or matches.shape != first.shape[:2]:
        raise ValueError(
            f"first {tuple(first.shape)}, second {tuple(second.shape)}, matches {tuple(matches.shape)}: tokens must be "
            "[n, N, D] of one shape and matches [n, N], of at least one image"
        )
    if grid[0] * grid[1] != first.shape[1]:
        raise ValueError(f"grid={grid}: {grid[0] * grid[1]} patches, but there are {first.shape[1]} tokens an image")
    check_finite(first, "first")
    check_finite(second, "second")
    nearest = torch.stack([(unit(a) @ unit(b).T).argmax(dim=1) for a, b in zip(first, second, strict=True)])
    matches, columns = matches.to(nearest.device), grid[1]
    known = matches >= 0
    away = torch.maximum((nearest // columns - matches // columns).abs(), (nearest % columns - matches % columns).abs())
    right = (away <= tolerance) & known
    return right.sum(dim=1).double() / known.sum(dim=1)


def _flip(place: Tensor, flipped: Bool[Tensor, " n"] | None) -> Tensor:
    if flipped is None:
        return place
    mirrored = torch.stack((place[..., 0], 1 - place[..., 1]), dim=-1)
    return torch.where(flipped.cpu()[:, None, None], mirrored, place)
