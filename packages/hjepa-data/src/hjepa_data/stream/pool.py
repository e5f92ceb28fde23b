"""Shared memory in which workers hand over batches; it is used again when a batch is let go."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import count as numbers
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hjepa_data.errors import WorkerError, one_line
from hjepa_data.stream.batch import Batch
from hjepa_data.stream.worker import Loaded, TrainTasks

__all__ = ["BatchPool", "PooledTasks"]

_keys = numbers()
_pools: weakref.WeakValueDictionary[int, BatchPool] = weakref.WeakValueDictionary()
_NUMBERS = 3
_BYTES_PER_NUMBER = 8


class BatchPool:
    """Places for batches, in shared memory.

    The pages of new shared memory cost more time than the copy of a batch; those of a place are taken once. A place is
    free again when no tensor refers to the batch in it any more.

    Args:
        shapes: of the views, [B, C, H, W].
        places: batches that are prepared or held at a time.
    """

    def __init__(self, shapes: Iterable[tuple[int, ...]], places: int) -> None:
        self._shapes = [*shapes]
        size = _NUMBERS * _BYTES_PER_NUMBER * self._shapes[0][0] + sum(map(math.prod, self._shapes))
        self._memory = [_shared(size) for _ in range(places)]
        self._free = deque(range(places))
        self.key = next(_keys)
        _pools[self.key] = self

    def take(self) -> int | None:
        """Take a free place; None if batches that are still held fill them all."""
        return self._free.popleft() if self._free else None

    def batch(self, place: int) -> Batch:
        """Give the batch in a place, to be written there."""
        return self._batch(self._memory[place])

    def lend(self, place: int) -> Batch:
        """Give the batch in a place, which is free when the last of its tensors is gone."""
        memory = self._memory[place].numpy()
        weakref.finalize(memory, self._free.append, place).atexit = False
        return self._batch(torch.from_numpy(memory))

    def _batch(self, memory: Tensor) -> Batch:
        size = self._shapes[0][0]
        parts = torch.split_with_sizes(memory, [_NUMBERS * _BYTES_PER_NUMBER * size, *map(math.prod, self._shapes)])
        labels, sample, epoch = parts[0].view(torch.int64).view(_NUMBERS, size)
        views = tuple(part.view(shape) for part, shape in zip(parts[1:], self._shapes, strict=True))
        return Batch(views=views, labels=labels, sample=sample, epoch=epoch)


class PooledTasks(Dataset[Loaded]):
    """Tasks whose batches are written into a pool.

    Args:
        tasks: what is loaded, by the position of its first image.
        pool: where to.
    """

    def __init__(self, tasks: TrainTasks, pool: BatchPool) -> None:
        self._tasks = tasks
        self._pool = pool

    def items(self, starts: Iterable[int]) -> Iterator[tuple[int, int | None]]:
        """Give each batch that is asked for a place; in the process that takes the batches."""
        return ((start, self._pool.take()) for start in starts)

    def __getitem__(self, item: tuple[int, int | None]) -> Loaded:
        """Load a batch into its place; without one it travels in new memory."""
        start, place = item
        if place is None:
            return self._tasks[start]
        batch = self._pool.batch(place)
        loaded = self._tasks.load(start, batch.views)
        if loaded.batch is not None:
            batch.labels.copy_(loaded.batch.labels)
            batch.sample.copy_(loaded.batch.sample)
            batch.epoch.copy_(loaded.batch.epoch)
            ticket: Any = _Ticket(self._pool.key, place)
            loaded.batch = ticket
        return loaded


class _Ticket:
    """Stands for a batch on its way from a worker, and becomes it where it arrives."""

    def __init__(self, key: int, place: int) -> None:
        self._what = key, place

    def __reduce__(self) -> tuple[Any, tuple[int, int]]:
        return _lend, self._what


def _lend(key: int, place: int) -> Batch:
    return _pools[key].lend(place)


def _shared(size: int) -> Tensor:
    # As torch's own loader does it: no public function makes shared memory without touching its pages.
    try:
        storage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call, unused-ignore]
    except RuntimeError as error:
        raise WorkerError(
            one_line(
                f"no shared memory (/dev/shm) for a batch of {size} bytes: {error}; fewer workers, a smaller prefetch "
                "or a smaller batch need less"
            )
        ) from None
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload, unused-ignore]
