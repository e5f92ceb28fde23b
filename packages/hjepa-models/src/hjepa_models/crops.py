"""Where the patches of one crop of an image lie in another crop of it."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hjepa_models.grid import Grid, grid_coordinates

CHANGES = 3
"""What changes from crop to crop: height, width, direction."""


class Relation(NamedTuple):
    """How the patches of a crop stand to another crop of the same image.

    Attributes:
        places: row and column of their centres as parts of the other's height and width; below 0 or above 1 where they
            lie outside of it.
        change: log2 of their height and width over those of the other's patches, and -1 where one crop is mirrored and
            the other is not, else 1.
        inside: 1 where the centre lies in the other crop, else 0.
    """

    places: Float[Tensor, "B N 2"]
    change: Float[Tensor, "B 3"]
    inside: Float[Tensor, "B N"]


def relate_crops(crop: Float[Tensor, "B 5"], other: Float[Tensor, "B 5"], grid: Grid) -> Relation:
    """Return how the patches of crops stand to other crops of the same images.

    Args:
        crop: left, top, width and height as parts of the image, and 1 where the crop is mirrored, else 0.
        other: of the other crops, likewise.
        grid: rows and columns of patches, of both.

    >>> left, right = torch.tensor([[0.0, 0, 0.5, 1, 0]]), torch.tensor([[0.5, 0, 0.5, 1, 0]])
    >>> relate_crops(right, left, (1, 2)).places.tolist()  # next to the other's two patches
    [[[0.5, 1.25], [0.5, 1.75]]]
    """
    left, top, width, height, mirrored = crop.unsqueeze(-1).unbind(1)
    other_left, other_top, other_width, other_height, other_mirrored = other.unsqueeze(-1).unbind(1)
    centres = grid_coordinates(grid, device=crop.device).to(crop.dtype).unbind(-1)
    rows, columns = ((one + 0.5) / size for one, size in zip(centres, grid, strict=True))
    columns = torch.where(mirrored > 0, 1 - columns, columns)
    rows = (top + rows * height - other_top) / other_height
    columns = (left + columns * width - other_left) / other_width
    columns = torch.where(other_mirrored > 0, 1 - columns, columns)
    inside = (rows >= 0) & (rows <= 1) & (columns >= 0) & (columns <= 1)
    direction = 1 - 2 * (mirrored - other_mirrored).abs()
    return Relation(
        places=torch.stack([rows, columns], dim=-1),
        change=torch.cat([(height / other_height).log2(), (width / other_width).log2(), direction], dim=-1),
        inside=inside.to(crop.dtype),
    )
