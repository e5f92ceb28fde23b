"""What a model makes of whole images: the features of one branch, at each level."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hjepa_models.canvas import Canvas, dense_canvas
from hjepa_models.config import FeaturePool
from hjepa_models.encoder import Encoder, tokens_per_axis
from hjepa_models.global_level import GlobalLevel
from hjepa_models.layers.norm import normalize
from hjepa_models.pyramid import Pyramid


class FeatureBranch(NamedTuple):
    """The parts of a branch that features come from.

    Attributes:
        encoder: gives tokens, and the maps of the stem.
        pyramid: pools tokens into levels.
        global_level: the level above it, if there is one.
        map_levels: a level for each map of the stem that has one, from coarse to fine.
    """

    encoder: Encoder
    pyramid: Pyramid
    global_level: GlobalLevel | None
    map_levels: nn.ModuleList

    @property
    def levels(self) -> tuple[str | int, ...]:
        """Names of all levels, in the order in which they are shown."""
        levels: list[str | int] = ["encoder", *range(self.pyramid.config.levels)]
        if self.global_level is not None:
            maps = [name for name, _ in named_maps(self.map_levels)]
            levels += maps
            attends = self.global_level.pool is not None
            if maps or attends:
                levels.append("pooled")
            if attends:  # else the mean token is the first part of what is pooled
                levels.append("all")
            levels.append("global")
        return tuple(levels)

    def at(self, images: Float[Tensor, "B C *S"], level: str | int, pool: FeaturePool) -> Tensor:
        """Return the features of one level, `HJEPA.features` of this branch."""
        if self.global_level is not None and isinstance(level, str) and level != "encoder":
            scales = self.encoder.scales(images, len(self.map_levels))
            return self._top(scales, self.global_level)[level]
        tokens: Tensor = self.encoder(images)
        if isinstance(level, int):
            tokens = self.pyramid(self._canvas(images, tokens))[level].values
        return _pooled(tokens, pool)

    def everywhere(self, images: Float[Tensor, "B C *S"], pool: FeaturePool) -> dict[str | int, Tensor]:
        """Return the features of every level; the images are encoded once."""
        scales = self.encoder.scales(images, len(self.map_levels))
        tokens: Tensor = scales[0]
        found: dict[str | int, Tensor] = {"encoder": _pooled(tokens, pool)}
        levels = self.pyramid(self._canvas(images, tokens))
        found |= {level: _pooled(canvas.values, pool) for level, canvas in enumerate(levels)}
        return found if self.global_level is None else found | self._top(scales, self.global_level)

    def _top(self, scales: Sequence[Tensor], head: GlobalLevel) -> dict[str | int, Tensor]:
        """Return the levels above the pyramid, by the global level and those of the maps, of their tokens."""
        first = head.pooled(scales[0])
        maps = named_maps(self.map_levels)
        found: dict[str | int, Tensor] = {
            name: level.pooled(scale) for (name, level), scale in zip(maps, scales[1:], strict=True)
        }
        pooled = torch.cat([first, *found.values()], dim=-1)
        found |= {"pooled": pooled, "all": torch.cat([scales[0].mean(1), pooled], dim=-1), "global": head(first)}
        return {level: found[level] for level in self.levels if level in found}

    def _canvas(self, images: Tensor, tokens: Tensor) -> Canvas:
        """Return the canvas that the pyramid sees of whole images: upsampled to the output patch where there is one."""
        grid, config = self.encoder.grid_of(images), self.encoder.config
        if not config.output_patch_size:
            return dense_canvas(normalize(tokens), grid)
        output_grid = tokens_per_axis(tuple(images.shape[2:]), config.output_patch)
        return dense_canvas(normalize(self.encoder.upsample(dense_canvas(tokens, grid), output_grid)), output_grid)


def named_maps(map_levels: nn.ModuleList) -> list[tuple[str, GlobalLevel]]:
    """Name the levels of the stem's maps: "map0" is the coarsest."""
    return [(f"map{number}", cast(GlobalLevel, level)) for number, level in enumerate(map_levels)]


def _pooled(tokens: Float[Tensor, "B N D"], pool: FeaturePool) -> Tensor:
    if pool is FeaturePool.none:
        return tokens
    return tokens.mean(1) if pool is FeaturePool.mean else tokens.flatten(1)
