"""Block masks: one contiguous box is hidden, on a grid of any number of axes.

The law of one image: the sides of the box are drawn uniformly from all those whose volume lies within ``block_scale``
and whose shape is like that of the grid within ``max_aspect``; it lands uniformly on all its places. Kt of its cells
are the targets, uniformly, and Kc of the cells outside are the context, uniformly. A box that is longer than half the
grid along every axis hides the middle wherever it lands: there no cell is ever context.

Source: Assran et al., "Self-supervised learning from images with a joint-embedding predictive architecture" (2023),
section 6, where one block is compared with several.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hjepa_data.errors import refuse
from hjepa_data.masks.base import LAST, Masks, OnDevices, keep, low_bits, repeat_over_time, sort_keys
from hjepa_data.masks.budget import OneSetConfig, check_scale, check_tokens
from hjepa_data.masks.rectangles import line_origin, line_table, lines
from hjepa_data.random import below, bits_of_sets, hash_int, leading

__all__ = ["BlockMaskConfig", "BlockMasks"]

_BLOCK = 9
_PLACE, _CELLS = 0, 1
_ROUNDING = 1e-9


@dataclass(kw_only=True, slots=True)
class BlockMaskConfig(OneSetConfig):
    """The law of block masks.

    Attributes:
        grid: tokens along each axis, any number of axes.
        tube: repeat one spatial mask over the first axis of the grid.
        block_scale: smallest and largest volume of the hidden box as a part of the spatial grid.
        max_aspect: how much more of one axis than of another the box may cover; 1: the shape of the grid itself.
        target_tokens: cells Kt of the box that are targets; by default all cells of the smallest box.
        context_ratio: context Kc as a part of the spatial grid: floor(ratio * cells).
        context_tokens: Kc itself; it overrides ``context_ratio``.
    """

    block_scale: tuple[float, ...] = (0.5, 0.6)
    max_aspect: float = 1.5
    target_tokens: int | None = None

    def __post_init__(self) -> None:
        self.check_grid()
        self.block_scale = tuple(self.block_scale)
        check_scale("block_scale", self.block_scale)
        if not self.max_aspect >= 1:
            refuse("max_aspect", self.max_aspect, "no ratio of a longer to a shorter side", "allowed: 1 and more")
        volumes = self.shapes.prod(-1)
        if not len(volumes):
            self._refuse_scale()
        smallest, largest, cells = int(volumes.min()), int(volumes.max()), self.num_cells
        check_tokens("target_tokens", self.target_tokens, smallest, f"the smallest box holds {smallest} cells")
        beside = f"a box of up to {largest} of {cells} cells"
        self.check_context(cells - largest, beside, f"lower block_scale={self.block_scale}")

    def _refuse_scale(self) -> None:
        possible = sorted(set(_boxes(self.spatial, self.max_aspect).prod(-1).tolist()))
        low, high = (scale * self.num_cells for scale in self.block_scale)
        nearest = min(possible, key=lambda volume: max(low - volume, volume - high))
        refuse(
            "block_scale",
            self.block_scale,
            f"no box of whole cells has {low:.1f} to {high:.1f} of {self.num_cells} cells at "
            f"max_aspect={self.max_aspect}",
            f"allowed: ranges that hold {nearest} cells ({nearest / self.num_cells:.4f} of the grid), which is nearest",
        )

    @property
    def shapes(self) -> Int[Tensor, "S axes"]:
        """All sides that the box may have."""
        boxes = _boxes(self.spatial, self.max_aspect)
        volume = boxes.prod(-1)
        low, high = (scale * self.num_cells for scale in self.block_scale)
        return boxes[(volume >= low - _ROUNDING) & (volume <= high + _ROUNDING)]

    @property
    def target_cells(self) -> int:
        """Spatial cells that are targets."""
        return self.target_tokens if self.target_tokens is not None else int(self.shapes.prod(-1).min())

    def build(self, seed: int) -> BlockMasks:
        """Build the sampler.

        Args:
            seed: of the draws.

        Returns:
            The sampler.
        """
        return BlockMasks(self, seed)


class _Constants(NamedTuple):
    places: Tensor
    origin: Tensor
    lines: Tensor
    place: Tensor
    last: Tensor


class BlockMasks:
    """Draws block masks: a pure function of (seed, step, sample), the same on every device, rank and worker.

    >>> import torch
    >>> masks = BlockMaskConfig(grid=(4, 8, 8)).build(seed=0)(3, torch.arange(5))
    >>> masks.context.shape, masks.targets.shape
    (torch.Size([5, 64]), torch.Size([5, 1, 144]))

    Args:
        config: the law.
        seed: of the draws.
    """

    def __init__(self, config: BlockMaskConfig, seed: int) -> None:
        self.config = config
        self._seed = seed
        self._target_cells = config.target_cells
        self._constants = OnDevices(
            _Constants(
                places=torch.tensor(config.spatial) + 1 - config.shapes,
                origin=line_origin(config.shapes, max(config.spatial)),
                lines=line_table(max(config.spatial)).bool(),
                place=torch.arange(config.num_cells),
                last=torch.tensor(LAST),
            )
        )

    def __call__(self, step: int, sample: Int[Tensor, " B"]) -> Masks:
        """Draw the masks of a batch.

        Args:
            step: number of the step.
            sample: number of each image in its source; the masks are drawn on its device.

        Returns:
            Indices of the context and of the targets, M = 1.
        """
        config, constants = self.config, self._constants.on(sample.device)
        key = hash_int(self._seed, _BLOCK, step)
        sets = {_PLACE: 1 + len(config.spatial), _CELLS: config.num_cells}
        of_box, of_cells = bits_of_sets(key, sets, sample).tensor_split((sets[_PLACE],), dim=1)
        inside = self._inside(leading(of_box), constants)
        # Inside and outside are disjoint: one number for each cell serves both choices.
        keys = sort_keys(of_cells, constants.place, low_bits(config.num_cells))
        context = keep(torch.where(inside, constants.last, keys), config.context_cells)
        targets = keep(torch.where(inside, keys, constants.last), self._target_cells)
        return Masks(
            context=repeat_over_time(context, config.num_cells, config.repeats),
            targets=repeat_over_time(targets[:, None], config.num_cells, config.repeats),
        )

    def _inside(self, leading_bits: Int[Tensor, "B n"], constants: _Constants) -> Bool[Tensor, "B N"]:
        """Draw a box for each image and mark its cells."""
        grid = self.config.spatial
        shape = below(leading_bits[:, 0], len(constants.places))
        start = below(leading_bits[:, 1:], constants.places[shape])
        crossed = lines(constants.lines, start, constants.origin[shape], max(grid))
        inside = crossed[:, 0, : grid[0]]
        for axis, length in enumerate(grid[1:], start=1):
            inside = (inside[:, :, None] & crossed[:, axis, None, :length]).flatten(1)
        return inside


def _boxes(grid: tuple[int, ...], max_aspect: float) -> Int[Tensor, "S axes"]:
    """List the sides of all boxes that fit into a grid and are like it in shape."""
    boxes = torch.cartesian_prod(*(torch.arange(1, length + 1) for length in grid)).view(-1, len(grid))
    covered = boxes / torch.tensor(grid, dtype=torch.float64)
    return boxes[covered.amax(-1) <= max_aspect * covered.amin(-1) + _ROUNDING]
