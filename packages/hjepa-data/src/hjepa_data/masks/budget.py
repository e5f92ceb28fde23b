"""What every law is configured by: a grid, constant budgets, and `build`; and the checks that laws share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from hjepa_data.errors import refuse
from hjepa_data.masks.base import MaskSampler

__all__ = ["MaskConfig", "OneSetConfig", "check_ratio", "check_scale", "check_tokens"]


@dataclass(kw_only=True, slots=True)
class MaskConfig(ABC):
    """A law: the grid that it fills, its constant budgets, and `build`.

    Budgets are counted in cells of the spatial grid; with ``tube`` that is the grid without its first axis, and each
    budget is repeated over time.

    Attributes:
        grid: tokens along each axis: (n,), (h, w), (t, h, w) or more.
        tube: repeat one spatial mask over the first axis of the grid.
    """

    grid: tuple[int, ...] = (14, 14)
    tube: bool = False

    def check_grid(self, axes: int | None = None) -> None:
        """Check the grid; ``axes`` is the number of spatial axes that the law needs, None allows any."""
        self.grid = tuple(int(side) for side in self.grid)
        if not self.grid or min(self.grid) < 1:
            refuse("grid", self.grid, "no grid", "allowed: a positive number of tokens along each axis")
        if axes is not None and len(self.spatial) != axes:
            refuse(
                "grid",
                self.grid,
                f"this law fills a grid of {axes} spatial axes, and here are {len(self.spatial)}",
                "allowed: (h, w), or (t, h, w) with tube=True",
            )
        if self.num_cells < 2:
            refuse("grid", self.grid, "a spatial grid of one cell has no context beside a target", "allowed: 2 or more")

    @property
    def spatial(self) -> tuple[int, ...]:
        """Cells along each spatial axis."""
        return self.grid[1:] if self.tube else self.grid

    @property
    def num_cells(self) -> int:
        """Cells of the spatial grid."""
        return math.prod(self.spatial)

    @property
    def repeats(self) -> int:
        """How often a spatial mask is repeated over time."""
        return self.grid[0] if self.tube else 1

    @property
    @abstractmethod
    def target_cells(self) -> int:
        """Spatial tokens of a target block."""

    @property
    @abstractmethod
    def context_cells(self) -> int:
        """Spatial tokens of the context."""

    @property
    def num_target_tokens(self) -> int:
        """Tokens Kt of a target block on the whole grid."""
        return self.target_cells * self.repeats

    @property
    def num_context_tokens(self) -> int:
        """Tokens Kc of the context on the whole grid."""
        return self.context_cells * self.repeats

    @abstractmethod
    def build(self, seed: int) -> MaskSampler:
        """Build the sampler from the seed of its draws."""


@dataclass(kw_only=True, slots=True)
class OneSetConfig(MaskConfig):
    """A law with one set of targets and a context beside it.

    Attributes:
        context_ratio: context Kc as a part of the spatial grid: floor(ratio * cells).
        context_tokens: Kc itself; it overrides ``context_ratio``.
    """

    context_ratio: float = 0.25
    context_tokens: int | None = None

    def check_context(self, left: int, beside: str, remedy: str) -> None:
        """Check the context against the ``left`` cells that the targets leave it."""
        check_ratio("context_ratio", self.context_ratio)
        if self.context_cells > left:
            field = "context_ratio" if self.context_tokens is None else "context_tokens"
            refuse(
                field,
                getattr(self, field),
                f"{self.context_cells} context cells beside {beside}",
                f"allowed: 1 to {left} cells ({left / self.num_cells:.2f} of the grid), or {remedy}",
            )
        check_tokens("context_tokens", self.context_tokens, left, "no context")

    @property
    def num_targets(self) -> int:
        """Target sets M of an image: one."""
        return 1

    @property
    def context_cells(self) -> int:
        """Spatial cells of the context."""
        if self.context_tokens is not None:
            return self.context_tokens
        return max(1, math.floor(self.context_ratio * self.num_cells))


def check_scale(field: str, scale: tuple[float, ...]) -> None:
    """Check a range of areas, as parts of the grid."""
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        refuse(field, scale, "no range of areas", "allowed: 0 < smallest <= largest <= 1")


def check_ratio(field: str, ratio: float) -> None:
    """Check a part of the grid."""
    if not 0 < ratio < 1:
        refuse(field, ratio, "no part of the grid", "allowed: above 0, below 1")


def check_tokens(field: str, tokens: int | None, most: int, why: str) -> None:
    """Check a budget of cells; ``why`` says what limits it."""
    if tokens is not None and not 1 <= tokens <= most:
        refuse(field, tokens, why, f"allowed: 1 to {most}")
