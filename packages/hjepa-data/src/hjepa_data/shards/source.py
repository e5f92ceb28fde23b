"""A source: the samples of many shards, local or remote, as one numbered list, each read by its offset."""

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
from PIL import Image

from hjepa_data.errors import DataError, refuse
from hjepa_data.shards.cache import CacheConfig, RemoteShard, ShardCache
from hjepa_data.shards.columns import SharedArrays
from hjepa_data.shards.index import Int64Array, ShardIndex, index_shard
from hjepa_data.shards.patterns import Pattern, Shard, expand_locations
from hjepa_data.shards.remote import list_remote, shown

__all__ = ["RawSample", "ShardSource"]

_OPEN_FILES = 64
_READ_AHEAD_BYTES = 1 << 20


@dataclass(kw_only=True, slots=True)
class RawSample:
    """One sample as it lies in its source.

    Attributes:
        image: encoded bytes; a PIL image from sources that hold no JPEG, PNG or WebP file.
        label: class number, -1 if unknown.
    """

    image: bytes | Image.Image
    label: int


class ShardSource:
    """The samples of shards, numbered from 0 in the order of the pattern and of each tar.

    A remote shard is fetched whole into a local cache when its first sample is read; to number its samples, its index
    is enough where one is published beside it.

    Args:
        pattern: what ``expand_locations`` understands.
        allow_truncated: keep the complete samples of shards that are cut off, instead of refusing them.
        num_threads: shards that are indexed at the same time.
        verify: read every shard once, remote ones too, and compare it with the sha256 of its index.
        cache: of remote shards; None is ``CacheConfig()``.

    Raises:
        ValueError: ``num_threads`` is below 1.
        DataError: a shard is missing, damaged, cut off, holds no image, does not fit its index when verified, or cannot
            be fetched.
    """

    def __init__(
        self,
        pattern: Pattern,
        *,
        allow_truncated: bool = False,
        num_threads: int = 8,
        verify: bool = False,
        cache: CacheConfig | None = None,
    ) -> None:
        if num_threads < 1:
            refuse("num_threads", num_threads, "nobody would index the shards", "allowed: 1 and more")
        cache = cache if cache is not None else CacheConfig()
        lister = partial(list_remote, timeout=cache.timeout, attempts=cache.attempts, first_wait=cache.first_wait)
        self.shards: list[Shard] = expand_locations(pattern, lister)
        self._cache = ShardCache(cache)
        index = partial(self._index, allow_truncated=allow_truncated, verify=verify)
        with ThreadPoolExecutor(num_threads) as pool:
            found = list(pool.map(index, self.shards))
        parts = [part for part, _ in found]
        self._remote: dict[int, RemoteShard] = {n: remote for n, (_, remote) in enumerate(found) if remote is not None}
        self.group_sizes: Int64Array = np.array([len(part) for part in parts], dtype=np.int64)
        self._ends: list[int] = np.cumsum(self.group_sizes).tolist()
        self._rows = SharedArrays(
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in ("offsets", "sizes", "labels")}
        )
        self._open: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def labels(self) -> Int64Array:
        """Class number of each sample, -1 if unknown, [len]."""
        return self._rows["labels"]

    @property
    def identity(self) -> Int64Array:
        """Bytes of each image, [len]."""
        return self._rows["sizes"]

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
        size, offset = self._rows["sizes"].item(index), self._rows["offsets"].item(index)
        try:
            image = os.pread(self._file(shard), size, offset)
        except OSError as error:
            raise DataError(f"shard '{self._name(shard)}' cannot be read: {error.strerror}") from None
        if len(image) != size:
            raise DataError(
                f"shard '{self._name(shard)}' changed while in use: {len(image)} of {size} bytes at byte {offset}"
            )
        return RawSample(image=image, label=self._rows["labels"].item(index))

    def read_ahead(self, shards: Iterable[int]) -> None:
        """Read whole shards once, from their start to their end, so that the system has them in its page cache.

        Remote shards are fetched, as many as the cache holds together.

        Samples are read in random order within a window. Where a disk is slow to seek, or lies behind a network, one
        sequential read is many times faster than thousands of small ones.

        Args:
            shards: their numbers.
        """
        # Advice to the system (WILLNEED) would be simpler, but Linux cuts it to the size of one request.
        buffer = bytearray(_READ_AHEAD_BYTES)
        room = self._cache.config.max_bytes
        for shard in shards:
            remote = self._remote.get(shard)
            # A shard that cannot be read is reported by the read of a sample, which has someone to report to.
            if remote is not None:
                room -= remote.size
                if room >= 0:
                    with suppress(OSError, DataError):
                        os.close(self._cache.open(remote))
                continue
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
        return f"{self._name(bisect_right(self._ends, index))}: byte {self._rows['offsets'].item(index)}"

    def close(self) -> None:
        """Close the files that this process holds open."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _index(self, shard: Shard, *, allow_truncated: bool, verify: bool) -> tuple[ShardIndex, RemoteShard | None]:
        if isinstance(shard, Path):
            return index_shard(shard, allow_truncated=allow_truncated, verify=verify), None
        index, remote = self._cache.index(shard, allow_truncated=allow_truncated)
        if verify:
            self._cache.verify(remote)
        return index, remote

    def _name(self, shard: int) -> str:
        name = self.shards[shard]
        return shown(name) if isinstance(name, str) else str(name)

    def _file(self, shard: int) -> int:
        file = self._open.get(shard)
        if file is None:
            remote = self._remote.get(shard)
            if remote is None:
                file = os.open(self.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
            else:
                file = self._cache.open(remote)
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
