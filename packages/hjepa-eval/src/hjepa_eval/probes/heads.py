"""Many small heads on the same frozen features, trained at once and chosen on held-out training samples."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class HeadOptimizer(StrEnum):
    """What trains the heads."""

    sgd = "sgd"
    """SGD with momentum 0.9; weight decay is added to the gradient."""
    adamw = "adamw"
    """AdamW with its usual moments; weight decay is decoupled."""


@dataclass(kw_only=True, slots=True)
class HeadTraining:
    """How heads are trained: every learning rate with every weight decay, all in one pass over the features.

    Attributes:
        learning_rates: Peak learning rates.
        weight_decays: Weight decays.
        epochs: Passes over the training features.
        batch_size: Samples of a step; at most all there are. With 1024, heads on 3,000 samples end half a point early.
        optimizer: sgd or adamw.
        warmup: Share of the steps in which the rate rises linearly from 0, in [0, 1); it falls to 0 by a cosine after.
        held_out: Share of the training samples that chooses among heads, in (0, 1).
        refit: Train the chosen head again on all training samples, held-out ones included.
        seed: Of the split, the order of samples and the start of the weights.
    """

    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    weight_decays: tuple[float, ...] = (0.0, 1e-4, 1e-3, 1e-2)
    epochs: int = 30
    batch_size: int = 256
    optimizer: HeadOptimizer = HeadOptimizer.sgd
    warmup: float = 0.0
    held_out: float = 0.2
    refit: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        self.learning_rates, self.weight_decays = tuple(self.learning_rates), tuple(self.weight_decays)
        if self.optimizer not in tuple(HeadOptimizer):
            raise ValueError(f"optimizer={self.optimizer}: unknown; allowed: {', '.join(HeadOptimizer)}")
        self.optimizer = HeadOptimizer(self.optimizer)
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(
                f"learning_rates={self.learning_rates}: at least one, all above 0; the default spans two decades"
            )
        if not self.weight_decays or min(self.weight_decays) < 0:
            raise ValueError(f"weight_decays={self.weight_decays}: at least one, none below 0; (0.0,) is plain")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs={self.epochs} batch_size={self.batch_size}: both at least 1")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup}: a share of the steps, in [0, 1); 0.1 is usual for attention")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: a share of the training samples, in (0, 1); 0.2 is usual")

    def grid(self) -> list[tuple[float, float]]:
        """Every (learning rate, weight decay)."""
        return list(product(self.learning_rates, self.weight_decays))


@dataclass(kw_only=True, slots=True, frozen=True)
class Candidate:
    """One head of a probe and how it did.

    Attributes:
        features: Name of the features that it reads.
        learning_rate: Peak learning rate.
        weight_decay: Weight decay.
        held_out: Score on the held-out training samples, larger is better; -inf where training diverged.
    """

    features: str
    learning_rate: float
    weight_decay: float
    held_out: float


def best_candidate(candidates: Sequence[Candidate], config: HeadTraining) -> int:
    """Number of the head with the highest held-out score, the first among equals.

    Args:
        candidates: Every head.
        config: How they were trained, for the message.

    Returns:
        Its number.

    Raises:
        ValueError: Where all heads diverged.
    """
    best = max(range(len(candidates)), key=lambda number: candidates[number].held_out)
    if candidates[best].held_out == -math.inf:
        raise ValueError(f"learning_rates={config.learning_rates}: all heads diverge; add smaller ones")
    return best


@torch.enable_grad()
def train_heads(
    heads: Sequence[nn.Module],
    settings: Sequence[tuple[float, float]],
    loss: Callable[[Int[Tensor, " b"]], Float[Tensor, " H"]],
    samples: Int[Tensor, " f"],
    config: HeadTraining,
) -> None:
    """Train heads side by side: each has its own learning rate and weight decay, all see the same batches.

    A head that diverges harms none of the others: gradients of one head never reach another.

    Args:
        heads: The modules, trained in place.
        settings: Learning rate and weight decay of each.
        loss: Loss of every head on the samples of these numbers.
        samples: Numbers of the training samples.
        config: Epochs, batch size, optimizer, warmup and seed.
    """
    groups = [
        {"params": list(head.parameters()), "lr": rate, "weight_decay": decay}
        for head, (rate, decay) in zip(heads, settings, strict=True)
    ]
    optimizer: torch.optim.Optimizer
    if config.optimizer is HeadOptimizer.sgd:
        optimizer = torch.optim.SGD(groups, lr=settings[0][0], momentum=0.9, foreach=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=settings[0][0], foreach=True)
    size = min(config.batch_size, len(samples))
    steps = config.epochs * max(1, len(samples) // size)
    for step, batch in enumerate(_batches(samples, size, config)):
        factor = learning_rate_factor(step, steps, config.warmup)
        for group, (rate, _) in zip(optimizer.param_groups, settings, strict=True):
            group["lr"] = rate * factor
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss(batch).sum())
        optimizer.step()


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at a step: a linear rise, then half a cosine to 0.

    Args:
        step: Number of the step, from 0.
        steps: Steps in all.
        warmup: Share of them in the rise.

    Returns:
        The factor, in (0, 1].
    """
    rise = warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, steps - rise)))


def _batches(samples: Tensor, size: int, config: HeadTraining) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.epochs):
        order = torch.randperm(len(samples), generator=generator)
        # The last samples of an epoch that fill no batch are other ones each time.
        for first in range(0, len(samples) - size + 1, size):
            yield samples[order[first : first + size]]
