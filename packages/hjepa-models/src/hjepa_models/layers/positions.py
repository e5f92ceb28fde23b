"""Where a token is: embeddings that are added, rotations of queries and keys, or a bias of the attention logits."""

from enum import StrEnum
from functools import reduce
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from hjepa_models.grid import Grid, grid_coordinates, hat_matrix, num_tokens, resampling_matrix, sincos_positions


class Position(StrEnum):
    """How positions enter a transformer."""

    rope = "rope"
    rope_mixed = "rope_mixed"
    sincos = "sincos"
    learned = "learned"
    relative = "relative"


ROTARY = (Position.rope, Position.rope_mixed)
"""The kinds that rotate queries and keys."""

TABLES = (Position.learned, Position.relative)
"""The kinds whose weights have the size of a grid."""


class Rotation(NamedTuple):
    """Cosine and sine of every token's rotation angles, float32, broadcastable to [B, heads, K, F].

    F is head_dim / 2, one angle for each pair of channels (i, i + head_dim / 2); with `legacy` it is head_dim, one for
    each channel of the pairs (2i, 2i + 1).
    """

    cos: Float[Tensor, "B H K F"]
    sin: Float[Tensor, "B H K F"]
    legacy: bool = False


class Place(NamedTuple):
    """What an attention layer knows of where its tokens are; None where it knows nothing of the kind."""

    rotation: Rotation | None = None
    bias: Float[Tensor, "B H K K"] | None = None
    group: Int[Tensor, " K"] | None = None
    """Tokens of group 0 are seen by all and see one another; every other group sees itself and group 0."""


def axis_rates(count: int, theta: float, device: torch.device | None = None) -> Float[Tensor, " n"]:
    r"""Return the rotary frequencies of one axis, $\theta^{-i/n}$ for $i < n$."""
    return theta ** -(torch.arange(count, device=device, dtype=torch.float32) / max(count, 1))


