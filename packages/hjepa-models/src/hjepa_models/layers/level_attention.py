"""Attention from the tokens of one level to those of the next coarser one."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hjepa_models.canvas import Canvas
from hjepa_models.grid import grid_coordinates
from hjepa_models.layers.positions import Rotation, rotate, rotation_angles

THETA = 100.0
"""Base of the rotary frequencies; positions are counted in tokens of the finest level."""


class LevelAttention(nn.Module):
    r"""Fine tokens query coarse ones: $x + W\,\mathrm{softmax}(q k^T / \sqrt d + \log w)\,v$, with w the known share.

    A coarse cell of which nothing is known is never attended to, one that is known in part counts by its share. Queries
    and keys are rotated by the place of their cells' centres.

    Args:
        dim: width of the fine level.
        coarse_dim: width of the coarse level.
        num_heads: heads; must divide `dim` into even widths of 2 channels an axis at least.
    """

    def __init__(self, dim: int, coarse_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_norm, self.key_norm = nn.LayerNorm(dim), nn.LayerNorm(coarse_dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(coarse_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, fine: Canvas, coarse: Canvas, level: int, scale: tuple[float, ...]) -> Canvas:
        """Return the fine canvas with what its tokens took of the coarse one.

        Args:
            fine: canvas of level `level`.
            coarse: canvas of level `level` + 1.
            level: 0 is the finest.
            scale: tokens of the configured grid in a token of the finest level, per axis; not 1 at another resolution.
        """
        seen, dtype = coarse.weight.log(), self.query.weight.dtype
        query = self.query(self.query_norm(fine.values.to(dtype)))
        both = self.key_value(self.key_norm(coarse.values.to(dtype)))
        query = rearrange(query, "b n (h d) -> b h n d", h=self.num_heads)
        key, value = rearrange(both, "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        query, key = _turn(query, fine, level, scale), _turn(key, coarse, level + 1, scale)
        mask = seen.to(query.dtype)[:, None, None]
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        values = fine.values + self.proj(rearrange(mixed, "b h n d -> b n (h d)"))
        return Canvas(values, fine.weight, fine.grid)


def _turn(
    x: Float[Tensor, "B H n d"], canvas: Canvas, level: int, scale: tuple[float, ...]
) -> Float[Tensor, "B H n d"]:
    axes = (grid_coordinates(canvas.grid, device=x.device) + 0.5).unbind(-1)
    centre = torch.stack([axis * (2**level * size) - 0.5 for axis, size in zip(axes, scale, strict=True)], dim=-1)
    angle = rotation_angles(centre, x.shape[-1], THETA)
    return rotate(x, Rotation(angle.cos(), angle.sin()))
