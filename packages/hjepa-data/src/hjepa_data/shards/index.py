"""The index of a shard: where the image of each sample lies in the tar, so that any sample is one read away.

The writer leaves the index beside its shard, in ``<shard>.index.json``: key, offset, size, label and checksum (crc32)
of each sample, their number, and the sha256 of the shard. A shard without an index, or whose size or time disagrees, is
scanned: 512 bytes a member, without reading the images.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from hjepa_data.errors import DataError
from hjepa_data.shards.tar import BLOCK, Member, scan_tar

__all__ = [
    "IMAGE_EXTENSIONS",
    "MAX_LABEL_BYTES",
    "IndexState",
    "ShardIndex",
    "group_members",
    "index_path",
    "index_shard",
    "load_index",
    "refresh_index",
    "scan_shard",
    "sha256_of",
    "write_index",
]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

_FORMAT = "hjepa-shard-index-1"
MAX_LABEL_BYTES = 18

Int64Array = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(kw_only=True, slots=True)
class ShardIndex:
    """Where the samples of one shard lie.

    Attributes:
        keys: name of each sample, [n].
        offsets: byte at which its image starts, [n].
        sizes: bytes of its image, [n].
        labels: class number from its ``cls`` member, -1 where there is none or it is no integer, [n].
        crc32: checksum of its image, [n]; None after a scan.
        sha256: checksum of the whole shard; None after a scan.
    """

    keys: list[str]
    offsets: Int64Array
    sizes: Int64Array
    labels: Int64Array
    crc32: Int64Array | None = None
    sha256: str | None = None

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(slots=True)
class Sample:
    """The members of one key.

    Attributes:
        offset: byte at which its image starts, -1 if it has none.
        size: bytes of its image.
        label: class number, -1 if unknown.
        name: name of the member that is its image.
        parted: whether the extension of that member has several parts, such as ``depth.png``.
    """

    offset: int = -1
    size: int = 0
    label: int = -1
    name: str = ""
    parted: bool = False


class IndexState(StrEnum):
    """What became of the index of a shard."""

    NEW = "new"
    KEPT = "kept"
    RENEWED = "renewed"


def index_path(shard: Path) -> Path:
    """Name the file that holds the index of a shard."""
    return shard.with_name(shard.name + ".index.json")


def sha256_of(shard: Path) -> str:
    """Compute the checksum of a file.

    Args:
        shard: the file.

    Returns:
        The sha256 of its bytes, in hexadecimal digits.
    """
    with open(shard, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def index_shard(shard: Path, *, allow_truncated: bool = False, verify: bool = False) -> ShardIndex:
    """Read the index of a shard, or scan the shard if there is none that fits.

    Args:
        shard: a tar file.
        allow_truncated: keep the complete samples of a tar that is cut off, instead of refusing it.
        verify: read the whole shard and compare it with the sha256 of its index.

    Returns:
        The index of its samples that have an image.

    Raises:
        DataError: the shard is missing, damaged, cut off, holds no image, or is to be verified and has no checksum or
            another one.
    """
    if verify:
        _verify(shard)
    try:
        stored = load_index(shard)
        stat = os.stat(shard)
    except (OSError, ValueError):
        # An index only saves time: whatever is wrong with it, the shard itself knows better.
        stored = None
    # Whole seconds: copies keep no more than that.
    if stored is None or stored.stamp != (stat.st_size, int(stat.st_mtime)) or not len(stored.index):
        return scan_shard(shard, allow_truncated=allow_truncated)
    return stored.index


def _verify(shard: Path) -> None:
    try:
        stored = load_index(shard)
        expected = None if stored is None else stored.index.sha256
        found = sha256_of(shard)
    except ValueError as error:
        raise DataError(f"shard '{shard}' cannot be verified: its index {error}") from None
    except OSError as error:
        raise DataError(f"shard '{shard}' cannot be verified: {error.strerror}") from None
    if expected is None:
        raise DataError(f"shard '{shard}' has no checksum; 'hjepa-shards index {shard}' writes one")
    if found != expected:
        raise DataError(
            f"shard '{shard}' is not what was indexed: sha256 {found[:12]}..., but {expected[:12]}... in its index; "
            f"'hjepa-shards check {shard}' names the damage"
        )


@dataclass(slots=True)
class StoredIndex:
    """An index as it lies beside its shard.

    Attributes:
        index: what it says.
        stamp: size in bytes, and time in whole seconds, of the shard that it was made from.
    """

    index: ShardIndex
    stamp: tuple[int, int]


def load_index(shard: Path) -> StoredIndex | None:
    """Read the index beside a shard, whether or not it fits the shard.

    Args:
        shard: a tar file; it is not read.

    Returns:
        What its index says, or None if it has none.

    Raises:
        ValueError: the index is no index.
        OSError: the index cannot be read.
    """
    try:
        text = index_path(shard).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        raw: dict[str, Any] = json.loads(text)
        if raw["format"] != _FORMAT:
            raise ValueError
        keys = [str(key) for key in raw["keys"]]
        # Indexes of the first writers have no checksums.
        names = ("offsets", "sizes", "labels", *(("crc32",) if "crc32" in raw else ()))
        columns = {name: np.asarray(raw[name], dtype=np.int64) for name in names}
        size, time = int(np.int64(raw["size"])), int(raw["mtime"])
        sha256 = raw.get("sha256")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ValueError("is damaged: that is no index of a shard") from None
    if {column.shape for column in columns.values()} != {(len(keys),)} or not isinstance(sha256, str | None):
        raise ValueError("is damaged: its columns have different lengths")
    offsets, sizes = columns["offsets"], columns["sizes"]
    # A sum of both could pass the end of 64 bits.
    if keys and not (offsets.min() >= BLOCK and sizes.min() >= 0 and (sizes <= size - offsets).all()):
        raise ValueError("is damaged: it points outside of the shard")
    return StoredIndex(ShardIndex(keys=keys, sha256=sha256, **columns), (size, time))


def refresh_index(shard: Path, *, overwrite: bool = False) -> tuple[ShardIndex, IndexState]:
    """Make sure that a shard has an index with checksums.

    An index that fits is kept as it is. A shard that differs from the checksum of its index is refused, since the index
    is what tells damage.

    Args:
        shard: a complete tar file.
        overwrite: index the shard as it is now, whatever its index says.

    Returns:
        The index, and what became of it.

    Raises:
        DataError: the shard is missing, damaged, cut off, holds no image, or differs from its checksum.
    """
    try:
        stored = load_index(shard)
    except (OSError, ValueError):
        return write_index(shard), IndexState.RENEWED
    if stored is None:
        return write_index(shard), IndexState.NEW
    if overwrite or stored.index.sha256 is None or stored.index.crc32 is None:
        return write_index(shard), IndexState.RENEWED
    try:
        stat = os.stat(shard)
        if stored.stamp == (stat.st_size, int(stat.st_mtime)):
            return stored.index, IndexState.KEPT
        changed = sha256_of(shard) != stored.index.sha256
    except OSError as error:
        raise DataError(f"shard '{shard}' cannot be opened: {error.strerror}") from None
    if changed:
        raise DataError(
            f"shard '{shard}' differs from the checksum of its index; copy it again if it is damaged, or --overwrite "
            "the index if it was made anew"
        )
    return write_index(shard), IndexState.RENEWED


def write_index(shard: Path) -> ShardIndex:
    """Scan a shard and write its index beside it.

    Args:
        shard: a complete tar file.

    Returns:
        The index that was written.

    Raises:
        DataError: the shard is missing, damaged, cut off, or holds no image.
    """
    index = scan_shard(shard)
    with open(shard, "rb") as file:
        # Before the content is read: a shard that changes meanwhile does not fit its index then.
        stat = os.fstat(file.fileno())
        index.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        sums = [
            zlib.crc32(os.pread(file.fileno(), size, offset))
            for offset, size in zip(index.offsets.tolist(), index.sizes.tolist(), strict=True)
        ]
    index.crc32 = np.array(sums, dtype=np.int64)
    content = {
        "format": _FORMAT,
        "size": stat.st_size,
        "mtime": int(stat.st_mtime),
        "sha256": index.sha256,
        "num_samples": len(index),
        "num_labelled": int((index.labels >= 0).sum()),
        "keys": index.keys,
        "offsets": index.offsets.tolist(),
        "sizes": index.sizes.tolist(),
        "labels": index.labels.tolist(),
        "crc32": sums,
    }
    path = index_path(shard)
    # Two processes may index the same shard.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return index


def scan_shard(shard: Path, *, allow_truncated: bool = False) -> ShardIndex:
    """Build the index of a shard from the headers of its tar.

    Args:
        shard: a tar file.
        allow_truncated: keep the complete samples of a tar that is cut off, instead of refusing it.

    Returns:
        The index of its samples that have an image. Of several images of a sample the first counts, and before it the
        first whose extension has no other part: ``<key>.jpg`` rather than ``<key>.depth.png``.

    Raises:
        DataError: the shard is missing, damaged, cut off, or holds no image.
    """
    try:
        file = os.open(shard, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"shard '{shard}' cannot be opened: {error.strerror}") from None
    try:
        members, problem, _ = scan_tar(file)
        samples = group_members(file, members)
    except OSError as error:
        raise DataError(f"shard '{shard}' cannot be read: {error.strerror}") from None
    finally:
        os.close(file)
    found = {key: sample for key, sample in samples.items() if sample.offset >= 0}
    if problem and not allow_truncated:
        raise DataError(
            f"shard '{shard}' {problem}; {len(found)} complete samples precede it; copy or make it again, or allow "
            "truncated shards to use those"
        )
    if not found:
        link = next((f", such as the link '{member.name}'" for member in members if member.link), "")
        raise DataError(
            f"shard '{shard}' holds no image among its {len(members)} members{link}; images are files named "
            f"<key>.{'|'.join(IMAGE_EXTENSIONS)}"
        )
    rows = np.array([(s.offset, s.size, s.label) for s in found.values()], dtype=np.int64)
    return ShardIndex(keys=list(found), offsets=rows[:, 0].copy(), sizes=rows[:, 1].copy(), labels=rows[:, 2].copy())


def group_members(file: int, members: list[Member]) -> dict[str, Sample]:
    """Group members into samples by key: the path up to the first dot of the file name.

    Only images and class numbers count; nothing else is read, and no object is ever made of it; links are not followed.
    Where a key occurs again, its first image and its first class number count.

    Args:
        file: the tar, an open file descriptor.
        members: its members.

    Returns:
        Samples by key, in the order of the tar, those without an image included.
    """
    samples: dict[str, Sample] = {}
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not dot or not stem or member.link:
            continue
        sample = samples.setdefault(folder + slash + stem, Sample())
        extension = extension.lower()
        _, part, kind = extension.rpartition(".")
        if kind in IMAGE_EXTENSIONS and (sample.offset < 0 or (sample.parted and not part)):
            sample.offset, sample.size, sample.name, sample.parted = member.offset, member.size, member.name, bool(part)
        elif extension == "cls" and sample.label < 0 and member.size <= MAX_LABEL_BYTES:
            text = os.pread(file, member.size, member.offset).strip()
            sample.label = int(text) if text.isdigit() else -1
    return samples
