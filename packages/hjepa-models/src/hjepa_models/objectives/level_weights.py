"""How much each level counts: a pure function of the step, and of the levels' average losses where it adapts."""

from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hjepa_models._validation import as_tuple, check_not_negative, check_positive, coerce_choice
from hjepa_models.distributed import all_reduce_mean


class LevelWeighting(StrEnum):
    """Whether the weights stand still, are raised coarse levels first, or follow the inverse of each level's loss."""

    fixed = "fixed"
    curriculum = "curriculum"
    adaptive = "adaptive"


@dataclass(kw_only=True, slots=True)
class LevelWeightsConfig:
    """Describes the weights of the predicted levels.

    Attributes:
        kind: `fixed`; `curriculum`: level l rises linearly from 0 at `ramp_start[l]` to its weight at `ramp_end[l]`; or
            `adaptive`: the weights are shared out anew by the inverse of each level's average loss
            (`adaptive_weights`).
        weights: final weight of each level, finest first.
        ramp_start: per level, in units of `ramp_steps`; empty means coarse first over the first half, level l of L from
            (L-1-l)/2L to (L-l)/2L.
        ramp_end: likewise.
        ramp_steps: steps in one unit of the ramps: the length of the run for fractions, 1 for steps.
        momentum: of the average losses of `adaptive`, which move once a step; 0 takes the last step's loss alone.
    """

    kind: LevelWeighting = LevelWeighting.fixed
    weights: tuple[float, ...] = (1.0, 0.7, 0.5)
    ramp_start: tuple[float, ...] = ()
    ramp_end: tuple[float, ...] = ()
    ramp_steps: int = 1
    momentum: float = 0.99

    def __post_init__(self) -> None:
        """Coerce lists and names, and refuse what makes no sense."""
        self.kind = coerce_choice(LevelWeighting, "kind", self.kind)
        self.weights = as_tuple("weights", self.weights)
        check_positive(ramp_steps=self.ramp_steps)
        for weight in self.weights:
            check_not_negative(weights=weight)
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"momentum={self.momentum}: the average would never follow the losses; allowed: 0 <= momentum < 1; "
                f"use e.g. 0.99"
            )
        count = len(self.weights)
        if self.kind is LevelWeighting.curriculum and self.ramp_steps == 1 and not (self.ramp_start and self.ramp_end):
            raise ValueError(
                "ramp_steps=1: the default ramps of kind=curriculum are fractions of a run and would end at step 1; "
                "allowed: the steps of the run; set ramp_steps, or ramp_start and ramp_end in steps"
            )
        self.ramp_start, self.ramp_end = (as_tuple(name, getattr(self, name)) for name in ("ramp_start", "ramp_end"))
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

        For `adaptive` these are the weights that `adaptive_weights` shares out anew, by average losses that the model
        holds and its checkpoint carries.

        >>> LevelWeightsConfig(kind="curriculum", weights=(1.0, 0.5), ramp_steps=100).level_weights(30)
        (0.2, 0.5)
        """
        if self.kind is not LevelWeighting.curriculum:
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


def adaptive_weights(average_losses: Float[Tensor, " L"], base: Float[Tensor, " L"]) -> Float[Tensor, " L"]:
    r"""Share the base weights out anew, in inverse proportion to each level's average loss.

    $$w_l = b_l \frac{1 / a_l}{\sum_k b_k / a_k} \sum_k b_k$$

    over the levels that have a base weight $b > 0$ and an average $a > 0$: each then contributes to the loss in
    proportion to its base weight, and the weights keep their sum. A level without an average yet keeps its base weight;
    one of base weight 0 stays 0 and does not count.

    Args:
        average_losses: moving average of each level's loss, as `update_average` keeps it; 0 where there is none yet.
        base: the configured weights.

    Returns:
        The weights, without gradient, on the device of the averages.

    >>> adaptive_weights(torch.tensor([0.5, 2.0, 0.0]), torch.tensor([1.0, 1.0, 0.5]))
    tensor([1.6000, 0.4000, 0.5000])
    """
    average = average_losses.detach()
    weight = base.to(average)
    known = average > 0
    inverse = torch.where(known, average, 1).clamp(min=1e-12).reciprocal()
    shared = torch.where(known, weight * inverse, 0)
    total = shared.sum()
    kept = torch.where(known, weight, 0).sum() / torch.where(total > 0, total, 1)
    return torch.where(known, shared * kept, weight)


class LevelAverages(nn.Module):
    """Moving averages of the levels' losses, which move once a step, however many micro-batches it has.

    A step's losses enter the averages when the next step begins: its weights are the first that they change.

    Attributes:
        average: the average of each level; 0 marks a level without one.
        latest: the loss of each level at the latest step, the mean of its micro-batches so far.
        count: how many those are.
        step: the latest step, -1 before the first.
    """

    average: Float[Tensor, " L"]
    latest: Float[Tensor, " L"]
    count: Float[Tensor, ""]
    step: Int[Tensor, ""]

    def __init__(self, levels: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("average", torch.empty(levels))
        self.register_buffer("latest", torch.empty(levels))
        self.register_buffer("count", torch.empty(()))
        self.register_buffer("step", torch.empty((), dtype=torch.int64))

    def init_weights(self) -> None:
        """Begin without averages."""
        for buffer in (self.average, self.latest, self.count):
            nn.init.zeros_(buffer)
        self.step.fill_(-1)

    def forward(self, step: Int[Tensor, ""]) -> Float[Tensor, " L"]:
        """Return the averages that weigh a step: all steps before it are in them."""
        moved = update_average(self.average, self.latest, self.momentum, self.latest > 0)
        return torch.where(step == self.step, self.average, moved)

    @torch.no_grad()
    def observe(self, step: Int[Tensor, ""], losses: Float[Tensor, " L"]) -> None:
        """Take in the losses of a micro-batch, averaged over all processes; a level that was not computed has 0."""
        self.average.copy_(self(step))
        again = step == self.step
        losses = all_reduce_mean(losses.detach().to(self.latest.dtype))
        self.count.copy_(torch.where(again, self.count, 0) + 1)
        self.latest.copy_(torch.where(again, torch.lerp(self.latest, losses, 1 / self.count), losses))
        self.step.copy_(step)


def update_average(
    average: Float[Tensor, " L"], losses: Float[Tensor, " L"], momentum: float, seen: Bool[Tensor, " L"]
) -> Float[Tensor, " L"]:
    r"""Return the moving averages of the levels' losses after a step.

    $a \leftarrow m a + (1 - m) \ell$; the first loss of a level becomes its average as it is.

    Args:
        average: the averages so far; 0 marks a level without one, so a run starts with zeros.
        losses: unweighted loss of each level; what stands where a level was not computed is ignored.
        momentum: m.
        seen: which levels were computed at this step; the others keep their average, and so does one whose loss is not
            finite.

    Returns:
        The new averages, without gradient: the state that a checkpoint carries.
    """
    average, losses = average.detach(), losses.detach().to(average.dtype)
    moved = torch.where(average > 0, torch.lerp(losses, average, momentum), losses)
    return torch.where(seen & losses.isfinite(), moved, average)
