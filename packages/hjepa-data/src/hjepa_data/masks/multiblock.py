"""Multi-block masks with constant budgets, drawn for a whole batch on its device.

The law of one image:

1. Each target block draws its area uniformly from ``target_scale``, its aspect uniformly and independently from
   ``target_aspect``, rounds to height and width, grows by whole rows or columns until it holds Kt cells, and lands
   uniformly on all places of the grid, the last row and column included. Kt of its cells are kept, uniformly.
2. The context block draws its area from ``context_scale`` and its place likewise. All cells of all target blocks are
   cut out of it, also those that were not kept. Kc of the rest are kept, uniformly.
3. A draw whose rest is smaller than Kc is drawn again. The number of draws made for each image is fixed, the first
   that is large enough counts; should none be, all target blocks shrink and move into one, and the context may be
   anywhere outside.

Source: Assran et al., "Self-supervised learning from images with a joint-embedding predictive architecture" (2023),
section 3, with budgets that do not depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hjepa_data.errors import refuse
from hjepa_data.masks.base import LAST, Masks, OnDevices, keep, low_bits, repeat_over_time, sort_keys
from hjepa_data.masks.config import MultiBlockConfig
from hjepa_data.masks.rectangles import (
    blocked_cells,
    cell_of_block,
    line_origin,
    line_table,
    take_candidate,
)
from hjepa_data.random import LEADING, below, bits, bits_of_sets, hash_int, leading

__all__ = ["Masks", "MultiBlockMasks"]

_MASKS = 7
_SHAPES, _TARGET_CELLS, _CONTEXT_CELLS = 0, 1, 2
_TRIALS = 4096
_MIN_SUCCESS = 0.25
_MAX_CANDIDATES = 32
_FALLBACK_PROBABILITY = 1e-6


class MultiBlockMasks:
    """Draws masks: a pure function of (seed, step, sample), the same on every device, rank and worker.

    Args:
        config: the law.
        seed: of the draws.

    Raises:
        ValueError: too few draws leave enough cells for the context.
    """

    def __init__(self, config: MultiBlockConfig, seed: int) -> None:
        self.config = config
        self._seed = seed
        grown = _grown_sizes(*config.spatial, config.target_cells)
        # No area and aspect give a block of more cells than these.
        height, width = config.spatial
        area = config.target_scale[1] * config.num_cells
        tallest = min(height, round(math.sqrt(area * config.target_aspect[1])) or 1)
        widest = min(width, round(math.sqrt(area / config.target_aspect[0])) or 1)
        self._max_area = int(grown[1 : tallest + 1, 1 : widest + 1].prod(-1).max())
        self._smallest: tuple[int, int] = _smallest_block(height, width, config.target_cells)
        self._constants = OnDevices(_constants(config, grown, self._smallest, self._max_area))
        self.success_rate, self.num_candidates = self._plan()

    def __call__(self, step: int, sample: Int[Tensor, " B"]) -> Masks:
        """Draw the masks of a batch.

        Args:
            step: number of the step.
            sample: number of each image in its source; the masks are drawn on its device.

        Returns:
            Indices of the context and of the targets.
        """
        config, constants = self.config, self._constants.on(sample.device)
        key = hash_int(self._seed, _MASKS, step)
        sets = {
            _SHAPES: self.num_candidates * 4 * (config.num_targets + 1),
            _TARGET_CELLS: config.num_targets * self._max_area,
            _CONTEXT_CELLS: config.num_cells,
        }
        random = bits_of_sets(key, sets, sample)
        boxes = self._draw_boxes(random[:, : sets[_SHAPES]])
        # The last resort is one candidate more, so that nothing is computed twice: it is always large enough.
        resort = boxes[:, :1, :1].clamp(constants.resort_low, constants.resort_high)
        boxes = torch.cat([boxes, resort], dim=1)
        blocked = self._blocked(boxes)
        # Of equal ones argmin takes the first: this is the first candidate that leaves Kc cells.
        first = blocked.sum(-1).clamp_(min=config.num_cells - config.context_cells).argmin(1)
        boxes, blocked = take_candidate(boxes, first), take_candidate(blocked, first)
        keys = sort_keys(random[:, sets[_SHAPES] :], constants.place, constants.low_bits)
        of_targets, of_context = keys.tensor_split((sets[_TARGET_CELLS],), dim=1)
        context = keep(of_context.masked_fill_(blocked, LAST), config.context_cells)
        return Masks(context=self._repeat(context), targets=self._repeat(self._target_cells(of_targets, boxes[:, :-1])))

    def _draw_boxes(self, random: Int[Tensor, "B n"]) -> Int[Tensor, "B C M1 6"]:
        """Draw the blocks of every candidate, the context's last: top, left, their lines, width and area."""
        constants = self._constants.on(random.device)
        blocks = self.config.num_targets + 1
        bits = leading(random).view(len(random), random.shape[1] // (4 * blocks), blocks, 4)
        area, aspect = (bits[..., :2] * constants.span).add_(constants.low).mul_(constants.scale).unbind(-1)
        sides = area.new_empty(*area.shape, 2)
        torch.mul(area, aspect, out=sides[..., 0])
        torch.div(area, aspect, out=sides[..., 1])
        rough = sides.sqrt_().mul_(constants.sides).round_().long().clamp_(constants.one, constants.grid)
        sizes = constants.sizes[constants.is_context, rough[..., 0], rough[..., 1]]
        return torch.cat([below(bits[..., 2:], sizes[..., :2]), sizes[..., 2:]], dim=-1)

    def _blocked(self, boxes: Int[Tensor, "B C M1 6"]) -> Bool[Tensor, "B C N"]:
        """Mark the cells outside the context block and those that a target block covers."""
        return blocked_cells(
            self._constants.on(boxes.device).lines, boxes[..., :2], boxes[..., 2:4], self.config.spatial
        )

    def _target_cells(self, keys: Int[Tensor, "B n"], blocks: Int[Tensor, "B M 6"]) -> Int[Tensor, "B M Kt"]:
        """Keep Kt cells of each block: cell j of a block is its row j // width, its column j % width."""
        constants = self._constants.on(keys.device)
        top, left, _, _, width, area = blocks.unbind(-1)
        keys = keys.view(-1, self.config.num_targets, self._max_area)
        keys.masked_fill_(constants.place[: self._max_area] >= area[..., None], LAST)
        cell = constants.cell[width[..., None], keep(keys, self.config.target_cells)]
        return cell + torch.add(left, top, alpha=self.config.spatial[1])[..., None]

    def _repeat(self, index: Int[Tensor, "*B K"]) -> Int[Tensor, "*B K2"]:
        return repeat_over_time(index, self.config.num_cells, self.config.repeats)

    def _plan(self) -> tuple[float, int]:
        """Measure how often a draw leaves enough cells, and choose how many draws an image needs."""
        config = self.config
        random = bits(0, _SHAPES, torch.arange(_TRIALS), n=4 * (config.num_targets + 1))
        free = config.num_cells - self._blocked(self._draw_boxes(random)).sum(-1).flatten()
        rate = float((free >= config.context_cells).float().mean())
        outside = config.num_cells - self._smallest[0] * self._smallest[1]
        if rate < _MIN_SUCCESS or config.context_cells > outside:
            usual = min(int(free.float().quantile(0.05)), outside)
            share = usual / config.num_cells
            allowed = f"up to about {usual} cells ({share:.2f} of the grid), or take" if usual else "with"
            field = "context_ratio" if config.context_tokens is None else "context_tokens"
            height, width = config.spatial
            refuse(
                field,
                getattr(config, field),
                f"{config.context_cells} context cells beside {config.num_targets} targets of scale "
                f"{config.target_scale} on a {height}x{width} grid: {rate:.1%} of the draws leave that many, on average"
                f" {float(free.float().mean()):.0f} of {config.num_cells} are left",
                f"allowed: {allowed} fewer or smaller targets",
            )
        if rate == 1.0:
            # None of so many trials failed: what fails yet is rarer than one in a thousand, and a few draws mend it.
            return rate, 2
        needed = math.ceil(math.log(_FALLBACK_PROBABILITY) / math.log1p(-rate))
        return rate, min(max(needed, 2), _MAX_CANDIDATES)


class _Constants(NamedTuple):
    """What a draw looks up; where there is a row for each block, that of the context stands last."""

    low: Tensor
    span: Tensor
    scale: Tensor
    sides: Tensor
    one: Tensor
    grid: Tensor
    is_context: Tensor
    sizes: Tensor
    resort_low: Tensor
    resort_high: Tensor
    lines: Tensor
    place: Tensor
    low_bits: Tensor
    cell: Tensor


def _constants(
    config: MultiBlockConfig, grown: Int[Tensor, "H1 W1 2"], smallest: tuple[int, int], max_area: int
) -> _Constants:
    blocks, (height, width), cells = config.num_targets, config.spatial, config.num_cells

    def rows(target: Sequence[float], context: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([tuple(target)] * blocks + [tuple(context)], dtype=dtype)

    (small, large), (flat, tall), (least, most) = config.target_scale, config.target_aspect, config.context_scale
    unit = 2.0**-LEADING
    whole = torch.cartesian_prod(torch.arange(height + 1), torch.arange(width + 1)).view(grown.shape)
    sizes = torch.stack([_columns(grown, config.spatial), _columns(whole, config.spatial, context=True)])
    # The corner of the last resort is that of the first block, moved inwards; all else is constant.
    corner = torch.tensor((height, width)) - torch.tensor(smallest)
    target, context = sizes[0][smallest][2:].tolist(), sizes[1, -1, -1, 2:].tolist()
    lengths = [max_area] * blocks + [cells]
    return _Constants(
        low=rows((small, flat), (least, 1)),
        span=rows(((large - small) * unit, (tall - flat) * unit), ((most - least) * unit, 0)),
        scale=rows((cells, 1), (1, 1)),
        sides=rows((1, 1), (height, width)),
        one=torch.ones(2, dtype=torch.long),
        grid=torch.tensor((height, width)),
        is_context=rows((0,), (1,), torch.long).flatten(),
        sizes=sizes,
        resort_low=rows([0, 0, *target], [0, 0, *context], torch.long),
        resort_high=rows([*corner.tolist(), *target], [0, 0, *context], torch.long),
        lines=line_table(max(height, width)),
        place=torch.cat([torch.arange(length) for length in lengths]),
        low_bits=torch.tensor([low_bits(length) for length in lengths for _ in range(length)]),
        cell=cell_of_block(max_area, width),
    )


def _columns(size: Int[Tensor, "H1 W1 2"], grid: tuple[int, int], *, context: bool = False) -> Int[Tensor, "H1 W1 6"]:
    """Tabulate what follows from the size of a block: places of the top and of the left, two lines, width, area."""
    height, width = size.unbind(-1)
    longest = max(grid)
    return torch.stack(
        [
            grid[0] + 1 - height,
            grid[1] + 1 - width,
            line_origin(height, longest, negative=context),
            line_origin(width, longest),
            width,
            height * width,
        ],
        dim=-1,
    )


def _grown_sizes(height: int, width: int, cells: int) -> Int[Tensor, "H W 2"]:
    """Tabulate the size to which a block of each size grows until it holds ``cells``: the shorter side grows first."""
    table = torch.zeros(height + 1, width + 1, 2, dtype=torch.long)
    for rough_height in range(1, height + 1):
        for rough_width in range(1, width + 1):
            h, w = rough_height, rough_width
            while h * w < cells:
                if (h <= w and h < height) or w == width:
                    h += 1
                else:
                    w += 1
            table[rough_height, rough_width] = torch.tensor((h, w))
    return table


def _smallest_block(height: int, width: int, cells: int) -> tuple[int, int]:
    """Find the block of the least area, and then the least perimeter, that holds ``cells``."""
    sizes = [(h, -(-cells // h)) for h in range(1, height + 1) if -(-cells // h) <= width]
    return min(sizes, key=lambda size: (size[0] * size[1], size[0] + size[1]))
