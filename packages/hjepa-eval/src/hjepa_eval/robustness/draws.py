"""Random numbers of the samples of a batch: each sample has its own stream, whatever else is in the batch."""

import hashlib

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Draws:
    """One stream of numbers for each sample, a function of (seed, sample, words).

    Numbers are drawn on the CPU, so that they are the same for every device.

    Args:
        seed: Any integer.
        samples: Numbers of the samples in their data set [B].
        words: What the streams are for; other words, other numbers.
        device: Where the numbers are put.
    """

    def __init__(self, seed: int, samples: Int[Tensor, " B"], *words: object, device: torch.device | str) -> None:
        self._device = device
        self._generators = [torch.Generator().manual_seed(_hash(seed, sample, *words)) for sample in samples.tolist()]

    def normal(self, *shape: int) -> Float[Tensor, "B ..."]:
        """Standard normal numbers."""
        drawn = [torch.randn(shape, generator=generator) for generator in self._generators]
        return torch.stack(drawn).to(self._device)

    def uniform(self, low: float, high: float, *shape: int) -> Float[Tensor, "B ..."]:
        """Uniform numbers in [low, high)."""
        drawn = [torch.rand(shape, generator=generator) for generator in self._generators]
        return low + (high - low) * torch.stack(drawn).to(self._device)

    def integers(self, low: int, high: int, *shape: int) -> Int[Tensor, "B ..."]:
        """Integers in [low, high)."""
        drawn = [torch.randint(low, high, shape, generator=generator) for generator in self._generators]
        return torch.stack(drawn).to(self._device)

    def poisson(self, rate: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """Poisson counts of these rates."""
        rows = zip(rate.cpu(), self._generators, strict=True)
        return torch.stack([torch.poisson(row, generator=generator) for row, generator in rows]).to(self._device)


def _hash(seed: int, *words: object) -> int:
    text = "/".join(map(str, (seed, *words)))
    # Generators take 63 bits of a seed.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
