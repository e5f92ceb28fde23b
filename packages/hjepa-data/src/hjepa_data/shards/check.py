"""Check shards: read every byte, decode every image, compare with the index.

Nothing but images and class numbers is decoded. Members that hold pickles are counted and never opened.
"""

from __future__ import annotations

import io
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from PIL import Image

from hjepa_data.errors import one_line, refuse
from hjepa_data.shards.index import (
    IMAGE_EXTENSIONS,
    Sample,
    ShardIndex,
    StoredIndex,
    group_members,
    load_index,
    sha256_of,
)
from hjepa_data.shards.pool import map_in_order
from hjepa_data.shards.tar import Member, scan_tar
from hjepa_data.transforms.decode import SkipImageError, SkipReason, check_max_pixels, open_image

__all__ = ["PICKLES", "CheckConfig", "Damage", "ShardReport", "check_shard", "check_shards"]

PICKLES = frozenset({"pkl", "pickle", "pyd", "pth", "pt", "joblib", "dill", "npy", "npz"})

_CHUNK = 1 << 20
_PNG = b"\x89PNG\r\n\x1a\n"
_SHOWN = 3


@dataclass(kw_only=True, slots=True)
class CheckConfig:
    """What counts as damage.

    Attributes:
        workers: processes that check.
        max_pixels: an image of more pixels is damage, and is not decoded.
        max_image_bytes: so is a longer image file.
    """

    workers: int = 1
    max_pixels: int = 89_478_485
    max_image_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        check_max_pixels(self.max_pixels)
        for name in ("workers", "max_image_bytes"):
            if getattr(self, name) < 1:
                refuse(name, getattr(self, name), "too small", "allowed: 1 and more")


@dataclass(kw_only=True, slots=True)
class Damage:
    """One damaged thing.

    Attributes:
        shard: where it lies.
        member: its name in the tar; empty for the shard as a whole.
        kind: short word to count it by.
        what: what is wrong, in one line.
    """

    shard: Path
    member: str
    kind: str
    what: str

    def __str__(self) -> str:
        return one_line(f"{self.shard}: {self.member or '(shard)'}: {self.what}")


@dataclass(kw_only=True, slots=True)
class ShardReport:
    """What a check found in one shard.

    Attributes:
        shard: path.
        num_bytes: size.
        members: files in the tar.
        images: images that were read.
        labelled: samples with a class number.
        pickles: members that may hold pickles; they were not opened.
        checksums: whether an index with checksums was there to compare with.
        index: ``fits``, ``none``, ``stale`` (other time or size than the shard: streams scan it) or ``damaged``.
        damage: what is wrong.
    """

    shard: Path
    num_bytes: int = 0
    members: int = 0
    images: int = 0
    labelled: int = 0
    pickles: int = 0
    checksums: bool = False
    index: str = "none"
    damage: list[Damage] = field(default_factory=list)

    def add(self, member: str, kind: str, what: str) -> None:
        """Note one damaged thing."""
        self.damage.append(Damage(shard=self.shard, member=member, kind=kind, what=what))

    @property
    def damaged_members(self) -> int:
        """Members with any damage."""
        return len({damage.member for damage in self.damage if damage.member})


def check_shards(
    shards: Sequence[Path], config: CheckConfig, started: Callable[[], None] = lambda: None
) -> Iterator[ShardReport]:
    """Check shards in several processes.

    Args:
        shards: tar files, as ``expand_shards`` names them.
        config: how.
        started: called when the processes run.

    Yields:
        A report of each, in their order.
    """
    yield from map_in_order(partial(check_shard, config=config), shards, workers=config.workers, started=started)


def check_shard(shard: Path, config: CheckConfig) -> ShardReport:
    """Read all of a shard.

    Args:
        shard: a tar file.
        config: what counts as damage.

    Returns:
        What was found; it does not raise for damage.
    """
    report = ShardReport(shard=shard)
    try:
        file = os.open(shard, os.O_RDONLY)
    except OSError as error:
        report.add("", "unreadable", f"cannot be opened: {error.strerror}")
        return report
    try:
        _check(file, report, config)
    except OSError as error:
        report.add("", "unreadable", f"cannot be read to its end: {error.strerror}")
    finally:
        os.close(file)
    return report


def _check(file: int, report: ShardReport, config: CheckConfig) -> None:
    stat = os.fstat(file)
    report.num_bytes = stat.st_size
    stored = _stored(report)
    members, problem, end = scan_tar(file)
    if problem:
        report.add("", "tar", f"{problem}; {len(members)} complete members precede it")
    elif _has_content(file, end, stat.st_size):
        report.add("", "tar", f"has content behind the end mark at byte {end}, which no reader sees")
    report.members = len(members)
    report.pickles = sum(_ending(member) in PICKLES for member in members)
    samples = group_members(file, members)
    found = {key: sample for key, sample in samples.items() if sample.offset >= 0}
    report.labelled = sum(sample.label >= 0 for sample in found.values())
    if not found:
        report.add("", "no image", f"holds no image among its {len(members)} members")
    for name, count in Counter(member.name for member in members).items():
        if count > 1:
            report.add(name, "repeated", f"occurs {count} times, of which a reader takes one")
    sums = {} if stored is None else _check_index(stored, found, report)
    if stored is not None:
        fits = stored.stamp == (stat.st_size, int(stat.st_mtime))
        report.index = "fits" if fits else "stale"
        report.checksums = stored.index.sha256 is not None
        if stored.index.sha256 is not None:
            actual = sha256_of(report.shard)
            if actual != stored.index.sha256:
                report.add("", "sha256", f"has sha256 {actual[:16]}..., its index says {stored.index.sha256[:16]}...")
    first = {sample.offset: key for key, sample in found.items()}
    for member in members:
        ending = _ending(member)
        if member.link and ending in {*IMAGE_EXTENSIONS, "cls"}:
            what = "is a link, which no reader follows; make the tar of the files themselves: tar -h --hard-dereference"
            report.add(member.name, "link", what)
        elif ending in IMAGE_EXTENSIONS:
            report.images += 1
            _check_image(file, member, sums.get(first.get(member.offset, "")), report, config)


