"""A small real module and a stream made of arithmetic, for tests and examples of the trainer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hjepa_train.protocols import StepOutput


@dataclass(kw_only=True, slots=True)
class ArithmeticBatch:
    """Vectors that are a function of their index, as stand-ins for images."""

    values: Float[Tensor, "B D"]
    sample: Int[Tensor, " B"]

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """Return the batch on a device."""
        values = self.values.to(device, non_blocking=non_blocking)
        return type(self)(values=values, sample=self.sample.to(device, non_blocking=non_blocking))

    def __len__(self) -> int:
        return len(self.sample)


class ArithmeticStream:
    """Yields the rank's slice of the global batches 0, 1, 2, ...; its state is one integer.

    Args:
        batch_size: Samples of a batch over all ranks.
        width: D.
        rank: Of this process.
        size: Number of processes; it divides `batch_size`.
        end: Global batches before the stream ends; None means that it never does.
    """

    def __init__(
        self, *, batch_size: int = 16, width: int = 8, rank: int = 0, size: int = 1, end: int | None = None
    ) -> None:
        self.batch_size, self.width, self.rank, self.size, self.end = batch_size, width, rank, size, end
        self.position = 0

    def __iter__(self) -> Iterator[ArithmeticBatch]:
        count = self.batch_size // self.size
        while self.end is None or self.position < self.end:
            first = self.position * self.batch_size + self.rank * count
            sample = torch.arange(first, first + count)
            frequency = torch.arange(1, self.width + 1, dtype=torch.float64)
            values = torch.sin(sample[:, None] * frequency.sqrt()).float()
            self.position += 1
            yield ArithmeticBatch(values=values, sample=sample)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of global batches that were yielded."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a number of global batches."""
        self.position = int(state["position"])


class ToyBlock(nn.Module):
    """A residual block with dropout."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.reduce = nn.Linear(2 * width, width)

    def forward(self, values: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Return values of the same shape."""
        hidden: Tensor = self.reduce(self.dropout(nn.functional.gelu(self.expand(self.norm(values)))))
        return values + hidden


class ToyModule(nn.Module):
    """Predicts what its EMA copy makes of a vector from a part of that vector: a joint-embedding module in small.

    Args:
        width: D of the vectors.
        dropout: Draws from the global generator, which a resumed run has to restore.
        late_step: The predictor has no gradient before this step, as under a curriculum.
        seed: Of the initial weights; the global generator stays as it is.
    """

    def __init__(self, *, width: int = 8, dropout: float = 0.0, late_step: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.late_step = late_step
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.mask_token = nn.Parameter(torch.randn(1, width))
            self.online = nn.Sequential(ToyBlock(width, dropout), ToyBlock(width, dropout))
            self.predictor = ToyBlock(width, 0.0)
            self.register_buffer("mean", torch.zeros(width))
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    @property
    def may_skip_parameters(self) -> bool:
        """Whether the predictor waits at the beginning."""
        return self.late_step > 0

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the encoder and its copy."""
        return [(self.online, self.target)]

    def forward(self, batch: ArithmeticBatch, step: int) -> StepOutput:
        """Return the loss of a batch; a quarter of each vector is hidden."""
        values = batch.values
        hidden = torch.arange(values.shape[1], device=values.device) % 4 == 0
        context = self.online(torch.where(hidden, self.mask_token, values))
        prediction = self.predictor(context) if step >= self.late_step else context
        with torch.no_grad():
            target = self.target(values) + values
        loss = nn.functional.smooth_l1_loss(prediction.float(), target.float())
        return StepOutput(loss=loss, metrics={"loss_level_0": loss}, embeddings={"0": context.detach()})
