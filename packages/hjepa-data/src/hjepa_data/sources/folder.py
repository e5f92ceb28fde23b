"""A folder of images, read as it is."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import numpy as np

from hjepa_data.errors import DataError
from hjepa_data.sources.files import FileSource
from hjepa_data.sources.layout import digest_of, read_layout

__all__ = ["FolderSource"]


class FolderSource(FileSource):
    """The images of a folder, flat or with one folder a class, in the order of the hash of their names.

    So ``hjepa-shards make`` orders them, too: sample i is the i-th image of the shards that it would write. Any run of
    consecutive samples is a fair mixture of the folder.

    Args:
        folder: where; read once, now.
        labels: whether the first folder level names the class; None finds out.
        classes: names of the classes by number; None numbers those of this folder in the order of their names.
        group_size: files that count as one group.

    Raises:
        DataError: no such folder, no image in it, a class that is not in ``classes``, or it holds splits.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        labels: bool | None = None,
        classes: Sequence[str] | None = None,
        group_size: int | None = 1024,
    ) -> None:
        layout = read_layout(folder, labels=labels)
        if layout.by_split:
            splits = sorted({name.partition("/")[0] for name in layout.names})
            raise DataError(
                f"'{folder}' holds {', '.join(splits)}; give one of them: '{os.path.join(folder, splits[0])}'"
            )
        numbers = layout.labels
        if classes is not None and layout.classes:
            unknown = sorted(set(layout.classes) - set(classes))
            if unknown:
                raise DataError(
                    f"class folder '{unknown[0]}' of '{folder}' is none of the {len(classes)} classes given"
                )
            numbers = np.array([list(classes).index(name) for name in layout.classes], dtype=np.int64)[numbers]
        order = sorted(range(len(layout.names)), key=[digest_of(name) for name in layout.names].__getitem__)
        super().__init__(
            [layout.names[place] for place in order], numbers[order], root=os.fspath(folder), group_size=group_size
        )
        self.classes: list[str] = list(classes) if classes is not None else layout.classes
        self.left_out: Counter[str] = layout.left_out
