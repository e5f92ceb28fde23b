"""Hierarchical masks: coarse cells are hidden or seen whole, so that no coarse target is ever half visible.

A cell of level l is a cube of 2^l tokens along each spatial axis, as the pyramid pools them. Another law is drawn on
the grid of the cells, and each cell stands for all its tokens. A cell of a finer level lies within one of this level,
so every level up to l is whole too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Int
from torch import Tensor

from hjepa_data.errors import choice, one_line, refuse
from hjepa_data.masks.base import Masks, repeat_over_time
from hjepa_data.masks.block import BlockMaskConfig
from hjepa_data.masks.budget import MaskConfig
from hjepa_data.masks.config import MultiBlockConfig
from hjepa_data.masks.scattered import RandomMaskConfig

__all__ = ["CellLaw", "HierarchicalMaskConfig", "HierarchicalMasks"]


class CellLaw(StrEnum):
    """The law by which whole cells are chosen."""

    multiblock = "multiblock"
    block = "block"
    random = "random"


@dataclass(kw_only=True, slots=True)
class HierarchicalMaskConfig(MaskConfig):
    """The law of hierarchical masks.

    Attributes:
        grid: tokens along each axis; 2^level must divide each spatial one.
        tube: repeat one spatial mask over the first axis of the grid; cells then lie within one time.
        level: the coarsest level whose cells are whole; 0 is the law of the tokens itself.
        law: how cells are chosen: several blocks of them (two spatial axes), one box, or single cells.
        num_targets: target blocks M; None: 4 with ``multiblock``, and 1, the only choice, with the others.
        target_scale: smallest and largest area of a block as a part of the grid; None: as the law has it.
        target_tokens: spatial tokens Kt of a block, whole cells; None: as the law has it.
        context_ratio: context Kc as a part of the spatial grid, rounded down to whole cells.
        context_tokens: Kc itself, whole cells; it overrides ``context_ratio``.
    """

    level: int = 1
    law: CellLaw = CellLaw.multiblock
    num_targets: int | None = None
    target_scale: tuple[float, ...] | None = None
    target_tokens: int | None = None
    context_ratio: float = 0.25
    context_tokens: int | None = None

    def __post_init__(self) -> None:
        self.check_grid()
        self.law = choice(CellLaw, "law", self.law, "no law of cells")
        if self.target_scale is not None:
            self.target_scale = tuple(self.target_scale)
        self._check_level()
        for name in ("target_tokens", "context_tokens"):
            self._check_whole(name)
        if self.law != CellLaw.multiblock and self.num_targets not in {None, 1}:
            refuse("num_targets", self.num_targets, f"law={self.law.value!r} has one target set", "allowed: 1, None")
        if self.law == CellLaw.random and self.target_scale is not None:
            refuse("target_scale", self.target_scale, "law='random' has no blocks", "allowed: None; set target_tokens")
        self.cells()

    def _check_level(self) -> None:
        divisor = math.gcd(*self.spatial)
        highest = (divisor & -divisor).bit_length() - 1
        if self.level < 0:
            refuse("level", self.level, "no level", f"allowed: 0 to {highest} on this grid")
        if self.level > highest:
            cell = 2**self.level
            nearest = "x".join(str(max(1, round(side / cell)) * cell) for side in self.spatial)
            refuse(
                "level",
                self.level,
                f"the sides of the spatial grid {'x'.join(map(str, self.spatial))} are no multiples of 2^{self.level}",
                f"allowed: 0 to {highest} on this grid; the nearest grid for {self.level} is {nearest}",
            )

    def _check_whole(self, name: str) -> None:
        tokens: int | None = getattr(self, name)
        if tokens is None or (tokens > 0 and tokens % self.cell_tokens == 0):
            return
        lower = tokens // self.cell_tokens * self.cell_tokens
        nearest = [value for value in (lower, lower + self.cell_tokens) if 0 < value <= self.num_cells]
        sides = "x".join([str(2**self.level)] * len(self.spatial))
        refuse(
            name,
            tokens,
            f"no whole number of cells of {sides}={self.cell_tokens} tokens",
            f"allowed: {' or '.join(map(str, nearest or [self.cell_tokens]))}, which are nearest",
        )

    @property
    def cell_tokens(self) -> int:
        """Tokens of a cell."""
        return int(2 ** (self.level * len(self.spatial)))

    def cells(self) -> MultiBlockConfig | BlockMaskConfig | RandomMaskConfig:
        """Return the law on the grid of the cells.

        Raises:
            ValueError: that law cannot be met.
        """
        grid = tuple(side >> self.level for side in self.spatial)
        target, context = (
            None if tokens is None else tokens // self.cell_tokens
            for tokens in (self.target_tokens, self.context_tokens)
        )
        ratio, scale = self.context_ratio, self.target_scale
        try:
            match self.law:
                case CellLaw.random:
                    return RandomMaskConfig(
                        grid=grid, target_tokens=target, context_ratio=ratio, context_tokens=context
                    )
                case CellLaw.block:
                    return BlockMaskConfig(
                        grid=grid,
                        block_scale=scale or BlockMaskConfig().block_scale,
                        target_tokens=target,
                        context_ratio=ratio,
                        context_tokens=context,
                    )
                case _:
                    return MultiBlockConfig(
                        grid=grid,
                        num_targets=4 if self.num_targets is None else self.num_targets,
                        target_scale=scale or MultiBlockConfig().target_scale,
                        target_tokens=target,
                        context_ratio=ratio,
                        context_tokens=context,
                    )
        except ValueError as error:
            raise self.on_cells(error) from None

    def on_cells(self, error: ValueError) -> ValueError:
        """Say of an error that its numbers count cells."""
        grid = "x".join(str(side >> self.level) for side in self.spatial)
        where = f"law={self.law.value!r} on {grid} cells of {self.cell_tokens} tokens"
        return ValueError(one_line(f"{where}, counted in cells: {error}"))

    @property
    def target_cells(self) -> int:
        """Spatial tokens of a target block."""
        return self.cells().target_cells * self.cell_tokens

    @property
    def context_cells(self) -> int:
        """Spatial tokens of the context."""
        return self.cells().context_cells * self.cell_tokens

    def build(self, seed: int) -> HierarchicalMasks:
        """Build the sampler.

        Args:
            seed: of the draws.

        Returns:
            The sampler.

        Raises:
            ValueError: too few draws leave enough cells for the context.
        """
        return HierarchicalMasks(self, seed)


class HierarchicalMasks:
    """Draws hierarchical masks: a pure function of (seed, step, sample), the same on every device, rank and worker.

    >>> import torch
    >>> masks = HierarchicalMaskConfig(grid=(14, 14), level=1).build(seed=0)(3, torch.arange(5))
    >>> masks.context.shape, masks.targets.shape
    (torch.Size([5, 48]), torch.Size([5, 4, 28]))

    Args:
        config: the law.
        seed: of the draws.

    Raises:
        ValueError: too few draws leave enough cells for the context.
    """

    def __init__(self, config: HierarchicalMaskConfig, seed: int) -> None:
        self.config = config
        try:
            self._draw = config.cells().build(seed)
        except ValueError as error:
            raise config.on_cells(error) from None
        self._tokens = {torch.device("cpu"): _tokens_of_cells(config.spatial, config.level)}

    def __call__(self, step: int, sample: Int[Tensor, " B"]) -> Masks:
        """Draw the masks of a batch.

        Args:
            step: number of the step.
            sample: number of each image in its source; the masks are drawn on its device.

        Returns:
            Indices of the context and of the targets.
        """
        cells = self._draw(step, sample)
        return Masks(context=self._expand(cells.context), targets=self._expand(cells.targets))

    def _expand(self, cells: Int[Tensor, "*B K"]) -> Int[Tensor, "*B K2"]:
        """Take all tokens of each cell, ascending."""
        if cells.device not in self._tokens:
            self._tokens[cells.device] = self._tokens[torch.device("cpu")].to(cells.device)
        tokens = self._tokens[cells.device][cells].flatten(-2).sort(dim=-1).values
        return repeat_over_time(tokens, self.config.num_cells, self.config.repeats)


def _tokens_of_cells(grid: tuple[int, ...], level: int) -> Int[Tensor, "cells tokens"]:
    """List the tokens of each cell."""
    cell, axes = torch.zeros(grid, dtype=torch.long), len(grid)
    for axis, side in enumerate(grid):
        along = torch.arange(side) >> level
        cell = cell * (side >> level) + along.view([-1 if a == axis else 1 for a in range(axes)])
    # A stable sort puts the tokens of a cell beside one another, in their own order.
    return cell.flatten().argsort(stable=True).view(-1, int(2 ** (level * axes)))
