"""The pyramid: one canvas in, one canvas per hierarchy level out."""

from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hjepa_models._validation import as_tuple, check_axes, check_not_negative, check_positive, coerce_choice
from hjepa_models.canvas import Canvas, scatter_to_canvas
from hjepa_models.grid import Grid, gather_tokens
from hjepa_models.initialization import construct, initialize
from hjepa_models.layers.level_attention import LevelAttention
from hjepa_models.pooling import Pooling, check_levels, pool_canvas, pooling_grid, upsample_canvas


class Fpn(StrEnum):
    """How a coarser level is fused into a finer one."""

    none = "none"
    add = "add"
    concat = "concat"


@dataclass(kw_only=True, slots=True)
class PyramidConfig:
    """Describes a pyramid.

    Attributes:
        levels: number of levels L, the finest included.
        pooling: `grid` (cells of 2^l per axis), `sequence` (2^l neighbours of the flat order) or `learned` (cells on
            the grid with a learned positive weight per place and channel, equal at first).
        fpn: top-down path: `none`, `add` or `concat`.
        fpn_dim: width inside the top-down path.
        level_dims: width of each level inside the pyramid, finest first: a bottleneck per level, with or without a
            top-down path; empty means `fpn_dim` for all (or the encoder's width without a top-down path).
        attention_heads: heads with which each level attends to the next coarser one after fusion; 0 leaves it out.
        projection: a linear map per level back to the encoder's width.
        output_norm: layer-norm each level's output over its channels, without parameters. Learned maps on both branches
            could otherwise lower the loss by shrinking together.
        pad: allow `sequence` on a length that 2^l does not divide.
        position_grid: tokens of the finest level per axis (`sequence` has one) that attention between levels counts
            places on; empty means the pyramid's own grid.
    """

    levels: int = 3
    pooling: Pooling = Pooling.grid
    fpn: Fpn = Fpn.none
    fpn_dim: int = 512
    level_dims: tuple[int, ...] = ()
    attention_heads: int = 0
    projection: bool = True
    output_norm: bool = True
    pad: bool = False
    position_grid: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Coerce names and refuse what cannot be built."""
        self.pooling = coerce_choice(Pooling, "pooling", self.pooling)
        self.fpn = coerce_choice(Fpn, "fpn", self.fpn)
        check_positive(levels=self.levels, fpn_dim=self.fpn_dim)
        check_not_negative(attention_heads=self.attention_heads)
        self.level_dims = as_tuple("level_dims", self.level_dims)
        if self.level_dims and len(check_axes("level_dims", self.level_dims)) != self.levels:
            raise ValueError(
                f"level_dims={self.level_dims}: has {len(self.level_dims)} entries for levels={self.levels}; "
                "allowed: one width per level, or empty; change one of them"
            )
        if self.attention_heads and self.levels == 1:
            raise ValueError(
                f"attention_heads={self.attention_heads}: one level has no coarser one to attend to; "
                "allowed: 0 with levels=1; change one of them"
            )
        self.position_grid = as_tuple("position_grid", self.position_grid)
        if self.position_grid and not self.attention_heads:
            raise ValueError(
                f"position_grid={self.position_grid}: attention_heads=0 looks at no place; "
                "allowed: with attention_heads above 0; set them, or leave it out"
            )

    def check(self, grid: Grid, embed_dim: int) -> None:
        """Refuse what cannot be built over `grid` for tokens of width `embed_dim`."""
        check_levels(grid, self.levels, self.pooling, self.pad)
        widths, axes = self.widths(embed_dim), len(pooling_grid(grid, self.pooling))
        if any(width != embed_dim for width in widths) and not self.projection:
            raise ValueError(
                f"projection=False: leaves widths {widths} inside the pyramid, not embed_dim={embed_dim}; "
                f"allowed: projection=True or widths of {embed_dim}; change one of them"
            )
        if self.attention_heads:
            _check_attention(self.attention_heads, widths[:-1], axes)
        if self.position_grid and len(check_axes("position_grid", self.position_grid)) != axes:
            raise ValueError(
                f"position_grid={self.position_grid}: has other axes than the grid "
                f"{pooling_grid(grid, self.pooling)}; allowed: one size per axis, or empty; correct it"
            )

    def widths(self, embed_dim: int) -> tuple[int, ...]:
        """Return the width of each level inside the pyramid, for tokens of width `embed_dim`.

        >>> PyramidConfig(levels=2, fpn="add", fpn_dim=64).widths(96), PyramidConfig(levels=2).widths(96)
        ((64, 64), (96, 96))
        """
        return self.level_dims or (embed_dim if self.fpn is Fpn.none else self.fpn_dim,) * self.levels

    def build(
        self, grid: Grid, embed_dim: int, *, seed: int = 0, device: torch.device | str | None = None
    ) -> "Pyramid":
        """Return the pyramid over `grid` for tokens of width `embed_dim`, its weights drawn from `seed`."""
        return construct(lambda: Pyramid(self, grid, embed_dim), seed, device)


class Pyramid(nn.Module):
    """Bottom-up pooling, optional bottlenecks, top-down fusion and attention between levels, one projection per level.

    Weights of a canvas go through arithmetic only, so that a token that is not known never reaches one that is.
    """

    def __init__(self, config: PyramidConfig, grid: Grid, embed_dim: int) -> None:
        super().__init__()
        config.check(grid, embed_dim)
        self.config = config
        self.embed_dim = embed_dim
        self.grid = pooling_grid(grid, config.pooling)
        self.reference = config.position_grid or self.grid
        widths, axes = config.widths(embed_dim), len(self.grid)
        levels = config.levels
        learned = levels - 1 if config.pooling is Pooling.learned else 0
        self.cell_logits = nn.ParameterList(
            nn.Parameter(torch.empty(2 ** (level * axes), embed_dim)) for level in range(1, learned + 1)
        )
        narrowed = config.fpn is not Fpn.none or bool(config.level_dims)
        self.lateral = nn.ModuleList(_linear_norm(embed_dim, width) for width in widths if narrowed)
        fused = [] if config.fpn is Fpn.none else list(pairwise(widths))
        self.top_down = nn.ModuleList(_linear_norm(coarse, fine) for fine, coarse in fused)
        both = fused if config.fpn is Fpn.concat else []
        self.fusion = nn.ModuleList(_linear_norm(2 * fine, fine).append(nn.ReLU()) for fine, _ in both)
        attending = pairwise(widths) if config.attention_heads else ()
        self.attention = nn.ModuleList(LevelAttention(*pair, config.attention_heads) for pair in attending)
        self.projection = nn.ModuleList(nn.Linear(width, embed_dim) for width in widths if config.projection)

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every parameter from a CPU generator; learned pooling starts as the plain mean.

        Linear maps have the deviation fan_in^-1/2: there is no residual path to carry the signal past them.
        """
        initialize(self, generator, fan_in=True)
        for logits in self.cell_logits:
            nn.init.zeros_(logits)

    def forward(self, canvas: Canvas, index: Int[Tensor, "B K"] | None = None) -> list[Canvas]:
        """Return the levels, finest first, at the width of the input.

        Args:
            canvas: the finest tokens.
            index: the places that are known, where they are few: where no level looks at the finest one's neighbours
                (no top-down path, no attention) its learned maps then run on those places only, and the others are 0.
        """
        levels = [self._pool(canvas, level) for level in range(self.config.levels)]
        if index is not None and not self.looks_around:
            finest = self.finest(gather_tokens(canvas.values, index))
            coarse = [self._finish(self._narrow(one, i), i) for i, one in enumerate(levels[1:], start=1)]
            return [scatter_to_canvas(finest, index, levels[0].grid), *coarse]
        levels = [self._narrow(one, level) for level, one in enumerate(levels)]
        scale = tuple(size / now for size, now in zip(self.reference, levels[0].grid, strict=True))
        for level in reversed(range(len(levels) - 1)):
            if len(self.top_down):
                levels[level] = self._fuse(levels[level], levels[level + 1], level)
            if len(self.attention):
                levels[level] = self.attention[level](levels[level], levels[level + 1], level, scale)
        return [self._finish(pooled, level) for level, pooled in enumerate(levels)]

    @property
    def looks_around(self) -> bool:
        """Whether a token of the finest level depends on its neighbours: by a top-down path or attention."""
        return len(self.top_down) + len(self.attention) > 0

    def finest(self, tokens: Float[Tensor, "B K D"]) -> Float[Tensor, "B K D"]:
        """Return what `forward` makes of tokens of the finest level one by one, where it looks at no neighbours."""
        alone = Canvas(tokens, tokens.new_ones(tokens.shape[:2]), self.grid)
        return self._finish(self._narrow(alone, 0), 0).values

    def pool(self, canvas: Canvas) -> list[Canvas]:
        """Return the levels of the same grids by plain averages, without any learned part, finest first."""
        pooling = Pooling.sequence if self.config.pooling is Pooling.sequence else Pooling.grid
        levels = [pool_canvas(canvas, level, pooling, pad=self.config.pad) for level in range(self.config.levels)]
        return [Canvas(self._normalize(level.values), level.weight, level.grid) for level in levels]

    def _pool(self, canvas: Canvas, level: int) -> Canvas:
        learned = level > 0 and self.config.pooling is Pooling.learned
        factors = self.cell_logits[level - 1].exp() if learned else None
        return pool_canvas(canvas, level, self.config.pooling, pad=self.config.pad, cell_weight=factors)

    def _narrow(self, canvas: Canvas, level: int) -> Canvas:
        if not len(self.lateral):
            return canvas
        return Canvas(_apply(self.lateral[level], canvas.values), canvas.weight, canvas.grid)

    def _fuse(self, side: Canvas, coarse: Canvas, level: int) -> Canvas:
        down = _apply(self.top_down[level], upsample_canvas(coarse, side.grid).values)
        both = [side.values, down]
        values = self.fusion[level](torch.cat(both, dim=-1)) if len(self.fusion) else side.values + down
        return Canvas(values, side.weight, side.grid)

    def _finish(self, canvas: Canvas, level: int) -> Canvas:
        values = _apply(self.projection[level], canvas.values) if len(self.projection) else canvas.values
        return Canvas(self._normalize(values), canvas.weight, canvas.grid)

    def _normalize(self, values: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return torch.nn.functional.layer_norm(values, (self.embed_dim,)) if self.config.output_norm else values


def _apply(module: nn.Module, values: Tensor) -> Tensor:
    """Return what maps make of values, in the dtype of their weights: canvases are float32, a model may be bfloat16."""
    out: Tensor = module(values.to(next(module.parameters()).dtype))
    return out


def _linear_norm(wide: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(wide, out), nn.LayerNorm(out))


def _check_attention(num_heads: int, widths: tuple[int, ...], axes: int) -> None:
    for width in widths:
        if width % (2 * num_heads) or width // num_heads < 2 * axes:
            raise ValueError(
                f"attention_heads={num_heads}: does not divide the width {width} into even heads of {2 * axes} "
                "channels or more; allowed: e.g. 1; change attention_heads, fpn_dim or level_dims"
            )
