"""The masks of I-JEPA's released code, reproduced statistically with constant budgets, for ablation only.

The law of one step and image, on a grid of h x w cells:

1. The *step* draws one number for the target blocks, which fixes both their area and their aspect, and one for the
   context block, whose aspect is 1. A side is at most h - 1 or w - 1.
2. Each target block and the context block land uniformly with their top row below h - side and their left column
   below w - side. So no block ever reaches the last row or the last column, and a context block of side h - 1
   always lies at the top left.
3. The context is the context block without all targets, cut to the first Kc of its cells in raster order. The
   released code cuts to the smallest image of the batch: Kc is the expectation of that smallest number for a batch of
   ``batch_size`` images, and an image that has fewer is drawn again. Lower rows are starved, and the more so the
   larger the batch.

What differs: Kc does not vary from batch to batch; Kt of the cells of each target block are kept, uniformly, where the
released code keeps all and so has another Kt at each step; and context and targets are always disjoint.

Source: Assran et al., "Self-supervised learning from images with a joint-embedding predictive architecture" (2023), as
its public code behaves; written anew from that behaviour.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from hjepa_data.errors import refuse
from hjepa_data.masks.base import Masks, OnDevices, keep, low_bits, repeat_over_time, sort_keys
from hjepa_data.masks.budget import MaskConfig, check_scale, check_tokens
from hjepa_data.masks.rectangles import (
    blocked_cells,
    cell_of_block,
    free_cells,
    line_origin,
    line_table,
    take_candidate,
)
from hjepa_data.random import Draws, below, bits, bits_of_sets, hash_int, leading

__all__ = ["ReleasedMaskConfig", "ReleasedMasks"]

_RELEASED = 8
_SIZES, _PLACES, _TARGET_CELLS = 0, 1, 2
_TRIALS = 4096
# So few trials at a time that torch starts no threads, which would wait for one another.
_PART = 128
_MINIMUM_CELLS = 1 << 23
_LEVELS = 1024
_MIN_SUCCESS = 0.25
_MAX_CANDIDATES = 16
_FALLBACK_PROBABILITY = 1e-5

Size = tuple[int, int]


@dataclass(kw_only=True, slots=True)
class ReleasedMaskConfig(MaskConfig):
    """The law of the released masks.

    Attributes:
        grid: tokens along each axis: (h, w), or (t, h, w) with ``tube``.
        tube: repeat one spatial mask over the first axis of the grid.
        num_targets: target blocks M of an image.
        target_scale: smallest and largest area of a target block as a part of the grid.
        target_aspect: smallest and largest height / width of a target block, tied to its area.
        target_tokens: tokens Kt of a target block; by default all cells of the smallest.
        context_scale: smallest and largest area of the context block, before the targets are cut out of it.
        batch_size: images whose smallest context is the length to which all are cut; it only matters for Kc.
        context_tokens: Kc itself; it overrides ``batch_size``.
    """

    num_targets: int = 4
    target_scale: tuple[float, ...] = (0.15, 0.2)
    target_aspect: tuple[float, ...] = (0.75, 1.5)
    target_tokens: int | None = None
    context_scale: tuple[float, ...] = (0.85, 1.0)
    batch_size: int = 128
    context_tokens: int | None = None

    def __post_init__(self) -> None:
        self.check_grid(axes=2)
        if min(self.spatial) < 2:
            refuse("grid", self.grid, "the last row and column are never used", "allowed: sides of 2 and more")
        for name in ("target_scale", "target_aspect", "context_scale"):
            setattr(self, name, tuple(getattr(self, name)))
        check_scale("target_scale", self.target_scale)
        check_scale("context_scale", self.context_scale)
        if len(self.target_aspect) != 2 or not 0 < self.target_aspect[0] <= self.target_aspect[1] < math.inf:
            refuse("target_aspect", self.target_aspect, "no range of aspects", "allowed: 0 < smallest <= largest")
        if self.num_targets < 1:
            refuse("num_targets", self.num_targets, "an image has at least one target block", "allowed: 1 and more")
        if self.batch_size < 1:
            refuse("batch_size", self.batch_size, "no batch", "allowed: 1 and more")
        smallest = self._smallest_target()
        check_tokens("target_tokens", self.target_tokens, smallest, f"the smallest block has {smallest} cells")
        check_tokens("context_tokens", self.context_tokens, self.num_cells - 1, f"a grid of {self.num_cells} cells")

    def target_size(self, number: float) -> Size:
        """Height and width of a target block from one number in [0, 1)."""
        return _block_size(number, self.target_scale, self.target_aspect, self.spatial)

    def context_size(self, number: float) -> Size:
        """Height and width of the context block from one number in [0, 1)."""
        return _block_size(number, self.context_scale, (1.0, 1.0), self.spatial)

    def sizes(self) -> dict[tuple[Size, Size], float]:
        """Probability of each pair of sizes of target and context blocks."""
        return dict(_sizes(self.spatial, self.target_scale, self.target_aspect, self.context_scale))

    def _smallest_target(self) -> int:
        return min(height * width for (height, width), _ in self.sizes())

    @property
    def target_cells(self) -> int:
        """Spatial cells of a target block."""
        return self.target_tokens if self.target_tokens is not None else self._smallest_target()

    @property
    def context_cells(self) -> int:
        """Spatial cells of the context."""
        if self.context_tokens is not None:
            return self.context_tokens
        law = (self.spatial, self.num_targets, self.target_scale, self.target_aspect, self.context_scale)
        return _expected_minimum(*law, batch_size=self.batch_size)

    def build(self, seed: int) -> ReleasedMasks:
        """Build the sampler.

        Args:
            seed: of the draws.

        Returns:
            The sampler.

        Raises:
            ValueError: too few draws leave enough cells for the context.
        """
        return ReleasedMasks(self, seed)


class ReleasedMasks:
    """Draws the released masks: a pure function of (seed, step, sample), the same on every device, rank and worker.

    Args:
        config: the law.
        seed: of the draws.

    Raises:
        ValueError: too few draws leave enough cells for the context.
    """

    def __init__(self, config: ReleasedMaskConfig, seed: int) -> None:
        self.config = config
        self._seed = seed
        self._target_cells, self._context_cells = config.target_cells, config.context_cells
        self._constants = OnDevices(_constants(config))
        self._num_candidates = self._plan()

    def __call__(self, step: int, sample: Int[Tensor, " B"]) -> Masks:
        """Draw the masks of a batch.

        Args:
            step: number of the step.
            sample: number of each image in its source; the masks are drawn on its device.

        Returns:
            Indices of the context and of the targets.
        """
        config, constants = self.config, self._constants.on(sample.device)
        blocks, key = config.num_targets, hash_int(self._seed, _RELEASED, step)
        # The sizes are those of the step: they are drawn on the host and nothing waits for the device.
        sizes = Draws(key, _SIZES)
        target_size, context_size = self._planned(sizes.uniform(), sizes.uniform())
        candidates = self._num_candidates[target_size, context_size]
        sets = {_PLACES: candidates * (blocks + 1) * 2, _TARGET_CELLS: blocks * math.prod(target_size)}
        of_places, of_targets = bits_of_sets(key, sets, sample).tensor_split((sets[_PLACES],), dim=1)
        places, origin = _sizes_of_boxes(constants, blocks, target_size, context_size)
        start = below(leading(of_places).view(len(sample), candidates, blocks + 1, 2), places)
        # The last resort is one candidate more: all targets of the image move onto its first.
        start = torch.cat([start, start[:, :1].index_select(2, constants.resort)], dim=1)
        blocked = blocked_cells(constants.lines, start, origin, config.spatial)
        # Of equal ones argmin takes the first: this is the first candidate that leaves Kc cells.
        first = blocked.sum(-1).clamp_(min=config.num_cells - self._context_cells).argmin(1)
        start, blocked = take_candidate(start, first), take_candidate(blocked, first)
        raster = (blocked * config.num_cells).add_(constants.place).sort(dim=-1).values[:, : self._context_cells]
        return Masks(
            context=repeat_over_time(raster, config.num_cells, config.repeats),
            targets=repeat_over_time(
                self._keep_targets(of_targets, start[:, :-1], *target_size), config.num_cells, config.repeats
            ),
        )

    def _planned(self, target: float, context: float) -> tuple[Size, Size]:
        """Sizes of the blocks from two numbers in [0, 1)."""
        config = self.config
        found = config.target_size(target), config.context_size(context)
        # What is rarer than one in ``_LEVELS`` may be in no budget: then the sizes of its level count.
        return (
            found
            if found in self._num_candidates
            else (config.target_size(_level(target)), config.context_size(_level(context)))
        )

    def _keep_targets(
        self, random: Int[Tensor, "B n"], start: Int[Tensor, "B M 2"], height: int, width: int
    ) -> Int[Tensor, "B M Kt"]:
        constants = self._constants.on(random.device)
        area = height * width
        random = random.view(-1, self.config.num_targets, area)
        keys = sort_keys(random, constants.place[:area], low_bits(area))
        top, left = start.unbind(-1)
        corner = torch.add(left, top, alpha=self.config.spatial[1])
        return constants.cell[width][keep(keys, self._target_cells)] + corner[..., None]

    def _plan(self) -> dict[tuple[Size, Size], int]:
        """Measure for each pair of sizes how often a draw leaves enough cells, and so how many an image needs."""
        config = self.config
        plan, worst = {}, 1.0
        for (target, context), _, count in _trials(config, _TRIALS):
            rate = float((count >= self._context_cells).float().mean())
            outside = context[0] * context[1] - target[0] * target[1]
            worst = min(worst, rate if outside >= self._context_cells else 0.0)
            needed = 2.0 if rate in {0.0, 1.0} else math.log(_FALLBACK_PROBABILITY) / math.log1p(-rate)
            plan[target, context] = min(max(2, math.ceil(needed)), _MAX_CANDIDATES)
        if worst < _MIN_SUCCESS:
            self._refuse(worst)
        return plan

    def _refuse(self, worst: float) -> None:
        config = self.config
        usual = min(int(count.float().quantile(0.5)) for _, _, count in _trials(config, _TRIALS))
        field = "batch_size" if config.context_tokens is None else "context_tokens"
        height, width = config.spatial
        refuse(
            field,
            getattr(config, field),
            f"{self._context_cells} context cells beside {config.num_targets} targets of scale {config.target_scale} "
            f"on a {height}x{width} grid: {worst:.1%} of the draws leave that many at the largest target block",
            f"allowed: context_tokens up to about {usual}, or take fewer or smaller targets",
        )


def _block_size(number: float, scale: tuple[float, ...], aspect: tuple[float, ...], grid: tuple[int, ...]) -> Size:
    cells = int(grid[0] * grid[1] * (scale[0] + number * (scale[1] - scale[0])))
    ratio = aspect[0] + number * (aspect[1] - aspect[0])
    sides = round(math.sqrt(cells * ratio)), round(math.sqrt(cells / ratio))
    # A block of no cell would stop the released code; here it has one.
    return min(max(sides[0], 1), grid[0] - 1), min(max(sides[1], 1), grid[1] - 1)


def _level(number: float) -> float:
    """Round a number in [0, 1) to the middle of its level."""
    return (math.floor(number * _LEVELS) + 0.5) / _LEVELS


@lru_cache(maxsize=64)
def _sizes(
    grid: tuple[int, ...],
    target_scale: tuple[float, ...],
    target_aspect: tuple[float, ...],
    context_scale: tuple[float, ...],
) -> tuple[tuple[tuple[Size, Size], float], ...]:
    numbers = [_level(level / _LEVELS) for level in range(_LEVELS)]
    targets = Counter(_block_size(number, target_scale, target_aspect, grid) for number in numbers)
    contexts = Counter(_block_size(number, context_scale, (1.0, 1.0), grid) for number in numbers)
    return tuple(((t, c), targets[t] * contexts[c] / _LEVELS**2) for t in targets for c in contexts)


class _Constants(NamedTuple):
    """What a draw looks up. The tables [h, w, 2, 2] have the places of a block of each size, and its lines."""

    targets: Tensor
    contexts: Tensor
    lines: Tensor
    resort: Tensor
    place: Tensor
    cell: Tensor


def _constants(config: ReleasedMaskConfig) -> _Constants:
    blocks, (height, width) = config.num_targets, config.spatial
    size = torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(height, width, 2)
    # Blocks land on all of the grid but its last row and column.
    places = torch.tensor(config.spatial) - size
    origin, negative = (line_origin(size, max(config.spatial), negative=negative) for negative in (False, True))
    return _Constants(
        targets=torch.stack([places, origin], dim=2),
        contexts=torch.stack([places, torch.stack([negative[..., 0], origin[..., 1]], dim=-1)], dim=2),
        lines=line_table(max(config.spatial)),
        resort=torch.tensor([0] * blocks + [blocks]),
        place=torch.arange(config.num_cells),
        cell=cell_of_block(config.num_cells, width),
    )


def _trials(config: ReleasedMaskConfig, number: int) -> Iterator[tuple[tuple[Size, Size], float, Int[Tensor, " T"]]]:
    """Draw the number of free cells often, for each pair of sizes and with its probability."""
    blocks, grid = config.num_targets, torch.tensor(config.spatial)
    for index, ((target, context), probability) in enumerate(config.sizes().items()):
        size = torch.tensor([target] * blocks + [context])
        counts = []
        for trial in torch.split(torch.arange(number), _PART):
            random = bits(0, _RELEASED, index, trial, n=(blocks + 1) * 2).view(-1, blocks + 1, 2)
            # Blocks land on all of the grid but its last row and column.
            counts.append(free_cells(below(leading(random), grid - size), size))
        yield (target, context), probability, torch.cat(counts)


def _sizes_of_boxes(constants: _Constants, blocks: int, target: Size, context: Size) -> tuple[Tensor, ...]:
    """Look up the places of the target blocks and the context block, and their lines."""
    return torch.cat([constants.targets[target].expand(blocks, 2, 2), constants.contexts[context][None]]).unbind(1)


@lru_cache(maxsize=64)
def _expected_minimum(
    grid: tuple[int, int],
    num_targets: int,
    target_scale: tuple[float, ...],
    target_aspect: tuple[float, ...],
    context_scale: tuple[float, ...],
    *,
    batch_size: int,
) -> int:
    """Expect the smallest number of free cells of a batch: the mean over sizes of sum_k P(count >= k)^batch_size."""
    config = ReleasedMaskConfig(
        grid=grid,
        num_targets=num_targets,
        target_scale=target_scale,
        target_aspect=target_aspect,
        context_scale=context_scale,
    )
    # The smallest of many is a rare event: it takes more trials than a mean.
    number, expected = min(max(_TRIALS, _MINIMUM_CELLS // config.num_cells), 16 * _TRIALS), 0.0
    for _, probability, count in _trials(config, number):
        ranked = torch.bincount(count).flip(0).cumsum(0).flip(0)[1:].tolist()
        expected += probability * sum((at_least / number) ** batch_size for at_least in ranked)
    return max(1, round(expected))
