"""Rows of features in float64."""

import torch
from jaxtyping import Float
from torch import Tensor


def norms(rows: Float[Tensor, "*n D"]) -> Float[Tensor, "*n"]:
    """Float64 norms of rows, however small they are; 1 for a row of zeros, whose cosines are all 0."""
    squares = rows.double().square().sum(dim=-1)
    # Before the root, whose slope at 0 is infinite.
    return torch.where(squares == 0, 1.0, squares).sqrt()


def unit(rows: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
    """Rows divided by their norms; a row of zeros stays one."""
    return rows.double() / norms(rows)[..., None]
