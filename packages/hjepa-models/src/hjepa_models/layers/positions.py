"""Where a token is: sin-cos embeddings that are added, or axial rotations of queries and keys."""

from enum import StrEnum
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hjepa_models.grid import Grid, grid_coordinates, sincos_positions


class Position(StrEnum):
    """How positions enter a transformer."""

    rope = "rope"
    sincos = "sincos"


class Rotation(NamedTuple):
    """Cosine and sine of every token's rotation angles, float32, broadcastable to [B, heads, K, head_dim / 2]."""

    cos: Float[Tensor, "B 1 K F"]
    sin: Float[Tensor, "B 1 K F"]


def rotation_angles(coordinates: Float[Tensor, "N A"], head_dim: int, theta: float) -> Float[Tensor, "N F"]:
    r"""Return the rotation angles of each token, $x_a \theta^{-i/n}$ for axis $a$ and $i < n = \lfloor d / 2A \rfloor$.

    Args:
        coordinates: position in tokens, one column per axis.
        head_dim: width d of one head; even. Pairs that the axes cannot share are not rotated.
        theta: base of the frequencies.

    Returns:
        Angles in radians, float32, one per pair of channels.

    Source:
        Su et al. 2021 (RoFormer), equation 15, one share of the pairs per axis.
    """
    count = head_dim // (2 * coordinates.shape[-1])
    rate = theta ** -(torch.arange(count, device=coordinates.device, dtype=torch.float32) / max(count, 1))
    angle = (coordinates.float().unsqueeze(-1) * rate).flatten(1)
    return torch.nn.functional.pad(angle, (0, head_dim // 2 - angle.shape[-1]))


def rotate(x: Float[Tensor, "B H K d"], rotation: Rotation) -> Float[Tensor, "B H K d"]:
    """Rotate the channel pairs (i, i + d/2) of queries or keys, in float32, by the angle of their token.

    Each pair turns by one angle, so the product of a query and a key depends on their difference of positions only.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class GridPositions:
    """Positions of one transformer: knows the kind, the widths and the grid that positions are measured on."""

    def __init__(self, kind: Position, embed_dim: int, num_heads: int, theta: float, reference: Grid) -> None:
        self.kind = kind
        self.embed_dim = embed_dim
        self.head_dim = embed_dim // num_heads
        self.theta = theta
        self.reference = reference

    def embedding(self, grid: Grid, index: Int[Tensor, "B K"] | None, device: torch.device) -> Tensor | None:
        """Return what is added to the tokens, [B, K, D] or [1, N, D]; None for rotary positions."""
        if self.kind is Position.rope:
            return None
        table = sincos_positions(grid_coordinates(grid, self.reference, device), self.embed_dim)
        return table.unsqueeze(0) if index is None else table[index]

    def rotation(
        self, grid: Grid, index: Int[Tensor, "B K"] | None, device: torch.device, prefix: int = 0
    ) -> Rotation | None:
        """Return the rotation of each token, `prefix` unrotated tokens first; None for added positions."""
        if self.kind is Position.sincos:
            return None
        angle = rotation_angles(grid_coordinates(grid, self.reference, device), self.head_dim, self.theta)
        cos, sin = angle.cos(), angle.sin()
        cos, sin = (cos.unsqueeze(0), sin.unsqueeze(0)) if index is None else (cos[index], sin[index])
        pad = torch.nn.functional.pad
        return Rotation(
            pad(cos, (0, 0, prefix, 0), value=1.0).unsqueeze(1), pad(sin, (0, 0, prefix, 0), value=0.0).unsqueeze(1)
        )
