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
from hjepa_data.transforms.crop import NUMBERS_PER_CROP

__all__ = ["BatchPool", "PooledTasks"]

_keys = numbers()
_pools: weakref.WeakValueDictionary[int, BatchPool] = weakref.WeakValueDictionary()
# Label, sample and epoch of an image are int64, its crop in each view is float32.
_NUMBERS = 3
_BYTES_PER_IMAGE = 8 * _NUMBERS
_BYTES_PER_CROP = 4 * NUMBERS_PER_CROP


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
        count = self._shapes[0][0]
        # Numbers come before pixels, so that they are aligned.
        self._sizes = [
            _BYTES_PER_IMAGE * count,
            _BYTES_PER_CROP * count * len(self._shapes),
            *map(math.prod, self._shapes),
        ]
        self._memory = [_shared(sum(self._sizes)) for _ in range(places)]
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
        numbers, crops, *pixels = torch.split_with_sizes(memory, self._sizes)
        labels, sample, epoch = numbers.view(torch.int64).view(_NUMBERS, -1)
        return Batch(
            views=tuple(part.view(shape) for part, shape in zip(pixels, self._shapes, strict=True)),
            labels=labels,
            sample=sample,
            epoch=epoch,
            crops=crops.view(torch.float32).view(len(self._shapes), -1, NUMBERS_PER_CROP).unbind(),
        )


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
            for whole, part in zip(batch.numbers, loaded.batch.numbers, strict=True):
                whole.copy_(part)
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
