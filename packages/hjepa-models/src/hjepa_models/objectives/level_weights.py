"""How much each level counts, as a pure function of the step."""

from dataclasses import dataclass
from enum import StrEnum

from hjepa_models._validation import check_not_negative, check_positive, coerce_choice


class LevelWeighting(StrEnum):
    """Whether the weights stand still or are raised coarse levels first."""

    fixed = "fixed"
    curriculum = "curriculum"


@dataclass(kw_only=True, slots=True)
class LevelWeightsConfig:
    """Describes the weights of the masked levels.

    Attributes:
        kind: `fixed`, or `curriculum`: level l rises linearly from 0 at `ramp_start[l]` to its weight at `ramp_end[l]`.
        weights: final weight of each level, finest first.
        ramp_start: per level, in units of `ramp_steps`; empty means coarse first over the first half, level l of L from
            (L-1-l)/2L to (L-l)/2L.
        ramp_end: likewise.
        ramp_steps: steps in one unit of the ramps: the length of the run for fractions, 1 for steps.
    """

    kind: LevelWeighting = LevelWeighting.fixed
    weights: tuple[float, ...] = (1.0, 0.7, 0.5)
    ramp_start: tuple[float, ...] = ()
    ramp_end: tuple[float, ...] = ()
    ramp_steps: int = 1

    def __post_init__(self) -> None:
        """Coerce lists and names, and refuse what makes no sense."""
        self.kind = coerce_choice(LevelWeighting, "kind", self.kind)
        self.weights = tuple(self.weights)
        check_positive(ramp_steps=self.ramp_steps)
        for weight in self.weights:
            check_not_negative(weights=weight)
        count = len(self.weights)
        if self.kind is LevelWeighting.curriculum and self.ramp_steps == 1 and not (self.ramp_start and self.ramp_end):
            raise ValueError(
                "ramp_steps=1: the default ramps of kind=curriculum are fractions of a run and would end at step 1; "
                "allowed: the steps of the run; set ramp_steps, or ramp_start and ramp_end in steps"
            )
        self.ramp_start, self.ramp_end = tuple(self.ramp_start), tuple(self.ramp_end)
        for name, ramp in (("ramp_start", self.ramp_start), ("ramp_end", self.ramp_end)):
            if ramp and len(ramp) != count:
                raise ValueError(
                    f"{name}={ramp}: has {len(ramp)} entries where weights={self.weights} has {count}; "
                    f"allowed: one per level, or empty for the default; change one of them"
                )
        if any(start > end for start, end in self.ramps()):
            starts, ends = zip(*self.ramps(), strict=True)
            raise ValueError(
                f"ramp_end={ends}: a ramp ends before ramp_start={starts}; "
                f"allowed: end >= start for each level; swap them"
            )

    def ramps(self) -> list[tuple[float, float]]:
        """Return where the ramp of each level starts and ends, in units of `ramp_steps`, defaults filled in."""
        count = len(self.weights)
        starts = self.ramp_start or [(count - 1 - level) / (2 * count) for level in range(count)]
        ends = self.ramp_end or [(count - level) / (2 * count) for level in range(count)]
        return list(zip(starts, ends, strict=True))

    def level_weights(self, step: int) -> tuple[float, ...]:
        """Return the weight of each level at a step.

        >>> LevelWeightsConfig(kind="curriculum", weights=(1.0, 0.5), ramp_steps=100).level_weights(30)
        (0.2, 0.5)
        """
        if self.kind is LevelWeighting.fixed:
            return self.weights
        now = step / self.ramp_steps
        return tuple(
            round(weight * _ramp(now, start, end), 12)
            for weight, (start, end) in zip(self.weights, self.ramps(), strict=True)
        )


def _ramp(now: float, start: float, end: float) -> float:
    if now >= end:
        return 1.0
    return 0.0 if now <= start else (now - start) / (end - start)
