"""Which output patch size a step has, as a pure function of the step."""

import itertools
from dataclasses import dataclass

from hjepa_models._validation import as_tuple, check_axes, check_positive


@dataclass(kw_only=True, slots=True)
class PatchScheduleConfig:
    """Describes a schedule of patch sizes: coarse and cheap first, fine at last.

    Every size is a shape of its own, so a compiled step is compiled once per size.

    Attributes:
        sizes: pixels of a patch along an axis, in the order of training; each divides the one before it.
        boundaries: where each size but the last ends, in units of `total_steps`; empty means equal shares of the run.
        total_steps: steps in one unit of the boundaries: the length of the run for fractions, 1 for steps.
    """

    sizes: tuple[int, ...] = (8, 4, 2, 1)
    boundaries: tuple[float, ...] = ()
    total_steps: int = 1

    def __post_init__(self) -> None:
        """Coerce lists and refuse what makes no sense."""
        self.sizes = check_axes("sizes", self.sizes)
        self.boundaries = as_tuple("boundaries", self.boundaries)
        check_positive(total_steps=self.total_steps)
        for before, after in itertools.pairwise(self.sizes):
            if after >= before or before % after:
                raise ValueError(
                    f"sizes={self.sizes}: {after} after {before} is no smaller divisor of it; "
                    "allowed: each size divides the one before it, e.g. (8, 4, 2, 1); correct the sizes"
                )
        if not self.boundaries and self.total_steps == 1 and len(self.sizes) > 1:
            raise ValueError(
                "total_steps=1: the default boundaries are fractions of a run and would all lie before step 1; "
                "allowed: the steps of the run; set total_steps, or boundaries in steps"
            )
        if self.boundaries and len(self.boundaries) != len(self.sizes) - 1:
            raise ValueError(
                f"boundaries={self.boundaries}: has {len(self.boundaries)} entries where sizes={self.sizes} needs "
                f"{len(self.sizes) - 1}; allowed: one between two sizes, or empty for equal shares; change one of them"
            )
        if any(after <= before for before, after in itertools.pairwise((0.0, *self.boundaries))):
            raise ValueError(
                f"boundaries={self.boundaries}: a size would have no step; allowed: rising, above 0; "
                "correct the boundaries or leave out a size"
            )
        if self.total_steps > 1 and self.boundaries and self.boundaries[-1] >= 1:
            raise ValueError(
                f"boundaries={self.boundaries}: the run of total_steps={self.total_steps} ends before the last size; "
                "allowed: fractions below 1; use total_steps=1 for boundaries in steps"
            )

    def patch_size(self, step: int) -> int:
        """Return the patch size of a step.

        >>> schedule = PatchScheduleConfig(total_steps=100)
        >>> [schedule.patch_size(step) for step in (0, 24, 25, 50, 75, 100)]
        [8, 8, 4, 2, 1, 1]
        """
        count = len(self.sizes)
        boundaries = self.boundaries or [number / count for number in range(1, count)]
        now = step / self.total_steps
        return self.sizes[sum(now >= boundary for boundary in boundaries)]
