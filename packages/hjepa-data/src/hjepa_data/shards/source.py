"""A source: the samples of many local shards as one numbered list, each read by its offset."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hjepa_data.errors import DataError
from hjepa_data.shards.index import Int64Array, index_shard
from hjepa_data.shards.patterns import Pattern, expand_shards

__all__ = ["RawSample", "ShardSource"]

_OPEN_FILES = 64
_READ_AHEAD_BYTES = 1 << 20


@dataclass(kw_only=True, slots=True)
class RawSample:
    """One sample as it lies in its shard.

    Attributes:
        image: encoded bytes.
        label: class number, -1 if unknown.
    """

    image: bytes
    label: int


class _Rows:
    """Offset, length and label of each sample: arrays here, and shared memory on the way to another process."""

    def __init__(self, offsets: Int64Array, lengths: Int64Array, labels: Int64Array) -> None:
        self.offsets, self.lengths, self.labels = offsets, lengths, labels
        self._shared: tuple[Tensor, ...] = ()

    def __getstate__(self) -> tuple[Tensor, ...]:
        # Tensors reach worker processes as handles, arrays as copies; the handles live as long as these tensors do.
        if not self._shared:
            columns = (self.offsets, self.lengths, self.labels)
            self._shared = tuple(torch.from_numpy(column).clone() for column in columns)
        return self._shared

    def __setstate__(self, state: tuple[Tensor, ...]) -> None:
        self._shared = state
        self.offsets, self.lengths, self.labels = (column.numpy() for column in state)


class ShardSource:
    """The samples of shards, numbered from 0 in the order of the pattern and of each tar.

    Args:
        pattern: what ``expand_shards`` understands.
        allow_truncated: keep the complete samples of shards that are cut off, instead of refusing them.
        num_threads: shards that are indexed at the same time.
        verify: read every shard once and compare it with the sha256 of its index.

    Raises:
        DataError: a shard is missing, damaged, cut off, holds no image, or does not fit its index when verified.
    """

    def __init__(
        self, pattern: Pattern, *, allow_truncated: bool = False, num_threads: int = 8, verify: bool = False
    ) -> None:
        self.shards: list[Path] = expand_shards(pattern)
        index = partial(index_shard, allow_truncated=allow_truncated, verify=verify)
        with ThreadPoolExecutor(num_threads) as pool:
            parts = list(pool.map(index, self.shards))
        self.shard_sizes: Int64Array = np.array([len(part) for part in parts], dtype=np.int64)
        self._ends: list[int] = np.cumsum(self.shard_sizes).tolist()
        self._rows = _Rows(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in ("offsets", "sizes", "labels"))
        )
        self._open: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def labels(self) -> Int64Array:
        """Class number of each sample, -1 if unknown, [len]."""
        return self._rows.labels

    def read(self, index: int) -> RawSample:
        """Read one sample.

        Args:
            index: its number in [0, len).

        Returns:
            The bytes of its image and its label.

        Raises:
            DataError: the shard vanished, or is shorter than it was when it was indexed.
            IndexError: there is no such number.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect_right(self._ends, index)
        size, offset = self._rows.lengths.item(index), self._rows.offsets.item(index)
        try:
            image = os.pread(self._file(shard), size, offset)
        except OSError as error:
            raise DataError(f"shard '{self.shards[shard]}' cannot be read: {error.strerror}") from None
        if len(image) != size:
            raise DataError(
                f"shard '{self.shards[shard]}' changed while in use: {len(image)} of {size} bytes at byte {offset}"
            )
        return RawSample(image=image, label=self._rows.labels.item(index))

    def read_ahead(self, shards: Iterable[int]) -> None:
        """Read whole shards once, from their start to their end, so that the system has them in its page cache.

        Samples are read in random order within a window. Where a disk is slow to seek, or lies behind a network, one
        sequential read is many times faster than thousands of small ones.

        Args:
            shards: their numbers.
        """
        # Advice to the system (WILLNEED) would be simpler, but Linux cuts it to the size of one request.
        buffer = bytearray(_READ_AHEAD_BYTES)
        for shard in shards:
            # A shard that cannot be read is reported by the read of a sample, which has someone to report to.
            with suppress(OSError), open(self.shards[shard], "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def locate(self, index: int) -> str:
        """Say where a sample lies, for messages.

        Args:
            index: its number in [0, len).

        Returns:
            ``shard.tar: byte offset``.
        """
        return f"{self.shards[bisect_right(self._ends, index)]}: byte {self._rows.offsets.item(index)}"

    def close(self) -> None:
        """Close the files that this process holds open."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _file(self, shard: int) -> int:
        file = self._open.get(shard)
        if file is None:
            file = os.open(self.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
            self._open[shard] = file
            if len(self._open) > _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        else:
            self._open.move_to_end(shard)
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()
