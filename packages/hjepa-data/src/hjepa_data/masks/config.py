"""What multi-block masks are to be: scales, aspects and the constant budgets of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hjepa_data.errors import refuse
from hjepa_data.masks.budget import MaskConfig, check_ratio, check_scale

if TYPE_CHECKING:
    from hjepa_data.masks.multiblock import MultiBlockMasks

__all__ = ["MultiBlockConfig"]


@dataclass(kw_only=True, slots=True)
class MultiBlockConfig(MaskConfig):
    """The law of multi-block masks.

    Budgets are counted in cells of the spatial grid (h, w); with ``tube`` each of them is repeated over time.

    Attributes:
        grid: tokens along each axis: (h, w), or (t, h, w) with ``tube``.
        num_targets: target blocks M of an image.
        target_scale: smallest and largest area of a target block as a part of the grid.
        target_aspect: smallest and largest height / width of a target block, drawn uniformly.
        target_tokens: tokens Kt of a target block; by default floor(smallest scale * h * w).
        context_scale: smallest and largest area of the context block, before the targets are cut out of it; its
            aspect is that of the grid.
        context_ratio: tokens Kc of the context as a part of the grid: floor(ratio * h * w).
        context_tokens: Kc itself; it overrides ``context_ratio``.
        tube: repeat a spatial mask over the first axis of a (t, h, w) grid.
    """

    num_targets: int = 4
    target_scale: tuple[float, ...] = (0.15, 0.2)
    target_aspect: tuple[float, ...] = (0.75, 1.5)
    target_tokens: int | None = None
    context_scale: tuple[float, ...] = (0.85, 1.0)
    context_ratio: float = 0.25
    context_tokens: int | None = None

    def __post_init__(self) -> None:
        self.target_scale = tuple(self.target_scale)
        self.target_aspect = tuple(self.target_aspect)
        self.context_scale = tuple(self.context_scale)
        self._check_grid()
        for name in ("target_scale", "context_scale"):
            check_scale(name, getattr(self, name))
        if len(self.target_aspect) != 2 or not 0 < self.target_aspect[0] <= self.target_aspect[1] < math.inf:
            refuse("target_aspect", self.target_aspect, "no range of aspects", "allowed: 0 < smallest <= largest")
        if self.num_targets < 1:
            refuse("num_targets", self.num_targets, "an image has at least one target block", "allowed: 1 and more")
        check_ratio("context_ratio", self.context_ratio)
        self._check_budgets()

    def _check_grid(self) -> None:
        if len(self.grid) == 3 and not self.tube:
            refuse("grid", self.grid, "blocks are spatial, and this grid has time", "allowed: (h, w), or set tube=True")
        if len(self.grid) != (3 if self.tube else 2):
            refuse("grid", self.grid, f"{len(self.grid)} axes", "allowed: (h, w), or (t, h, w) with tube=True")
        self.check_grid()

    def _check_budgets(self) -> None:
        cells, largest = self.num_cells, max(1, math.ceil(self.target_scale[1] * self.num_cells))
        if self.target_tokens is not None and not 1 <= self.target_tokens <= largest:
            refuse(
                "target_tokens",
                self.target_tokens,
                f"a target block holds up to {largest} of the {cells} cells at target_scale={self.target_scale}",
                f"allowed: 1 to {largest}, or enlarge target_scale",
            )
        if self.context_tokens is not None and not 1 <= self.context_tokens < cells:
            refuse(
                "context_tokens",
                self.context_tokens,
                f"the grid has {cells} cells, some of which are targets",
                f"allowed: 1 to {cells - 1}",
            )

    @property
    def spatial(self) -> tuple[int, int]:
        """Height and width of the grid, in tokens."""
        return self.grid[-2], self.grid[-1]

    @property
    def target_cells(self) -> int:
        """Spatial cells of a target block."""
        return self.target_tokens or max(1, math.floor(self.target_scale[0] * self.num_cells))

    @property
    def context_cells(self) -> int:
        """Spatial cells of the context."""
        return self.context_tokens or max(1, math.floor(self.context_ratio * self.num_cells))

    def build(self, seed: int) -> MultiBlockMasks:
        """Build the sampler.

        Args:
            seed: of the draws.

        Returns:
            The sampler.

        Raises:
            ValueError: too few draws leave enough cells for the context.
        """
        from hjepa_data.masks.multiblock import MultiBlockMasks

        return MultiBlockMasks(self, seed)
