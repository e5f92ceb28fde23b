"""The layout of a folder of images: which of its files are images, of what class and what split."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from hjepa_data.errors import DataError
from hjepa_data.shards.index import Int64Array

__all__ = ["Layout", "digest_of", "find_files", "find_images", "read_layout"]

_log = logging.getLogger(__name__)

_EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
)
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "eval", "test"})


@dataclass(kw_only=True, slots=True)
class Layout:
    """What lies in a folder.

    Attributes:
        names: paths of the images, relative to the folder, with slashes; files before folders, each sorted.
        labels: class number of each, -1 without classes, [n].
        classes: names of the classes by number; empty without labels.
        by_split: whether the first folder of each name is a split, such as ``train``, and no class.
        left_out: other files, by reason, and folders that were not read.
    """

    names: list[str]
    labels: Int64Array
    classes: list[str]
    by_split: bool
    left_out: Counter[str]

    def inner(self, name: str) -> str:
        """Give a name without its split."""
        return name.partition("/")[2] if self.by_split else name


def read_layout(folder: str | os.PathLike[str], *, labels: bool | None = None) -> Layout:
    """Look for the images in a folder.

    Args:
        folder: flat, one folder a class, or either of them below folders such as ``train`` and ``test``.
        labels: whether the first folder level (below the splits) names the class; None finds out.

    Returns:
        Its layout. Classes are numbered in the order of their names.

    Raises:
        DataError: no such folder, no image in it, or images outside of class folders although there are to be labels.
    """
    if not os.path.isdir(folder):
        raise DataError(f"no such folder '{folder}'" + (": it is a file" if os.path.exists(folder) else ""))
    left_out: Counter[str] = Counter()
    names = list(find_images(os.fspath(folder), left_out))
    if not names:
        reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.most_common()) or "it is empty"
        raise DataError(f"no image in '{folder}' ({reasons}); images are {', '.join(sorted(_EXTENSIONS))} files")
    by_split = all("/" in name and name.partition("/")[0] in _SPLITS for name in names)
    layout = Layout(names=names, labels=np.empty(0, np.int64), classes=[], by_split=by_split, left_out=left_out)
    inner = [layout.inner(name) for name in names]
    nested = all("/" in name for name in inner)
    if labels and not nested:
        raise DataError(
            f"'{folder}' has images outside of class folders; move them into one, or make shards without labels"
        )
    stray = [name for name in inner if "/" not in name]
    if labels is None and 0 < len(stray) < len(inner):
        _log.warning("no labels: %d images lie outside of class folders, such as '%s'", len(stray), stray[0])
    found = [name.partition("/")[0] for name in inner] if (nested if labels is None else labels) else []
    # Names that are no UTF-8 could be neither written nor drawn.
    shown = {name: os.fsencode(name).decode("utf-8", "backslashreplace") for name in set(found)}
    layout.classes = sorted(set(shown.values()))
    number = {text: place for place, text in enumerate(layout.classes)}
    layout.labels = np.array([number[shown[name]] for name in found] or [-1] * len(names), dtype=np.int64)
    return layout


def find_images(folder: str, left_out: Counter[str]) -> Iterator[str]:
    """List the image files below a folder: `find_files` for images."""
    return find_files(folder, _EXTENSIONS, left_out, other="not an image")


def find_files(folder: str, endings: Collection[str], left_out: Counter[str], *, other: str) -> Iterator[str]:
    """List the files below a folder whose names end so; hidden files and folders are left out.

    Args:
        folder: where; links are followed, each folder is read once.
        endings: such as ".jpg", in lower case; names may have them in upper case.
        left_out: other files are counted here, by reason, and folders that are not read.
        other: the reason for files of other endings.

    Yields:
        Their paths relative to the folder, with slashes: files before folders, each sorted.

    Raises:
        DataError: a folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        where = os.path.join(folder, prefix) if prefix else folder
        files: list[str] = []
        folders: list[str] = []
        try:
            stat = os.stat(where)
            if (stat.st_dev, stat.st_ino) in seen:
                # A link leads back to it.
                left_out["folder read already"] += 1
                continue
            seen.add((stat.st_dev, stat.st_ino))
            with os.scandir(where) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.is_dir() and not entry.name.startswith("."):
                        folders.append(entry.name)
                    elif reason := _reason(entry, endings, other):
                        left_out[reason] += 1
                    else:
                        files.append(entry.name)
        except OSError as error:
            raise DataError(f"{where}: the folder cannot be read ({error.strerror})") from None
        yield from (prefix + name for name in files)
        waiting += [f"{prefix}{name}/" for name in reversed(folders)]


def _reason(entry: os.DirEntry[str], endings: Collection[str], other: str) -> str | None:
    """Say why a file is left out."""
    if entry.name.startswith("."):
        return "hidden"
    if os.path.splitext(entry.name)[1].lower() not in endings:
        return other
    if not entry.is_file():
        return "broken link" if entry.is_symlink() else "not a file"
    return None


def digest_of(name: str) -> bytes:
    """Hash the name of a sample, 16 bytes: by it files are ordered and split."""
    return blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).digest()