def rotation_angles(coordinates: Float[Tensor, "*B N A"], head_dim: int, theta: float) -> Float[Tensor, "*B N F"]:
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
    rate = axis_rates(head_dim // (2 * coordinates.shape[-1]), theta, coordinates.device)
    angle = (coordinates.float().unsqueeze(-1) * rate).flatten(-2)
    return torch.nn.functional.pad(angle, (0, head_dim // 2 - angle.shape[-1]))


def legacy_angles(coordinates: Float[Tensor, "N A"], head_dim: int, theta: float) -> Float[Tensor, "N d"]:
    r"""Return the angle of each channel as the released V-JEPA 2 computes it, needed for its weights only.

    Axis $a$ owns $w = 2\lfloor d / 2A \rfloor$ channels; their $w/2$ frequencies are tiled, $(f_0, f_1, \dots, f_0,
    f_1, \dots)$, over channels that are rotated in pairs (2i, 2i + 1). The two channels of a pair turn by different
    angles, so the rotation is not relative.

    Source: the released code of V-JEPA 2 (arXiv 2506.09985).
    """
    rate = axis_rates(head_dim // (2 * coordinates.shape[-1]), theta, coordinates.device)
    angle = (coordinates.float().unsqueeze(-1) * rate.repeat(2)).flatten(1)
    return torch.nn.functional.pad(angle, (0, head_dim - angle.shape[-1]))


def rotate(x: Float[Tensor, "B H K d"], rotation: Rotation) -> Float[Tensor, "B H K d"]:
    """Rotate the channel pairs (i, i + d/2) of queries or keys, in float32, by the angle of their token.

    Each pair turns by one angle, so the product of a query and a key depends on their difference of positions only.
    """
    cos, sin, legacy = rotation
    if legacy:
        even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
        return (x.float() * cos + turned * sin).to(x.dtype)
    if not x.is_cpu:
        return _rotate_by_token(x, cos, sin)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _rotate_by_token(
    x: Float[Tensor, "B H K d"], cos: Float[Tensor, "*#B K F"], sin: Float[Tensor, "*#B K F"]
) -> Float[Tensor, "B H K d"]:
    """Do the same in a form that a compiler for GPUs makes one kernel of, backward together with queries and values.

    In memory the heads of a token lie side by side in the result, and so in what attention makes of it: no kernel has
    to bring them together afterwards.
    """
    cos, sin = (one[(None,) * (x.ndim - one.ndim)].transpose(1, 2).unsqueeze(-2) for one in (cos, sin))
    halves: Tensor = rearrange(x.float(), "b h k (half f) -> b k h half f", half=2)
    turned = halves * cos + halves.flip(-2) * torch.cat([-sin, sin], dim=-2)
    return turned.flatten(-2).to(x.dtype).contiguous().transpose(1, 2)


class GridPositions(nn.Module):
    """Positions of one transformer on the tokens of a grid.

    Args:
        kind: how positions enter.
        embed_dim: width of a token.
        num_heads: attention heads.
        depth: attention layers.
        theta: base of the rotary frequencies.
        reference: the grid that positions are measured on; another grid sees interpolated ones.
        legacy: the rotation of the released V-JEPA 2.

    Source:
        `rope`: RoFormer (arXiv 2104.09864), axial; `rope_mixed`: learned frequencies over all axes per layer and head,
        Heo et al. (arXiv 2403.13298), section 3.2; `relative`: a bias per offset and head, shared by the layers, Swin
        (arXiv 2103.14030), equation 4; `learned`: ViT (arXiv 2010.11929); `sincos`: Vaswani et al. (arXiv 1706.03762).
    """

    def __init__(
        self,
        kind: Position,
        embed_dim: int,
        num_heads: int,
        depth: int,
        theta: float,
        reference: Grid,
        legacy: bool = False,
    ) -> None:
        super().__init__()
        self.kind, self.theta, self.legacy = kind, theta, legacy
        self.embed_dim, self.num_heads, self.depth = embed_dim, num_heads, depth
        self.head_dim = embed_dim // num_heads
        self.reference = reference
        self._kept: dict[Grid, tuple[Tensor, Tensor]] = {}
        if kind is Position.learned:
            self.table = nn.Parameter(torch.empty(num_tokens(reference), embed_dim))
        elif kind is Position.relative:
            self.table = nn.Parameter(torch.empty(num_tokens(offset_grid(reference)), num_heads))
        elif kind is Position.rope_mixed:
            self.frequencies = nn.Parameter(torch.empty(depth, num_heads, self.head_dim // 2, len(reference)))

    def prepare(self, grid: Grid, device: torch.device) -> None:
        """Keep the rotations of a grid: a compiled step then reads them, and does not compute them in every block."""
        if self.kind is Position.rope:
            self._kept[grid] = self._axial(grid, device)

    def init_weights(self, generator: torch.Generator, std: float) -> None:
        """Fill the parameters: tables from a normal law, mixed frequencies as axial ones turned at random per head."""
        with torch.no_grad():
            if self.kind in TABLES:
                self.table.copy_(torch.randn(self.table.shape, generator=generator) * std)
            elif self.kind is Position.rope_mixed:
                self.frequencies.copy_(self._turned_frequencies(generator))

    def _turned_frequencies(self, generator: torch.Generator) -> Float[Tensor, "L H F A"]:
        axes = len(self.reference)
        basis = torch.linalg.qr(torch.randn(self.depth, self.num_heads, axes, axes, generator=generator)).Q
        rate = axis_rates(self.head_dim // (2 * axes), self.theta)
        turned = (basis.unsqueeze(-2) * rate.view(-1, 1)).flatten(2, 3)
        return torch.nn.functional.pad(turned, (0, 0, 0, self.head_dim // 2 - turned.shape[2]))

    def embedding(
        self, grid: Grid, index: Int[Tensor, "B K"] | None, device: torch.device
    ) -> Float[Tensor, "#B K D"] | None:
        """Return what is added to the tokens at `index`, all of the grid for None; None for the other kinds."""
        if self.kind is Position.learned:
            table = self._table_on(grid, device)
        elif self.kind is Position.sincos:
            table = sincos_positions(grid_coordinates(grid, self.reference, device), self.embed_dim)
        else:
            return None
        return table.unsqueeze(0) if index is None else table[index]

    def add(self, tokens: Float[Tensor, "B K D"], grid: Grid, index: Int[Tensor, "B K"] | None) -> Tensor:
        """Return the tokens at `index`, all of the grid for None, with what is added to them."""
        embedding = self.embedding(grid, index, tokens.device)
        if embedding is None:
            return tokens
        return _plus(tokens, embedding)

    def places(
        self, grid: Grid, index: Int[Tensor, "B K"] | None, device: torch.device, prefix: int = 0
    ) -> list[Place]:
        """Return what each layer knows of the tokens: `prefix` ones without a place first, then those at `index`."""
        if self.kind is Position.relative:
            return [Place(bias=self._bias(grid, index, device, prefix))] * self.depth
        if self.kind not in ROTARY:
            return [Place()] * self.depth
        if self.kind is Position.rope_mixed:
            angles = self._mixed_angles(grid_coordinates(grid, self.reference, device))
            return [Place(self._rotation(angle.cos(), angle.sin(), index, prefix)) for angle in angles]
        return [Place(self._rotation(*self._axial(grid, device), index, prefix))] * self.depth

    def at(
        self, tokens: Float[Tensor, "B K D"], coordinates: Float[Tensor, "B K A"]
    ) -> tuple[Float[Tensor, "B K D"], list[Place]]:
        """Return tokens with what is added to them, and what each layer knows of them, at places between patches too.

        Args:
            tokens: of any kind.
            coordinates: of each, in tokens of the reference grid.

        Raises:
            ValueError: for a kind whose weights are for the places of a grid.
        """
        check_continuous(self.kind)
        if self.kind is Position.sincos:
            return _plus(tokens, sincos_positions(coordinates, self.embed_dim)), [Place()] * self.depth
        if self.kind is Position.rope_mixed:
            mixed = self._mixed_angles(coordinates).transpose(1, 2)
            return tokens, [Place(Rotation(angle.cos(), angle.sin())) for angle in mixed]
        angle = rotation_angles(coordinates, self.head_dim, self.theta).unsqueeze(1)
        return tokens, [Place(Rotation(angle.cos(), angle.sin()))] * self.depth

    def _mixed_angles(self, coordinates: Float[Tensor, "*B N A"]) -> Float[Tensor, "L H *B N F"]:
        with torch.autocast(coordinates.device.type, enabled=False):
            frequencies = self.frequencies.to(torch.promote_types(self.frequencies.dtype, torch.float32))
            return torch.einsum("lhfa,...na->lh...nf", frequencies, coordinates.to(frequencies.dtype))

    def _axial(self, grid: Grid, device: torch.device) -> tuple[Float[Tensor, "1 N F"], Float[Tensor, "1 N F"]]:
        """Return the cosine and sine of every token's angles, the same for all layers and heads; those kept, if any."""
        kept = self._kept.get(grid)
        if kept is not None and kept[0].device == device:
            return kept
        angles = legacy_angles if self.legacy else rotation_angles
        angle = angles(grid_coordinates(grid, self.reference, device), self.head_dim, self.theta).unsqueeze(0)
        return angle.cos(), angle.sin()

    def _table_on(self, grid: Grid, device: torch.device) -> Tensor:
        """Return the table of a grid, interpolated where it is not the one that the weights are for."""
        table: Tensor = self.table
        if grid == self.reference:
            return table
        with torch.autocast(device.type, enabled=False):
            resampled: Tensor = table_resampling(self.kind, grid, self.reference, device).to(table.dtype) @ table
        return resampled

    def _rotation(
        self,
        cos: Float[Tensor, "H N F"],
        sin: Float[Tensor, "H N F"],
        index: Int[Tensor, "B K"] | None,
        prefix: int,
    ) -> Rotation:
        # The index picks tokens, [H, B, K, F] -> [B, H, K, F].
        cos, sin = (one.unsqueeze(0) if index is None else one[:, index].transpose(0, 1) for one in (cos, sin))
        pad = torch.nn.functional.pad
        return Rotation(
            pad(cos, (0, 0, prefix, 0), value=1.0), pad(sin, (0, 0, prefix, 0), value=0.0), legacy=self.legacy
        )

    def _bias(
        self, grid: Grid, index: Int[Tensor, "B K"] | None, device: torch.device, prefix: int
    ) -> Float[Tensor, "#B H K K"]:
        """Return the bias of each pair of tokens; tokens without a place have none."""
        offsets = offset_grid(grid)
        table = self._table_on(grid, device)
        # The flat number of a difference of positions is a difference of flat numbers on the grid of offsets.
        columns = grid_coordinates(grid, device=device).long().unbind(-1)
        flat = torch.stack([column * num_tokens(offsets[axis + 1 :]) for axis, column in enumerate(columns)]).sum(0)
        flat = flat.unsqueeze(0) if index is None else flat[index]
        zero = num_tokens(offsets) // 2
        bias = table[flat.unsqueeze(2) - flat.unsqueeze(1) + zero].permute(0, 3, 1, 2)
        return torch.nn.functional.pad(bias, (prefix, 0, prefix, 0))


def _plus(tokens: Float[Tensor, "B K D"], embedding: Float[Tensor, "#B K D"]) -> Float[Tensor, "B K D"]:
    # Under autocast the sum stays float32, as the residual stream does; a model in bfloat16 stays in bfloat16.
    return tokens + (embedding if torch.is_autocast_enabled(tokens.device.type) else embedding.to(tokens.dtype))


def check_continuous(kind: Position) -> None:
    """Refuse kinds that know the places of a grid only."""
    if kind in TABLES:
        raise ValueError(
            f"position={kind}: has weights for the places of a grid, and views are predicted at places between them; "
            "allowed: rope, rope_mixed, sincos; change one of them"
        )


def offset_grid(grid: Grid) -> Grid:
    """Return how many differences of positions each axis has."""
    return tuple(2 * size - 1 for size in grid)


def table_resampling(kind: Position, grid: Grid, reference: Grid, device: torch.device) -> Float[Tensor, "M N"]:
    """Return the linear interpolation of a table of one of the `TABLES` from `reference` to `grid`."""
    resampling = offset_resampling if kind is Position.relative else resampling_matrix
    return resampling(grid, reference, device)


def offset_resampling(grid: Grid, reference: Grid, device: torch.device) -> Float[Tensor, "M N"]:
    """Return the linear interpolation from the offsets of `reference` to those of `grid`, of the same extent."""
    axes = []
    for size, wanted in zip(grid, reference, strict=True):
        offset = torch.arange(1 - size, size, device=device, dtype=torch.float32) * (wanted / size)
        axes.append(hat_matrix(offset + wanted - 1, 2 * wanted - 1))
    return reduce(torch.kron, axes)