def _stored(report: ShardReport) -> StoredIndex | None:
    try:
        return load_index(report.shard)
    except ValueError as error:
        report.add("", "index", f"its index {error}")
    except OSError as error:
        report.add("", "index", f"its index cannot be read: {error.strerror}")
    report.index = "damaged"
    return None


def _check_index(stored: StoredIndex, found: dict[str, Sample], report: ShardReport) -> dict[str, int]:
    """Compare the rows of an index with the tar; the checksums of the rows that agree are returned by key."""
    index: ShardIndex = stored.index
    rows = zip(index.keys, index.offsets.tolist(), index.sizes.tolist(), index.labels.tolist(), strict=True)
    by_key = {key: row for key, *row in rows}
    for key, sample in found.items():
        row = by_key.get(key)
        if row is None:
            report.add(sample.name, "index", "is missing from the index: streams that trust the index never see it")
        elif row != [sample.offset, sample.size, sample.label]:
            names = ("offset", "size", "label")
            pairs = zip(names, row, (sample.offset, sample.size, sample.label), strict=True)
            wrong = ", ".join(f"{name} {said}, not {true}" for name, said, true in pairs if said != true)
            report.add(sample.name, "index", f"is elsewhere than the index says: {wrong}")
    gone = [key for key in by_key if key not in found]
    if gone:
        shown = ", ".join(f"'{key}'" for key in gone[:_SHOWN]) + (", ..." if len(gone) > _SHOWN else "")
        report.add("", "index", f"lacks {len(gone)} of the {len(index)} samples of its index: {shown}")
    if index.crc32 is None:
        return {}
    sums = dict(zip(index.keys, index.crc32.tolist(), strict=True))
    return {key: sums[key] for key, s in found.items() if by_key.get(key) == [s.offset, s.size, s.label]}


def _check_image(file: int, member: Member, crc32: int | None, report: ShardReport, config: CheckConfig) -> None:
    if member.size > config.max_image_bytes:
        what = f"too large: {member.size:,} bytes, more than {config.max_image_bytes:,}"
        report.add(member.name, str(SkipReason.TOO_LARGE), what)
        return
    data = os.pread(file, member.size, member.offset)
    changed = "" if crc32 is None or zlib.crc32(data) == crc32 else "bytes differ from the checksum in the index"
    try:
        with warnings.catch_warnings():
            # Too many pixels for Pillow to be at ease with are not too many where the limit was raised.
            warnings.simplefilter("ignore")
            open_image(data, max_pixels=config.max_pixels).decode(1.0)
    except SkipImageError as skip:
        what = _SAID[skip.reason]
        if skip.reason == SkipReason.TOO_LARGE:
            what = f"{what}: {_size(data)} more than {config.max_pixels:,} pixels"
        report.add(member.name, str(skip.reason), "; ".join(filter(None, (what, changed))))
    except MemoryError:
        report.add(member.name, str(SkipReason.TOO_LARGE), "too large: memory does not suffice to decode it")
    else:
        if not _png_fits(data):
            what = "undecodable: a PNG that differs from its own checksums"
            report.add(member.name, str(SkipReason.UNDECODABLE), "; ".join(filter(None, (what, changed))))
        elif changed:
            report.add(member.name, "changed", f"{changed}, although it can be decoded")


_SAID = {
    SkipReason.EMPTY: "empty: 0 bytes",
    SkipReason.UNDECODABLE: "undecodable: no JPEG, PNG or WebP, or a damaged one",
    SkipReason.TRUNCATED: "truncated: the image ends too early",
    SkipReason.TOO_LARGE: "too large",
    SkipReason.UNKNOWN_RANGE: "unknown range: pixels are integers of 32 bits or floats",
}


def _png_fits(data: bytes) -> bool:
    """Compare the chunks of a PNG with their checksums, which Pillow passes over when it decodes pixels."""
    if not data.startswith(_PNG):
        return True
    position = len(_PNG)
    while position < len(data):
        head = data[position : position + 8]
        end = position + 8 + int.from_bytes(head[:4], "big")
        if zlib.crc32(memoryview(data)[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return False
        if head[4:] == b"IEND":
            return True
        position = end + 4
    return False


def _size(data: bytes) -> str:
    # Image.open refuses before it says the size; the format itself only reads its header.
    Image.preinit()
    for kind in ("JPEG", "PNG"):
        factory, accepts = Image.OPEN[kind]
        if accepts is not None and accepts(data[:16]):
            width, height = factory(io.BytesIO(data), "").size
            return f"{width:,} x {height:,} pixels,"
    return ""


def _ending(member: Member) -> str:
    return PurePosixPath(member.name).name.rpartition(".")[2].lower()


def _has_content(file: int, position: int, end: int) -> bool:
    while position < end:
        chunk = os.pread(file, _CHUNK, position)
        if not chunk:
            return False
        if chunk.count(0) != len(chunk):
            return True
        position += len(chunk)
    return False
