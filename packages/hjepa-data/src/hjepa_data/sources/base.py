"""What a stream needs to know of samples, wherever they lie."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from typing import Protocol

import numpy as np
from PIL import Image

from hjepa_data.errors import refuse
from hjepa_data.shards.columns import SharedArrays
from hjepa_data.shards.index import Int64Array
from hjepa_data.shards.source import RawSample
from hjepa_data.shards.write import image_extension
from hjepa_data.transforms.decode import open_image

__all__ = ["Source", "contents_of", "group_sizes_of", "raw_image"]


class Source(Protocol):
    """Numbered samples in groups: group g holds ``group_sizes[g]`` consecutive ones, which are read together.

    Worker processes get a copy, forked or pickled. A source may have an ``identity``, an array that tells its samples
    from others of the same labels wherever they lie, such as the sizes of their files; ``contents_of`` reads it.
    """

    @property
    def group_sizes(self) -> Int64Array:
        """Number of samples in each group, [G]; their sum is the number of samples."""

    @property
    def labels(self) -> Int64Array:
        """Class number of each sample, -1 if unknown, [len]."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> RawSample:
        """Read one sample by its number; a ``SkipImageError`` says that it is to be left out and counted."""

    def read_ahead(self, groups: Iterable[int]) -> None:
        """Have groups at hand before their samples are read, where that saves time."""

    def locate(self, index: int) -> str:
        """Say where a sample lies, for messages."""

    def close(self) -> None:
        """Close what this process holds open."""


class LabelledSource:
    """What sources of other data sets share: labels held once for all processes, and groups of equal size.

    Args:
        labels: class number of each sample, -1 if unknown.
        group_size: as ``group_sizes_of`` takes it.
    """

    def __init__(self, labels: Int64Array, group_size: int | None) -> None:
        self._columns = SharedArrays(labels=labels)
        self.group_sizes: Int64Array = group_sizes_of(len(labels), group_size)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labels(self) -> Int64Array:
        """Class number of each sample, -1 if unknown, [len]."""
        return self._columns["labels"]

    def check(self, index: int) -> None:
        """Raise an IndexError for a number that no sample has."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")


def contents_of(source: Source) -> int:
    """Hash what samples a source holds, so that they are known again at another place.

    Args:
        source: the samples; of one without an ``identity`` the labels and groups alone count.

    Returns:
        63 bits: of the sizes of its groups, its labels and its ``identity``.
    """
    digest = hashlib.blake2b(digest_size=8)
    for column in (source.group_sizes, source.labels, getattr(source, "identity", None)):
        if column is not None:
            digest.update(np.ascontiguousarray(column).data)
    return int.from_bytes(digest.digest()) >> 1


def group_sizes_of(total: int, group_size: int | None) -> Int64Array:
    """Cut samples into groups.

    Args:
        total: number of samples.
        group_size: samples of a group, of which the last may be smaller; None makes one group of all.

    Returns:
        Number of samples in each group.
    """
    if group_size is None:
        return np.array([total], dtype=np.int64)
    if group_size < 1:
        refuse("group_size", group_size, "a group holds at least one sample", "allowed: 1 and more, or None for all")
    return np.diff(np.append(np.arange(0, total, group_size), total)).astype(np.int64)


def raw_image(data: bytes) -> bytes | Image.Image:
    """Keep the bytes of a JPEG, PNG or WebP file, and open any other image.

    Args:
        data: content of a file.

    Returns:
        The bytes, or an image whose pixels are not decoded yet.

    Raises:
        SkipImageError: the bytes are no image.
    """
    if not data or image_extension(data) is not None:
        return data
    return open_image(data, max_pixels=sys.maxsize, any_format=True).image
