"""Tube masks: multi-block masks that are the same at every time, their blocks merged into one set of targets.

The blocks and the context are those of ``hjepa_data.MultiBlockMasks``. Large blocks overlap, and a token predicted by
several of them costs several times as much for nothing: here the union of the blocks is one target set. Its size
varies from draw to draw; a constant number of its cells is kept, uniformly, so that shapes are static.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hjepa_data import Masks, MultiBlockConfig
from hjepa_data.errors import refuse
from hjepa_data.random import bits, hash_int

__all__ = ["TubeMaskConfig", "TubeMasks", "long_range", "short_range"]

_UNION = 0x7BE
_TRIALS = 1024
_TRIAL_SEED = 0
_QUANTILE = 0.05
_MIN_SUCCESS = 0.25


@dataclass(kw_only=True, slots=True)
class TubeMaskConfig:
    """One kind of tube masks.

    Attributes:
        num_blocks: Blocks that are hidden; their union is what is predicted.
        block_scale: Area of a block as a part of the picture.
        block_aspect: Smallest and largest height / width of a block.
        context_ratio: Share of the cells of the picture that the model sees.
        target_ratio: Share of the cells that it predicts; None: what all but 5 % of the draws hide at least. A draw
            that hides fewer repeats some.
    """

    num_blocks: int = 8
    block_scale: float = 0.15
    block_aspect: tuple[float, ...] = (0.75, 1.5)
    context_ratio: float = 0.2
    target_ratio: float | None = None

    def __post_init__(self) -> None:
        self.block_aspect = tuple(self.block_aspect)
        if self.num_blocks < 1:
            refuse("num_blocks", self.num_blocks, "nothing would be hidden", "allowed: 1 and more")
        if not 0 < self.block_scale < 1:
            refuse("block_scale", self.block_scale, "no part of the picture", "allowed: above 0, below 1")
        if len(self.block_aspect) != 2 or not 0 < self.block_aspect[0] <= self.block_aspect[1]:
            refuse("block_aspect", self.block_aspect, "no range of aspects", "allowed: 0 < smallest <= largest")
        if not 0 < self.context_ratio < 1:
            refuse("context_ratio", self.context_ratio, "no part of the picture", "allowed: above 0, below 1")
        if self.target_ratio is not None and not 0 < self.target_ratio < 1:
            refuse("target_ratio", self.target_ratio, "no part of the picture", "allowed: above 0, below 1, or None")

    def build(self, grid: tuple[int, ...], seed: int) -> TubeMasks:
        """Build the sampler for a grid (t, h, w).

        Args:
            grid: Tokens along time, height and width.
            seed: Of the draws.

        Returns:
            The sampler.

        Raises:
            ValueError: The grid has not three axes, or too few draws leave enough cells for the context or hide enough
                for the targets.
        """
        return TubeMasks(self, grid, seed)


def short_range() -> TubeMaskConfig:
    """The short-range masks of V-JEPA: 8 blocks of 15 % of the picture.

    Source:
        Bardes et al. 2024 (arXiv 2404.08471), section 3.2; the same in V-JEPA 2 (arXiv 2506.09985).
    """
    return TubeMaskConfig(num_blocks=8, block_scale=0.15, context_ratio=0.2)


def long_range() -> TubeMaskConfig:
    """The long-range masks of V-JEPA: 2 blocks of 70 % of the picture.

    Source:
        As short_range.
    """
    return TubeMaskConfig(num_blocks=2, block_scale=0.7, context_ratio=0.08)


class TubeMasks:
    """Draws tube masks: a pure function of (seed, step, sample), on the device of the samples.

    Args:
        config: The kind.
        grid: Tokens along time, height and width.
        seed: Of the draws.

    Raises:
        ValueError: The grid has not three axes, or too few draws leave enough cells for the context or hide enough for
            the targets.
    """

    def __init__(self, config: TubeMaskConfig, grid: tuple[int, ...], seed: int) -> None:
        self.config = config
        self.blocks = MultiBlockConfig(
            grid=grid,
            num_targets=config.num_blocks,
            target_scale=(config.block_scale, config.block_scale),
            target_aspect=config.block_aspect,
            context_scale=(1.0, 1.0),
            context_ratio=config.context_ratio,
            tube=True,
        )
        self._seed = seed
        self._draw = self.blocks.build(seed)
        self.target_cells = self._budget()

    @property
    def num_target_tokens(self) -> int:
        """Tokens that are predicted, over all times."""
        return self.target_cells * self.blocks.repeats

    @property
    def num_context_tokens(self) -> int:
        """Tokens that are seen, over all times."""
        return self.blocks.num_context_tokens

    def __call__(self, step: int, sample: Int[Tensor, " B"]) -> Masks:
        """Draw the masks of a batch.

        Args:
            step: Number of the step.
            sample: Number of each clip in its source.

        Returns:
            Context [B, Kc] and one target set [B, 1, Kt] a clip, flat indices on the grid, disjoint.
        """
        masks = self._draw(step, sample)
        hidden = self._hidden(masks.targets)
        random = bits(hash_int(self._seed, _UNION, step), sample, n=self.blocks.num_cells)
        cells = keep_some(hidden, random, self.target_cells)
        start = torch.arange(self.blocks.repeats, device=cells.device) * self.blocks.num_cells
        return Masks(context=masks.context, targets=(cells[:, None, None, :] + start[:, None]).flatten(2))

    def _hidden(self, targets: Int[Tensor, "B M Kt"]) -> Bool[Tensor, "B cells"]:
        """Which cells of the picture any block hides; the cells at time 0 stand first in a tube."""
        first = targets[..., : self.blocks.target_cells].flatten(1)
        hidden = torch.zeros(len(first), self.blocks.num_cells, dtype=torch.bool, device=first.device)
        return hidden.scatter_(1, first, True)

    def _budget(self) -> int:
        """Cells that are predicted: a function of config and grid alone, so that no seed has shapes of its own."""
        draw, cells, ratio = self.blocks.build(_TRIAL_SEED), self.blocks.num_cells, self.config.target_ratio
        count = self._hidden(draw(0, torch.arange(_TRIALS)).targets).sum(1)
        usual = int(count.float().quantile(_QUANTILE))
        if ratio is None:
            return usual
        wanted = max(1, int(ratio * cells))
        enough = float((count >= wanted).float().mean())
        if enough < _MIN_SUCCESS:
            refuse(
                "target_ratio",
                ratio,
                f"{enough:.1%} of the draws hide {wanted} of the {cells} cells",
                f"allowed: up to about {usual / cells:.2f}, or take more or larger blocks",
            )
        return wanted


def keep_some(allowed: Bool[Tensor, "B N"], random: Int[Tensor, "B N"], count: int) -> Int[Tensor, "B K"]:
    """Keep ``count`` of the allowed places of each row, uniformly, ascending; where fewer are allowed, repeat them.

    Args:
        allowed: At least one place a row.
        random: Random bits for each place.
        count: How many, at most N.

    Returns:
        Places.
    """
    key = torch.where(allowed, random & ((1 << 62) - 1), 1 << 62)
    order = key.argsort(dim=1)
    turn = torch.arange(count, device=allowed.device) % allowed.sum(1, keepdim=True)
    return order.gather(1, turn).sort(dim=1).values
