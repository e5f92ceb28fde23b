"""The collapse monitor: rank and spread of the embeddings of every level, and an alarm."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hjepa_train.errors import CollapseError, choice
from hjepa_train.protocols import Callback

if TYPE_CHECKING:
    from hjepa_train.trainer import StepResult, Trainer

logger = logging.getLogger(__name__)


class CollapsePolicy(StrEnum):
    """What an alarm does."""

    warn = "warn"
    lower_lr = "lower_lr"
    stop = "stop"


@dataclass(kw_only=True, slots=True)
class MonitorConfig:
    """When the monitor looks, and what it calls a collapse."""

    every: int = 50
    """Steps between readings."""
    policy: CollapsePolicy = CollapsePolicy.warn
    """`warn` logs a line and goes on, `lower_lr` also lowers the learning rate, `stop` ends the run (CollapseError)."""
    lr_factor: float = 0.5
    """`lower_lr`: the learning rate is multiplied by this at each reading with an alarm."""
    lr_floor: float = 0.01
    """`lower_lr`: but never goes below this share of its schedule."""
    min_rank: float = 0.01
    """Alarm where the effective rank is below this share of the largest possible one, min(n - 1, D) (at least 1.5)."""
    min_spread: float = 1e-3
    """Alarm where the standard deviation per dimension is below this share of the embeddings' root mean square."""
    drop: float = 0.1
    """Alarm where rank or spread is below this share of its best reading of as many rows so far; 0 means never."""
    max_samples: int = 1024
    """Embeddings of a reading, over all ranks; more are left out."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        self.policy = choice(CollapsePolicy, "policy", self.policy)
        if self.every < 1:
            raise ValueError(f"every={self.every}: too small; allowed: 1 and more")
        if self.max_samples < 3:
            raise ValueError(f"max_samples={self.max_samples}: too few for a rank; allowed: 3 and more")
        for name in ("lr_factor", "lr_floor"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: lowers nothing; allowed: above 0 and below 1")
        for name in ("min_rank", "min_spread", "drop"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: not a share; allowed: 0 (never) up to 1")


@dataclass(kw_only=True, slots=True, frozen=True)
class Reading:
    """What the monitor sees of one level."""

    rankme: float
    """RankMe of the uncentred embeddings, between 1 and min(n, D)."""
    effective_rank: float
    """The same of the centred ones: a constant offset does not count."""
    std: float
    """Standard deviation over the batch, averaged over dimensions."""
    spread: float
    """`std` over the root mean square of the embeddings: has no unit."""


def entropy_rank(embeddings: Float[Tensor, "n D"]) -> float:
    """Return exp(-sum p log p) of the normalised singular values p = s / |s|_1 + 1e-7.

    They are the roots of the eigenvalues of the smaller Gram matrix: in float64 off by 1e-8 of the largest at most, and
    found in a half to a sixth of the time, which a short step would feel.

    Source: RankMe, arXiv 2210.02885, equation 1 (without centring); with centred rows the effective rank of
    Roy and Vetterli.

    >>> round(entropy_rank(torch.eye(4)), 3)
    4.0
    """
    gram = embeddings @ embeddings.T if len(embeddings) < embeddings.shape[1] else embeddings.T @ embeddings
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


def read_embeddings(embeddings: Float[Tensor, "n D"]) -> Reading:
    """Return rank and spread of embeddings; all NaN where one of them is not finite.

    Args:
        embeddings: One row an image, of any scale.
    """
    rows = embeddings.detach().to(torch.float64)
    if not bool(torch.isfinite(rows).all()):
        return Reading(rankme=math.nan, effective_rank=math.nan, std=math.nan, spread=math.nan)
    centred = rows - rows.mean(0)
    std = float(centred.square().mean(0).sqrt().mean())
    size = float(rows.square().mean().sqrt())
    return Reading(
        rankme=entropy_rank(rows),
        effective_rank=entropy_rank(centred),
        std=std,
        spread=std / size if size > 0.0 else 0.0,
    )


class CollapseMonitor(Callback):
    """Logs `monitor/<level>/{rankme,effective_rank,std,spread}` and `monitor/alarm`, the number of collapsed levels.

    The embeddings are those of the step's last micro-batch, gathered over ranks. They need no labels and say
    nothing about quality; they say when a run is not worth its electricity. A step that the guard has left out is not
    read.

    Args:
        config: When to look, and the thresholds.
    """

    def __init__(self, config: MonitorConfig | None = None) -> None:
        self.config = MonitorConfig() if config is None else config
        self._best: dict[str, dict[str, float]] = {}
        self._alarmed: set[str] = set()
        self._lr_scale = 1.0

    def on_fit_start(self, trainer: Trainer) -> None:
        """Under `lower_lr`, go on with the learning rate that earlier alarms have left."""
        if self.config.policy is not CollapsePolicy.lower_lr or self._lr_scale == 1.0:
            return
        trainer.lr_scale = self._lr_scale
        if trainer.world.is_main:
            text = "learning rate at %g of its schedule, as earlier alarms have left it (monitor policy lower_lr)"
            logger.warning(text, self._lr_scale)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Take a reading of every level, where it is time."""
        if not result.embeddings or not (trainer.step == 1 or trainer.step % self.config.every == 0):
            return
        if bool(result.skipped):
            return
        row: dict[str, float] = {}
        alarms: dict[str, str] = {}
        for level, embeddings in result.embeddings.items():
            rows = trainer.world.gather(embeddings.detach().float())[: self.config.max_samples]
            reading = read_embeddings(rows)
            for name in ("rankme", "effective_rank", "std", "spread"):
                row[f"monitor/{level}/{name}"] = getattr(reading, name)
            if problem := self._judge(level, reading, *rows.shape):
                alarms[level] = problem
        row["monitor/alarm"] = float(len(alarms))
        trainer.log(row)
        self._raise_alarm(trainer, alarms)

    def state_dict(self) -> dict[str, Any]:
        """Return the best readings so far, each with its number of rows, and how far the rate has been lowered."""
        return {"best": self._best, "lr_scale": self._lr_scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self._best, self._lr_scale = state["best"], state.get("lr_scale", 1.0)

    def _judge(self, level: str, reading: Reading, count: int, width: int) -> str | None:
        config = self.config
        if math.isnan(reading.spread):
            return "embeddings are not finite"
        best = self._best.get(level, {})
        if best.get("n") != count:
            # Fewer rows, as with more micro-batches to a step, have a lower rank.
            best = self._best[level] = {"n": count, "effective_rank": 0.0, "spread": 0.0}
        # One row is its mean, and two lie on a line, whatever they are.
        floors = {}
        if count > 2:
            floors["effective_rank"] = max(1.5, config.min_rank * min(count - 1, width)) if config.min_rank else 0.0
        if count > 1:
            floors["spread"] = config.min_spread
        for name, floor in floors.items():
            value = getattr(reading, name)
            if value < floor:
                return f"{name} {value:.3g} is below {floor:.3g} (n={count}, D={width})"
            if value < config.drop * best[name]:
                return f"{name} {value:.3g} has fallen from {best[name]:.3g} (n={count}, D={width})"
            best[name] = max(best[name], value)
        return None

    def _raise_alarm(self, trainer: Trainer, alarms: dict[str, str]) -> None:
        for level, problem in alarms.items():
            line = f"step {trainer.step}: collapse at level {level}: {problem}"
            remedy = "lower the learning rate, raise the EMA momentum or weigh the anti-collapse term higher"
            if self.config.policy is CollapsePolicy.stop:
                raise CollapseError(f"{line}; {remedy}")
            if level not in self._alarmed and trainer.world.is_main:
                logger.warning("%s; %s", line, remedy)
        self._alarmed = set(alarms)
        if alarms and self.config.policy is CollapsePolicy.lower_lr:
            self._lower_rate(trainer)

    def _lower_rate(self, trainer: Trainer) -> None:
        lowered = max(self.config.lr_floor, self._lr_scale * self.config.lr_factor)
        if lowered < self._lr_scale:
            self._lr_scale = trainer.lr_scale = lowered
            if trainer.world.is_main:
                logger.warning("step %d: learning rate lowered to %g of its schedule", trainer.step, lowered)
