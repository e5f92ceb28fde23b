"""The pyramid: one canvas in, one canvas per hierarchy level out."""

from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hjepa_models._validation import check_positive, coerce_choice
from hjepa_models.canvas import Canvas
from hjepa_models.grid import Grid
from hjepa_models.initialization import construct, initialize
from hjepa_models.pooling import Pooling, check_levels, pool_canvas, upsample_canvas


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
        projection: a linear map per level back to the encoder's width.
        output_norm: layer-norm each level's output over its channels, without parameters. Learned maps on both branches
            could otherwise lower the loss by shrinking together.
        pad: allow `sequence` on a length that 2^l does not divide.
    """

    levels: int = 3
    pooling: Pooling = Pooling.grid
    fpn: Fpn = Fpn.none
    fpn_dim: int = 512
    projection: bool = True
    output_norm: bool = True
    pad: bool = False

    def __post_init__(self) -> None:
        """Coerce names and refuse what cannot be built."""
        self.pooling = coerce_choice(Pooling, "pooling", self.pooling)
        self.fpn = coerce_choice(Fpn, "fpn", self.fpn)
        check_positive(levels=self.levels, fpn_dim=self.fpn_dim)

    def build(
        self, grid: Grid, embed_dim: int, *, seed: int = 0, device: torch.device | str | None = None
    ) -> "Pyramid":
        """Return the pyramid over `grid` for tokens of width `embed_dim`, its weights drawn from `seed`."""
        return construct(lambda: Pyramid(self, grid, embed_dim), seed, device)


class Pyramid(nn.Module):
    """Bottom-up pooling, optional top-down fusion, one projection per level.

    Weights of a canvas go through arithmetic only, so that a token that is not known never reaches one that is.
    """

    def __init__(self, config: PyramidConfig, grid: Grid, embed_dim: int) -> None:
        super().__init__()
        check_levels(grid, config.levels, config.pooling, config.pad)
        width = embed_dim if config.fpn is Fpn.none else config.fpn_dim
        if width != embed_dim and not config.projection:
            raise ValueError(
                f"projection=False: the top-down path leaves width fpn_dim={width}, not embed_dim={embed_dim}; "
                f"allowed: projection=True or fpn_dim={embed_dim}; change one of them"
            )
        self.config = config
        self.embed_dim = embed_dim
        levels, axes = config.levels, len(grid)
        learned = levels - 1 if config.pooling is Pooling.learned else 0
        self.cell_logits = nn.ParameterList(
            nn.Parameter(torch.empty(2 ** (level * axes), embed_dim)) for level in range(1, learned + 1)
        )
        fused = 0 if config.fpn is Fpn.none else levels
        self.lateral = nn.ModuleList(_linear_norm(embed_dim, width) for _ in range(fused))
        self.top_down = nn.ModuleList(_linear_norm(width, width) for _ in range(fused - 1))
        fusions = fused - 1 if config.fpn is Fpn.concat else 0
        self.fusion = nn.ModuleList(_linear_norm(2 * width, width).append(nn.ReLU()) for _ in range(fusions))
        self.projection = nn.ModuleList(nn.Linear(width, embed_dim) for _ in range(levels if config.projection else 0))

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every parameter from a CPU generator; learned pooling starts as the plain mean.

        Linear maps have the deviation fan_in^-1/2: there is no residual path to carry the signal past them.
        """
        initialize(self, generator, fan_in=True)
        for logits in self.cell_logits:
            nn.init.zeros_(logits)

    def forward(self, canvas: Canvas) -> list[Canvas]:
        """Return the levels, finest first, at the width of the input."""
        levels = [self._pool(canvas, level) for level in range(self.config.levels)]
        if self.config.fpn is not Fpn.none:
            levels = self._fuse(levels)
        return [self._finish(pooled, level) for level, pooled in enumerate(levels)]

    def pool(self, canvas: Canvas) -> list[Canvas]:
        """Return the levels of the same grids by plain averages, without any learned part, finest first."""
        pooling = Pooling.sequence if self.config.pooling is Pooling.sequence else Pooling.grid
        levels = [pool_canvas(canvas, level, pooling, pad=self.config.pad) for level in range(self.config.levels)]
        return [Canvas(self._normalize(level.values), level.weight, level.grid) for level in levels]

    def _pool(self, canvas: Canvas, level: int) -> Canvas:
        learned = level > 0 and self.config.pooling is Pooling.learned
        factors = self.cell_logits[level - 1].exp() if learned else None
        return pool_canvas(canvas, level, self.config.pooling, pad=self.config.pad, cell_weight=factors)

    def _fuse(self, levels: list[Canvas]) -> list[Canvas]:
        fused = [Canvas(self.lateral[-1](levels[-1].values), levels[-1].weight, levels[-1].grid)]
        for level in reversed(range(len(levels) - 1)):
            canvas = levels[level]
            side = self.lateral[level](canvas.values)
            down = self.top_down[level](upsample_canvas(fused[0], canvas.grid).values)
            both = self.fusion[level](torch.cat([side, down], dim=-1)) if len(self.fusion) else side + down
            fused.insert(0, Canvas(both, canvas.weight, canvas.grid))
        return fused

    def _finish(self, canvas: Canvas, level: int) -> Canvas:
        values = self.projection[level](canvas.values) if len(self.projection) else canvas.values
        return Canvas(self._normalize(values), canvas.weight, canvas.grid)

    def _normalize(self, values: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return torch.nn.functional.layer_norm(values, (self.embed_dim,)) if self.config.output_norm else values


def _linear_norm(wide: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(wide, out), nn.LayerNorm(out))
