"""Random masks: single tokens are hidden, anywhere, on a grid of any number of axes.

One uniform permutation of the cells orders them; the first Kt are the targets, the next Kc the context.

Source: Assran et al., "Self-supervised learning from images with a joint-embedding predictive architecture" (2023),
section 6, where random targets are compared with blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from hjepa_data.masks.base import Masks, repeat_over_time
from hjepa_data.masks.budget import OneSetConfig, check_ratio, check_tokens
from hjepa_data.random import bits, hash_int

__all__ = ["RandomMaskConfig", "RandomMasks"]

_RANDOM = 10


@dataclass(kw_only=True, slots=True)
class RandomMaskConfig(OneSetConfig):
    """The law of random masks: every set of Kt targets, and of Kc others as context, is equally probable.

    Attributes:
        grid: tokens along each axis, any number of axes.
        tube: repeat one spatial mask over the first axis of the grid.
        target_ratio: targets Kt as a part of the spatial grid: floor(ratio * cells).
        target_tokens: Kt itself; it overrides ``target_ratio``.
        context_ratio: context Kc as a part of the spatial grid: floor(ratio * cells).
        context_tokens: Kc itself; it overrides ``context_ratio``.
    """

    target_ratio: float = 0.6
    target_tokens: int | None = None

    def __post_init__(self) -> None:
        self.check_grid()
        check_ratio("target_ratio", self.target_ratio)
        cells = self.num_cells
        check_tokens("target_tokens", self.target_tokens, cells - 1, f"the grid has {cells} cells, some are context")
        beside = f"{self.target_cells} targets on a grid of {cells} cells"
        self.check_context(cells - self.target_cells, beside, "take fewer targets")

    @property
    def target_cells(self) -> int:
        """Spatial cells that are targets."""
        if self.target_tokens is not None:
            return self.target_tokens
        return max(1, math.floor(self.target_ratio * self.num_cells))

    def build(self, seed: int) -> RandomMasks:
        """Build the sampler.

        Args:
            seed: of the draws.

        Returns:
            The sampler.
        """
        return RandomMasks(self, seed)


class RandomMasks:
    """Draws random masks: a pure function of (seed, step, sample), the same on every device, rank and worker.

    >>> import torch
    >>> masks = RandomMaskConfig(grid=(8, 8), target_ratio=0.5).build(seed=0)(3, torch.arange(5))
    >>> masks.context.shape, masks.targets.shape
    (torch.Size([5, 16]), torch.Size([5, 1, 32]))

    Args:
        config: the law.
        seed: of the draws.
    """

    def __init__(self, config: RandomMaskConfig, seed: int) -> None:
        self.config = config
        self._seed = seed

    def __call__(self, step: int, sample: Int[Tensor, " B"]) -> Masks:
        """Draw the masks of a batch.

        Args:
            step: number of the step.
            sample: number of each image in its source; the masks are drawn on its device.

        Returns:
            Indices of the context and of the targets, M = 1.
        """
        config = self.config
        order = bits(hash_int(self._seed, _RANDOM, step), sample, n=config.num_cells).argsort(dim=-1)
        targets, context, _ = order.tensor_split((config.target_cells, config.target_cells + config.context_cells), 1)
        return Masks(
            context=repeat_over_time(context.sort(dim=-1).values, config.num_cells, config.repeats),
            targets=repeat_over_time(targets.sort(dim=-1).values[:, None], config.num_cells, config.repeats),
        )
