"""The order of an endless stream, as arithmetic: global position -> (epoch, sample).

Epoch e holds the positions [eN, (e+1)N). In an epoch the shards are put in a random order and cut into windows of
``window_shards`` shards; the windows follow one another, and the samples of a window are put in a random order. A
random order is the order of the hashes of (seed, what is ordered), so that it is a pure function and needs no state.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np

from hjepa_data.errors import refuse
from hjepa_data.random import bits_numpy, hash_int
from hjepa_data.shards.index import Int64Array

__all__ = ["StreamOrder", "permutation"]

_SHARDS, _SAMPLES = 1, 2
_KEPT_EPOCHS, _KEPT_WINDOWS = 2, 4


def permutation(n: int, seed: int, *counters: int) -> Int64Array:
    """Permute 0..n-1: the stable order of their hashes.

    Args:
        n: how many.
        seed: any integer.
        counters: what the permutation belongs to.

    Returns:
        A permutation, [n], the same on every machine and version.
    """
    return np.argsort(bits_numpy(seed, *counters, n=n), kind="stable").astype(np.int64, copy=False)


class StreamOrder:
    """Which sample stands at which position of an endless stream.

    Args:
        shard_sizes: number of samples in each shard, [S].
        window_shards: shards that are shuffled together.
        seed: of the order.
    """

    def __init__(self, shard_sizes: Int64Array, window_shards: int, seed: int) -> None:
        if window_shards < 1:
            refuse("window_shards", window_shards, "a window holds at least one shard", "allowed: 1 and more")
        self._sizes = shard_sizes
        self._starts = np.cumsum(shard_sizes) - shard_sizes
        self._window_shards = window_shards
        self._seed = seed
        self._layouts: OrderedDict[int, tuple[Int64Array, Int64Array]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], Int64Array] = OrderedDict()
        self.num_samples = int(shard_sizes.sum())
        # Of all that the order depends on, 63 bits: positions are exchangeable only if it is the same.
        self.fingerprint = hash_int(seed, window_shards, len(shard_sizes), *shard_sizes.tolist()) >> 1

    def at(self, position: int) -> tuple[int, int]:
        """Find what stands at a position.

        Args:
            position: 0 and up, over all epochs.

        Returns:
            epoch, sample.
        """
        epochs, samples = self.span(position, 1)
        return int(epochs[0]), int(samples[0])

    def span(self, start: int, count: int) -> tuple[Int64Array, Int64Array]:
        """Find what stands at consecutive positions.

        Args:
            start: first position, over all epochs.
            count: how many.

        Returns:
            epochs [count] and samples [count].
        """
        epochs = np.empty(count, dtype=np.int64)
        samples = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, place = divmod(start + done, self.num_samples)
            _, ends = self._layout(epoch)
            window = int(np.searchsorted(ends, place, side="right"))
            content = self._window(epoch, window)
            first = place - (int(ends[window]) - len(content))
            take = min(count - done, len(content) - first)
            epochs[done : done + take] = epoch
            samples[done : done + take] = content[first : first + take]
            done += take
        return epochs, samples

    def windows_from(self, position: int, count: int) -> list[tuple[tuple[int, int], Int64Array]]:
        """List the windows from a position on.

        Args:
            position: 0 and up, over all epochs.
            count: how many windows.

        Returns:
            For each window (epoch, its number in the epoch) and its shards.
        """
        epoch, place = divmod(position, self.num_samples)
        window = int(np.searchsorted(self._layout(epoch)[1], place, side="right"))
        found = []
        for _ in range(count):
            shards, ends = self._layout(epoch)
            found.append(((epoch, window), shards[window * self._window_shards : (window + 1) * self._window_shards]))
            epoch, window = (epoch, window + 1) if window + 1 < len(ends) else (epoch + 1, 0)
        return found

    def _layout(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """Order of the shards in an epoch, and the place at which each window ends."""
        if epoch not in self._layouts:
            shards = permutation(len(self._sizes), self._seed, epoch, _SHARDS)
            firsts = np.arange(0, len(shards), self._window_shards)
            ends: Int64Array = np.cumsum(np.add.reduceat(self._sizes[shards], firsts))
            _keep(self._layouts, epoch, (shards, ends), _KEPT_EPOCHS)
        return self._layouts[epoch]

    def _window(self, epoch: int, window: int) -> Int64Array:
        """Samples of a window in their order."""
        key = (epoch, window)
        if key not in self._windows:
            shards = self._layout(epoch)[0][window * self._window_shards : (window + 1) * self._window_shards]
            samples = np.concatenate([np.arange(self._starts[s], self._starts[s] + self._sizes[s]) for s in shards])
            order = permutation(len(samples), self._seed, epoch, _SAMPLES, window)
            _keep(self._windows, key, samples[order], _KEPT_WINDOWS)
        return self._windows[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layouts": OrderedDict(), "_windows": OrderedDict()}


def _keep(cache: OrderedDict[Any, Any], key: object, value: object, limit: int) -> None:
    cache[key] = value
    while len(cache) > limit:
        cache.popitem(last=False)
