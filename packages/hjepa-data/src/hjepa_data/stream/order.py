"""The order of an endless stream, as arithmetic: global position -> (epoch, sample).

Epoch e holds the positions [eN, (e+1)N). In an epoch the shards (or other groups of samples) are put in a random order
and cut into windows of ``window_shards`` shards; the windows follow one another, and the samples of a window are put in
a random order. A random order is the order of the hashes of (seed, what is ordered), so that it is a pure function and
needs no state.

The positions of a mixture are dealt to its sources in blocks. In each block a source has the same number of positions,
at random places, so that its share of all positions before any one is arithmetic, too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from hjepa_data.errors import DataError, refuse
from hjepa_data.random import bits_numpy, hash_int
from hjepa_data.shards.index import Int64Array
from hjepa_data.sources.base import Source
from hjepa_data.sources.mixture import MixtureSource

__all__ = ["MixtureOrder", "Order", "StreamOrder", "Window", "order_of", "permutation"]

_SHARDS, _SAMPLES, _SOURCES = 1, 2, 3
_KEPT_EPOCHS, _KEPT_WINDOWS, _KEPT_BLOCKS = 2, 4, 2

# Of a mixture preceded by the number of the source: epoch, number in the epoch; and the shards.
Window = tuple[tuple[int, ...], Int64Array]


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

    def windows_from(self, position: int, count: int) -> list[Window]:
        """List the windows from a position on.

        Args:
            position: 0 and up, over all epochs.
            count: how many windows.

        Returns:
            For each window (epoch, its number in the epoch) and its shards.
        """
        epoch, place = divmod(position, self.num_samples)
        window = int(np.searchsorted(self._layout(epoch)[1], place, side="right"))
        found: list[Window] = []
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


class MixtureOrder:
    """Which sample stands at which position of an endless stream of several sources.

    Args:
        orders: of the samples of each source, [S].
        group_counts: number of groups in each source, [S].
        shares: positions of each source in a block, [S].
        seed: of the places in the blocks.
    """

    def __init__(self, orders: Sequence[Order], group_counts: Sequence[int], shares: Int64Array, seed: int) -> None:
        self._orders = tuple(orders)
        self._shares = shares
        self._seed = seed
        self._dealt = np.repeat(np.arange(len(shares)), shares)
        self._first_samples = np.cumsum([0, *(order.num_samples for order in orders)])
        self._first_groups = np.cumsum([0, *group_counts])
        self._blocks: OrderedDict[int, Int64Array] = OrderedDict()
        self.num_samples: int = int(self._first_samples[-1])
        self.fingerprint: int = hash_int(seed, *shares.tolist(), *(order.fingerprint for order in orders)) >> 1

    def at(self, position: int) -> tuple[int, int]:
        """Find what stands at a position.

        Args:
            position: 0 and up.

        Returns:
            epoch of its source, sample.
        """
        epochs, samples = self.span(position, 1)
        return int(epochs[0]), int(samples[0])

    def span(self, start: int, count: int) -> tuple[Int64Array, Int64Array]:
        """Find what stands at consecutive positions.

        Args:
            start: first position.
            count: how many.

        Returns:
            epochs, each of its own source, [count] and samples [count].
        """
        epochs = np.empty(count, dtype=np.int64)
        samples = np.empty(count, dtype=np.int64)
        size = len(self._dealt)
        first, last = start // size, (start + count - 1) // size
        blocks = [self._block(block) for block in range(first, last + 1)]
        sources = np.concatenate(blocks)[start - first * size :][:count] if count else np.empty(0)
        for number, (order, before) in enumerate(zip(self._orders, self._before(start), strict=True)):
            places = np.flatnonzero(sources == number)
            epochs[places], found = order.span(before, len(places))
            samples[places] = found + self._first_samples[number]
        return epochs, samples

    def windows_from(self, position: int, count: int) -> list[Window]:
        """List the windows of each source from a position on.

        Args:
            position: 0 and up.
            count: how many windows of each source.

        Returns:
            For each window (number of the source, epoch, its number in the epoch) and its groups.
        """
        return [
            ((number, *key), groups + self._first_groups[number])
            for number, before in enumerate(self._before(position))
            for key, groups in self._orders[number].windows_from(before, count)
        ]

    def _before(self, position: int) -> list[int]:
        """Count the positions of each source before a position."""
        block, place = divmod(position, len(self._dealt))
        begun = np.bincount(self._block(block)[:place], minlength=len(self._orders))
        counts: list[int] = (block * self._shares + begun).tolist()
        return counts

    def _block(self, block: int) -> Int64Array:
        """Number of the source at each place of a block."""
        if block not in self._blocks:
            order = permutation(len(self._dealt), self._seed, block, _SOURCES)
            _keep(self._blocks, block, self._dealt[order], _KEPT_BLOCKS)
        return self._blocks[block]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_blocks": OrderedDict()}


Order = StreamOrder | MixtureOrder


def order_of(source: Source, window_shards: int, seed: int) -> Order:
    """Build the order in which the samples of a source are shown.

    Args:
        source: the samples.
        window_shards: groups that are shuffled together.
        seed: of the order.

    Returns:
        Its order; that of a mixture with weights deals positions to its sources, each of which has its own order.

    Raises:
        DataError: the source has no samples.
    """
    if not len(source):
        raise DataError(f"the {type(source).__name__} has no samples; a stream needs one at least")
    if not isinstance(source, MixtureSource) or source.shares is None:
        return StreamOrder(source.group_sizes, window_shards, seed)
    parts = source.sources
    orders = [order_of(part, window_shards, hash_int(seed, _SOURCES, number)) for number, part in enumerate(parts)]
    return MixtureOrder(orders, [len(part.group_sizes) for part in parts], source.shares, seed)


def _keep(cache: OrderedDict[Any, Any], key: object, value: object, limit: int) -> None:
    cache[key] = value
    while len(cache) > limit:
        cache.popitem(last=False)
