"""Images that lie in files, one each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from hjepa_data.errors import DataError
from hjepa_data.shards.columns import SharedArrays
from hjepa_data.shards.index import Int64Array
from hjepa_data.shards.source import RawSample
from hjepa_data.sources.base import group_sizes_of, raw_image

__all__ = ["FileSource"]


class FileSource:
    """Image files by their paths.

    Args:
        names: paths, relative to ``root``.
        labels: class number of each, -1 if unknown.
        root: folder of the files.
        group_size: consecutive files that count as one group; None makes one group of all, so that each epoch is
            shuffled as a whole.
    """

    def __init__(
        self, names: Sequence[str], labels: Int64Array, *, root: str = "", group_size: int | None = None
    ) -> None:
        encoded = [os.fsencode(name) for name in names]
        # A million strings would be copied into every worker, page by page, as their reference counts change.
        self._files = SharedArrays(
            names=np.frombuffer(bytearray(b"".join(encoded)), dtype=np.uint8),
            ends=np.cumsum([len(name) for name in encoded], dtype=np.int64),
            labels=labels,
        )
        self._root = os.fsencode(root)
        self.group_sizes: Int64Array = group_sizes_of(len(names), group_size)

    def __len__(self) -> int:
        return len(self._files["ends"])

    @property
    def labels(self) -> Int64Array:
        """Class number of each file, -1 if unknown, [len]."""
        return self._files["labels"]

    @property
    def identity(self) -> NDArray[np.uint8]:
        """The names of the files below their folder."""
        return self._files["names"]

    def read(self, index: int) -> RawSample:
        """Read one file.

        Args:
            index: its number in [0, len).

        Returns:
            Its bytes, or the image if it is no JPEG, PNG or WebP, and its label.

        Raises:
            DataError: the file cannot be read.
            SkipImageError: it is no image.
            IndexError: there is no such number.
        """
        try:
            with open(self._path(index), "rb", buffering=0) as file:
                data = file.read()
        except OSError as error:
            raise DataError(f"image '{self.locate(index)}' cannot be read: {error.strerror}") from None
        return RawSample(image=raw_image(data), label=self.labels.item(index))

    def read_ahead(self, groups: Iterable[int]) -> None:
        """Do nothing: files lie anywhere, so that reading a group of them at a time saves nothing."""

    def locate(self, index: int) -> str:
        """Give the path of a file, for messages."""
        return self._path(index).decode("utf-8", "backslashreplace")

    def size_of(self, index: int) -> int:
        """Give the size of a file, bytes."""
        return os.path.getsize(self._path(index))

    def close(self) -> None:
        """Do nothing: no file stays open."""

    def _path(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        ends = self._files["ends"]
        name = self._files["names"][ends.item(index - 1) if index else 0 : ends.item(index)]
        return os.path.join(self._root, name.tobytes())
