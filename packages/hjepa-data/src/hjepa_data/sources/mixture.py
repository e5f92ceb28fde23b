"""Several sources as one, each with its share of what is shown."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence

import numpy as np

from hjepa_data.errors import refuse
from hjepa_data.shards.columns import SharedArrays
from hjepa_data.shards.index import Int64Array
from hjepa_data.shards.source import RawSample
from hjepa_data.sources.base import Source, contents_of

__all__ = ["MixtureSource", "shares_of"]

# Positions that are dealt together: shares are multiples of its inverse.
_BLOCK = 10_000


class MixtureSource:
    """The samples of several sources, numbered one source after another; labels stay what they are in each.

    Args:
        sources: one or more.
        weights: share of each source in training batches, of any sum, rounded to a ten-thousandth; each source has its
            own epochs then. None shows each sample of all sources once an epoch; none of them has weights of its own.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None) -> None:
        if not sources:
            refuse("sources", sources, "nothing to mix", "allowed: one source or more")
        if weights is not None and len(weights) != len(sources):
            refuse("weights", list(weights), f"there are {len(sources)} sources", "allowed: a weight for each, or None")
        if weights is None and any(
            isinstance(source, MixtureSource) and source.shares is not None for source in sources
        ):
            refuse("weights", weights, "a source is a mixture whose own weights would not count", "allowed: weights")
        self.sources = tuple(sources)
        self.shares: Int64Array | None = None if weights is None else shares_of(weights)
        self.group_sizes: Int64Array = np.concatenate([source.group_sizes for source in self.sources])
        self._rows = SharedArrays(labels=np.concatenate([source.labels for source in self.sources]))
        self._ends: list[int] = np.cumsum([len(source) for source in self.sources]).tolist()
        self._group_ends: list[int] = np.cumsum([len(source.group_sizes) for source in self.sources]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def labels(self) -> Int64Array:
        """Class number of each sample in its own source, -1 if unknown, [len]."""
        return self._rows["labels"]

    @property
    def identity(self) -> Int64Array:
        """What each source holds."""
        return np.array([contents_of(source) for source in self.sources], dtype=np.int64)

    def source_of(self, samples: Int64Array) -> Int64Array:
        """Tell which sources samples come from.

        Args:
            samples: their numbers, such as ``batch.sample.numpy()``, [n].

        Returns:
            Numbers of the sources, [n].
        """
        return np.searchsorted(self._ends, samples, side="right").astype(np.int64)

    def read(self, index: int) -> RawSample:
        """Read one sample, as its source does."""
        number, inner = self._find(index)
        return self.sources[number].read(inner)

    def read_ahead(self, groups: Iterable[int]) -> None:
        """Let each source read its groups ahead."""
        of_source: dict[int, list[int]] = {}
        for group in groups:
            number = bisect_right(self._group_ends, group)
            of_source.setdefault(number, []).append(group - (self._group_ends[number - 1] if number else 0))
        for number, inner in of_source.items():
            self.sources[number].read_ahead(inner)

    def locate(self, index: int) -> str:
        """Say where a sample lies, for messages."""
        number, inner = self._find(index)
        return self.sources[number].locate(inner)

    def close(self) -> None:
        """Close all sources."""
        for source in self.sources:
            source.close()

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)


def shares_of(weights: Sequence[float]) -> Int64Array:
    """Share out a block of positions by the method of the largest remainder.

    Args:
        weights: positive numbers of any sum, [S].

    Returns:
        Positions of each source in a block, [S].

    Raises:
        ValueError: a weight is not positive, or so small that its source would never be shown.
    """
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        refuse("weights", list(weights), "not all of them are positive", "allowed: finite numbers above 0")
    exact = np.array(weights, dtype=np.float64) / math.fsum(weights) * _BLOCK
    shares = np.floor(exact).astype(np.int64)
    largest = np.argsort(shares - exact, kind="stable")
    shares[largest[: _BLOCK - int(shares.sum())]] += 1
    if shares.min() < 1:
        refuse("weights", list(weights), "a source would never be shown", f"allowed: shares of 1/{_BLOCK} and more")
    return shares
