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

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hjepa_data.errors import refuse
from hjepa_data.masks.base import Masks, keep, repeat_over_time
from hjepa_data.masks.config import MultiBlockConfig
from hjepa_data.masks.rectangles import Rectangles, free_cells, place_rectangles
from hjepa_data.random import bits, hash_int, unit

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
        self._grown = _grown_sizes(*config.spatial, config.target_cells)
        self._tables: dict[torch.device, Tensor] = {}
        # No area and aspect give a block of more cells than these.
        height, width = config.spatial
        area = config.target_scale[1] * config.num_cells
        tallest = min(height, round(math.sqrt(area * config.target_aspect[1])) or 1)
        widest = min(width, round(math.sqrt(area / config.target_aspect[0])) or 1)
        self._max_area = int(self._grown[1 : tallest + 1, 1 : widest + 1].prod(-1).max())
        self._smallest: tuple[int, int] = _smallest_block(height, width, config.target_cells)
        self.success_rate, self.num_candidates = self._plan()

    def __call__(self, step: int, sample: Int[Tensor, " B"]) -> Masks:
        """Draw the masks of a batch.

        Args:
            step: number of the step.
            sample: number of each image in its source; the masks are drawn on its device.

        Returns:
            Indices of the context and of the targets.
        """
        key = hash_int(self._seed, _MASKS, step)
        blocks, context = self._draw_blocks(key, sample, self.num_candidates)
        free, count = self._free_cells(blocks, context)
        valid = count >= self.config.context_cells
        failed = ~valid.any(1)
        # The largest of distinct numbers is the first valid candidate; of equal ones argmax may take any.
        first = (valid * torch.arange(self.num_candidates, 0, -1, device=valid.device)).argmax(1)
        row = torch.arange(len(first), device=first.device)
        chosen, free = self._rescue(blocks.take(first), free[row, first], failed)
        return Masks(
            context=self._repeat(
                keep(bits(key, _CONTEXT_CELLS, sample, n=free.shape[1]), free, self.config.context_cells)
            ),
            targets=self._repeat(self._target_cells(key, sample, chosen)),
        )

    def _draw_blocks(self, key: int, sample: Int[Tensor, " B"], candidates: int) -> tuple[Rectangles, Rectangles]:
        """Draw the target blocks [B, C, M] and the context block [B, C] of every candidate."""
        config = self.config
        height, width = config.spatial
        random = bits(key, _SHAPES, sample, n=candidates * 4 * (config.num_targets + 1))
        random = random.view(len(sample), candidates, config.num_targets + 1, 4)
        shape = unit(random[..., :2])
        low, high = config.target_scale
        area = (low + (high - low) * shape[..., :-1, 0]) * config.num_cells
        low, high = config.target_aspect
        aspect = low + (high - low) * shape[..., :-1, 1]
        rough_height = (area * aspect).sqrt().round().long().clamp(1, height)
        rough_width = (area / aspect).sqrt().round().long().clamp(1, width)
        block_height, block_width = self._grown_on(sample.device)[rough_height, rough_width].unbind(-1)
        low, high = config.context_scale
        side = (low + (high - low) * shape[..., -1, 0]).sqrt()
        context_height = (side * height).round().long().clamp(1, height)
        context_width = (side * width).round().long().clamp(1, width)
        place = random[..., 2:]
        targets = place_rectangles(place[..., :-1, :], block_height, block_width, height, width)
        return targets, place_rectangles(place[..., -1, :], context_height, context_width, height, width)

    def _free_cells(self, blocks: Rectangles, context: Rectangles) -> tuple[Bool[Tensor, "B C N"], Int[Tensor, "B C"]]:
        """Find the cells of the context block that no target block covers, and their number."""
        return free_cells(blocks, context, *self.config.spatial)

    def _rescue(
        self, blocks: Rectangles, free: Bool[Tensor, "B N"], failed: Bool[Tensor, " B"]
    ) -> tuple[Rectangles, Tensor]:
        """Where no candidate was valid, put all targets on one smallest block and free all cells outside."""
        height, width = self.config.spatial
        small_height, small_width = self._smallest
        alone = Rectangles(
            blocks.top[:, :1].clamp(max=height - small_height).expand_as(blocks.top),
            blocks.left[:, :1].clamp(max=width - small_width).expand_as(blocks.left),
            torch.full_like(blocks.height, small_height),
            torch.full_like(blocks.width, small_width),
        )
        outside = ~(alone.rows(height)[:, 0, :, None] & alone.columns(width)[:, 0, None, :]).flatten(-2)
        which = failed[:, None]
        rescued = Rectangles(
            torch.where(which, alone.top, blocks.top),
            torch.where(which, alone.left, blocks.left),
            torch.where(which, alone.height, blocks.height),
            torch.where(which, alone.width, blocks.width),
        )
        return rescued, torch.where(which, outside, free)

    def _target_cells(self, key: int, sample: Int[Tensor, " B"], blocks: Rectangles) -> Int[Tensor, "B M Kt"]:
        """Keep Kt cells of each block: cell j of a block is its row j // width, its column j % width."""
        num_targets, count = self.config.num_targets, self.config.target_cells
        random = bits(key, _TARGET_CELLS, sample, n=num_targets * self._max_area).view(-1, num_targets, self._max_area)
        cell = torch.arange(self._max_area, device=sample.device)
        kept = keep(random, cell < (blocks.height * blocks.width)[..., None], count)
        width = blocks.width[..., None]
        row = kept // width
        return (blocks.top[..., None] + row) * self.config.spatial[1] + blocks.left[..., None] + kept - row * width

    def _repeat(self, index: Int[Tensor, "*B K"]) -> Int[Tensor, "*B K2"]:
        return repeat_over_time(index, self.config.num_cells, self.config.repeats)

    def _grown_on(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            self._tables[device] = self._grown.to(device)
        return self._tables[device]

    def _plan(self) -> tuple[float, int]:
        """Measure how often a draw leaves enough cells, and choose how many draws an image needs."""
        config = self.config
        free = self._free_cells(*self._draw_blocks(0, torch.arange(_TRIALS), 1))[1].flatten()
        rate = float((free >= config.context_cells).float().mean())
        outside = config.num_cells - self._smallest[0] * self._smallest[1]
        if rate < _MIN_SUCCESS or config.context_cells > outside:
            usual = max(1, min(int(free.float().quantile(0.05)), outside))
            field = "context_ratio" if config.context_tokens is None else "context_tokens"
            height, width = config.spatial
            refuse(
                field,
                getattr(config, field),
                f"{config.context_cells} context cells beside {config.num_targets} targets of scale "
                f"{config.target_scale} on a {height}x{width} grid: {rate:.1%} of the draws leave that many, on average"
                f" {float(free.float().mean()):.0f} of {config.num_cells} are left",
                f"allowed: up to about {usual} cells ({usual / config.num_cells:.2f} of the grid), or take fewer or"
                " smaller targets",
            )
        if rate == 1.0:
            # None of so many trials failed: what fails yet is rarer than one in a thousand, and a few draws mend it.
            return rate, 2
        needed = math.ceil(math.log(_FALLBACK_PROBABILITY) / math.log1p(-rate))
        return rate, min(max(needed, 2), _MAX_CANDIDATES)


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
