"""The index of a shard: where the image of each sample lies in the tar, so that any sample is one read away.

The writer leaves the index beside its shard, in ``<shard>.index.json``. A shard without one, or whose size or time
disagrees, is scanned: 512 bytes a member, without reading the images.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hjepa_data.errors import DataError

__all__ = ["IMAGE_EXTENSIONS", "Member", "ShardIndex", "index_path", "index_shard", "scan_tar", "write_index"]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

_FORMAT = "hjepa-shard-index-1"
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_MAX_LABEL_BYTES = 64

Int64Array = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(kw_only=True, slots=True)
class Member:
    """One file in a tar.

    Attributes:
        name: its path in the tar.
        offset: byte at which its content starts.
        size: bytes of content.
    """

    name: str
    offset: int
    size: int


@dataclass(kw_only=True, slots=True)
class ShardIndex:
    """Where the samples of one shard lie.

    Attributes:
        keys: name of each sample, [n].
        offsets: byte at which its image starts, [n].
        sizes: bytes of its image, [n].
        labels: class number from its ``cls`` member, -1 where there is none or it is no integer, [n].
    """

    keys: list[str]
    offsets: Int64Array
    sizes: Int64Array
    labels: Int64Array

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(slots=True)
class _Sample:
    offset: int = -1
    size: int = 0
    label: int = -1


def index_path(shard: Path) -> Path:
    """Name the file that holds the index of a shard."""
    return shard.with_name(shard.name + ".index.json")


def index_shard(shard: Path, *, allow_truncated: bool = False) -> ShardIndex:
    """Read the index of a shard, or scan the shard if there is none that fits.

    Args:
        shard: a tar file.
        allow_truncated: keep the complete samples of a tar that is cut off, instead of refusing it.

    Returns:
        The index of its samples that have an image.

    Raises:
        DataError: the shard is missing, damaged, cut off, or holds no image.
    """
    stored = _read_index(shard)
    if stored is not None:
        return stored
    return scan_shard(shard, allow_truncated=allow_truncated)


def _read_index(shard: Path) -> ShardIndex | None:
    path = index_path(shard)
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
        stat = os.stat(shard)
        # Whole seconds: copies keep no more than that.
        if (raw["format"], raw["size"], raw["mtime"]) != (_FORMAT, stat.st_size, int(stat.st_mtime)):
            return None
        columns = [np.asarray(raw[name], dtype=np.int64) for name in ("offsets", "sizes", "labels")]
        index = ShardIndex(
            keys=[str(key) for key in raw["keys"]], offsets=columns[0], sizes=columns[1], labels=columns[2]
        )
    except (OSError, ValueError, KeyError, TypeError):
        # An index only saves time: whatever is wrong with it, the shard itself knows better.
        return None
    lengths = {len(index.keys), *(column.shape for column in columns)} - {(len(index.keys),)}
    inside = (
        len(index) > 0 and int(index.offsets.min()) >= _BLOCK and int((columns[0] + columns[1]).max()) <= stat.st_size
    )
    return index if lengths == {len(index.keys)} and inside else None


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
    stat = os.stat(shard)
    content = {
        "format": _FORMAT,
        "size": stat.st_size,
        "mtime": int(stat.st_mtime),
        "keys": index.keys,
        "offsets": index.offsets.tolist(),
        "sizes": index.sizes.tolist(),
        "labels": index.labels.tolist(),
    }
    path = index_path(shard)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, separators=(",", ":")))
    os.replace(temporary, path)
    return index


def scan_shard(shard: Path, *, allow_truncated: bool = False) -> ShardIndex:
    """Build the index of a shard from the headers of its tar.

    Args:
        shard: a tar file.
        allow_truncated: keep the complete samples of a tar that is cut off, instead of refusing it.

    Returns:
        The index of its samples that have an image; of several images of a sample the first counts.

    Raises:
        DataError: the shard is missing, damaged, cut off, or holds no image.
    """
    try:
        file = os.open(shard, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"shard '{shard}' cannot be opened: {error.strerror}") from None
    try:
        members, problem = scan_tar(file)
        samples = _group(file, members)
    finally:
        os.close(file)
    found = {key: sample for key, sample in samples.items() if sample.offset >= 0}
    if problem and not allow_truncated:
        raise DataError(
            f"shard '{shard}' {problem}; {len(found)} complete samples precede it; copy or make it again, or allow "
            "truncated shards to use those"
        )
    if not found:
        raise DataError(
            f"shard '{shard}' holds no image among its {len(members)} members; images are named "
            f"<key>.{'|'.join(IMAGE_EXTENSIONS)}"
        )
    rows = np.array([(s.offset, s.size, s.label) for s in found.values()], dtype=np.int64)
    return ShardIndex(keys=list(found), offsets=rows[:, 0].copy(), sizes=rows[:, 1].copy(), labels=rows[:, 2].copy())


def _group(file: int, members: list[Member]) -> dict[str, _Sample]:
    samples: dict[str, _Sample] = {}
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not dot or not stem:
            continue
        sample = samples.setdefault(folder + slash + stem, _Sample())
        kind = extension.rpartition(".")[2].lower()
        if kind in IMAGE_EXTENSIONS and sample.offset < 0:
            sample.offset, sample.size = member.offset, member.size
        elif extension == "cls" and member.size <= _MAX_LABEL_BYTES:
            text = os.pread(file, member.size, member.offset).strip()
            sample.label = int(text) if text.isdigit() else -1
    return samples


def scan_tar(file: int) -> tuple[list[Member], str | None]:
    """List the regular files of a tar by its headers.

    Args:
        file: an open file descriptor.

    Returns:
        The complete members, and what is wrong with the tar (None if it is whole).
    """
    end = os.fstat(file).st_size
    members: list[Member] = []
    position = 0
    override: dict[str, str] = {}
    while True:
        header = os.pread(file, _BLOCK, position)
        if len(header) < _BLOCK:
            return members, f"is truncated at byte {end}: the end mark of the tar is missing"
        if header == _ZEROS:
            return members, None
        if not _checksum_fits(header):
            return members, f"is damaged at byte {position}: that is no tar header"
        size = int(override["size"]) if "size" in override else _number(header[124:136])
        content = position + _BLOCK
        if content + size > end:
            name = override.get("path") or _name(header)
            return members, f"is truncated at byte {end}: member '{name}' should end at byte {content + size}"
        kind = header[156:157]
        if kind == b"x":
            override |= _pax(os.pread(file, size, content))
        elif kind == b"L":
            override["path"] = os.pread(file, size, content).rstrip(b"\0").decode("utf-8", "replace")
        elif kind in {b"0", b"\0"}:
            members.append(Member(name=override.get("path") or _name(header), offset=content, size=size))
            override = {}
        elif kind not in {b"g", b"K"}:
            override = {}
        position = content + (size + _BLOCK - 1) // _BLOCK * _BLOCK


def _checksum_fits(header: bytes) -> bool:
    try:
        stated = _number(header[148:156])
    except ValueError:
        return False
    return stated == sum(header[:148]) + 8 * 32 + sum(header[156:])


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    return int(field.strip(b"\0 ") or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:262] == b"ustar" and header[262:263] == b"\0":
        prefix = header[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "replace")


def _pax(content: bytes) -> dict[str, str]:
    found: dict[str, str] = {}
    while content:
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or int(length) == 0:
            break
        record, content = content[: int(length)], content[int(length) :]
        key, _, value = record[len(length) + 1 : -1].decode("utf-8", "replace").partition("=")
        found[key] = value
    return {key: found[key] for key in ("path", "size") if key in found}
