"""Make shards of a folder of images, or of other sources: plan which image goes where, then write in parallel.

The plan depends on names and sizes only, so that any number of workers writes the same shards. Images are ordered by
the hash of their name (path, or number): each shard is a fair mixture of them all.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from math import ceil, floor
from pathlib import Path

from PIL import Image

from hjepa_data.errors import DataError, refuse
from hjepa_data.shards.index import index_path
from hjepa_data.shards.pool import map_in_order
from hjepa_data.shards.write import ShardWriter, encode_png
from hjepa_data.sources.base import Source
from hjepa_data.sources.files import FileSource
from hjepa_data.sources.layout import digest_of, read_layout
from hjepa_data.sources.mixture import MixtureSource
from hjepa_data.transforms.decode import SkipImageError, SkipReason, check_max_pixels, open_image

__all__ = ["Encoding", "MakeConfig", "MakePlan", "MakeResult", "make_shards", "plan_folder", "plan_sources"]

_CLASS_LIST = "classes.json"
_SHARD = re.compile(r"(.+)-\d{6,}\.tar")
_TAR_BLOCK = 512
_SIZE_UNKNOWN = 1 << 62
_MAX_QUALITY = 100
_MEASURED = 64


class Encoding(StrEnum):
    """How images are stored."""

    KEEP = "keep"
    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"


@dataclass(kw_only=True, slots=True)
class MakeConfig:
    """How images become shards.

    Attributes:
        shard_bytes: size of a shard, bytes (of the source files, if they are resized; estimated from some of the
            images where they lie in no files).
        samples_per_shard: samples of a shard; overrides ``shard_bytes``.
        workers: processes that write.
        resize: longest allowed shorter side, pixels; larger images are re-encoded. None copies every byte.
        encoding: format of every image; ``keep`` copies the bytes of a JPEG, PNG or WebP that needs no resizing.
        quality: of the images that are re-encoded as JPEG or WebP, 1 to 100.
        val_fraction: part of the images that goes to ``val-*.tar``, chosen by the hash of the name; 0 where the images
            have splits of their own.
        labels: whether there are class numbers: the first folder level names the class; None finds out.
        check: decode every image, so that damaged ones are left out now and not in each epoch.
        overwrite: replace shards of the same names.
        max_pixels: images with more pixels are left out.
    """

    shard_bytes: int = 256 << 20
    samples_per_shard: int | None = None
    workers: int = 1
    resize: int | None = None
    encoding: Encoding = Encoding.KEEP
    quality: int = 92
    val_fraction: float = 0.0
    labels: bool | None = None
    check: bool = True
    overwrite: bool = False
    max_pixels: int = 89_478_485

    def __post_init__(self) -> None:
        check_max_pixels(self.max_pixels)
        for name in ("shard_bytes", "workers"):
            if getattr(self, name) < 1:
                refuse(name, getattr(self, name), "too small", "allowed: 1 and more")
        for name in ("samples_per_shard", "resize"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                refuse(name, getattr(self, name), "too small", "allowed: 1 and more")
        if self.encoding not in set(Encoding):
            refuse("encoding", str(self.encoding), "no such format", f"allowed: {', '.join(Encoding)}")
        if not 1 <= self.quality <= _MAX_QUALITY:
            refuse("quality", self.quality, "no quality", "allowed: 1 to 100")
        if not 0 <= self.val_fraction < 1:
            refuse("val_fraction", self.val_fraction, "no fraction", "allowed: 0 up to, but not, 1")


@dataclass(slots=True)
class _Image:
    index: int
    key: str
    label: int | None
    size: int


@dataclass(slots=True)
class _Shard:
    split: str
    number: int
    images: list[_Image]


@dataclass(slots=True)
class MakePlan:
    """Which image goes where.

    Attributes:
        source: where the images lie.
        shards: what each shard is to hold.
        classes: names of the classes by number; empty without labels.
        left_out: files that are left out already, by reason.
        splits: names of the splits.
    """

    source: Source
    shards: list[_Shard]
    classes: list[str]
    left_out: Counter[str]
    splits: list[str]

    @property
    def num_images(self) -> int:
        """Images that will be read."""
        return sum(len(shard.images) for shard in self.shards)


@dataclass(slots=True)
class MakeResult:
    """What was written.

    Attributes:
        shards: paths by split.
        images: images by split.
        num_bytes: size of the shards by split.
        left_out: files that were left out, by reason.
        examples: one file for each of these reasons.
        classes: names of the classes.
    """

    shards: dict[str, list[Path]] = field(default_factory=dict)
    images: Counter[str] = field(default_factory=Counter)
    num_bytes: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)


def plan_folder(folder: Path, config: MakeConfig) -> MakePlan:
    """Decide which file goes where.

    Args:
        folder: flat, one folder a class, or either of them below ``train`` and ``test``.
        config: how.

    Returns:
        The plan.

    Raises:
        DataError: no such folder, no image in it, it has splits and there is to be another, or a split gets no image.
    """
    layout = read_layout(folder, labels=config.labels)
    if layout.by_split:
        _refuse_fraction(config, sorted({name.partition("/")[0] for name in layout.names}))
    source = FileSource(layout.names, layout.labels, root=str(folder))
    planner = _Planner(config, layout.left_out)
    for index, name in enumerate(layout.names):
        split = name.partition("/")[0] if layout.by_split else None
        label = source.labels.item(index) if layout.classes else None
        planner.add(index, name, split, _key(layout.inner(name)), label, source.size_of(index))
    return planner.plan(source, layout.classes)


def plan_sources(sources: Mapping[str, Source], classes: Sequence[str], config: MakeConfig) -> MakePlan:
    """Decide which image goes where.

    Args:
        sources: by the names of their splits; of several, each keeps its split.
        classes: names of the classes by number, or nothing.
        config: how.

    Returns:
        The plan.

    Raises:
        DataError: there are several splits, and there is to be another, or a split gets no image.
    """
    if len(sources) > 1:
        _refuse_fraction(config, list(sources))
    whole = MixtureSource(list(sources.values()))
    planner = _Planner(config, Counter())
    first = 0
    for split, source in sources.items():
        size = _mean_size(source, config)
        for number, label in enumerate(source.labels.tolist()):
            key = f"{number:09d}"
            name, own = (f"{split}/{key}", split) if len(sources) > 1 else (key, None if config.val_fraction else split)
            planner.add(
                first + number, name, own, key, label if label >= 0 and config.labels is not False else None, size
            )
        first += len(source)
    return planner.plan(whole, list(classes) if config.labels is not False else [])


def _refuse_fraction(config: MakeConfig, splits: list[str]) -> None:
    if config.val_fraction:
        raise DataError(
            f"val_fraction={config.val_fraction}: the images have the splits {', '.join(splits)}, which are kept; "
            "allowed: 0, or give one of them alone"
        )


def _mean_size(source: Source, config: MakeConfig) -> int:
    """Mean size of some evenly spaced images as they are written, bytes."""
    sizes = []
    for place in range(min(_MEASURED, len(source))):
        try:
            sizes.append(len(_encoded(source.read(place * len(source) // min(_MEASURED, len(source))).image, config)))
        except (SkipImageError, DataError):
            continue
    return sum(sizes) // max(1, len(sizes))


class _Planner:
    """Gathers images and deals them to shards."""

    def __init__(self, config: MakeConfig, left_out: Counter[str]) -> None:
        self._config = config
        self._left_out = left_out
        self._by_split: dict[str, list[tuple[bytes, _Image]]] = {}
        self._keys: Counter[str] = Counter()

    def add(self, index: int, name: str, split: str | None, key: str, label: int | None, size: int) -> None:
        """Add an image: by its name it is ordered and, without a split of its own, split."""
        digest = digest_of(name)
        split = split or _split_of(digest, self._config.val_fraction)
        self._keys[f"{split}/{key}"] += 1
        if self._keys[f"{split}/{key}"] > 1:
            key = f"{key}_{digest.hex()[:8]}"
        self._by_split.setdefault(split, []).append((digest, _Image(index, key, label, size)))

    def plan(self, source: Source, classes: list[str]) -> MakePlan:
        """Cut the images of each split into shards."""
        self._check_fraction()
        # Train on the first, evaluate on the second.
        splits = sorted(self._by_split, key=lambda name: (not name.startswith("train"), name.startswith("test"), name))
        shards = [
            _Shard(split, place, images)
            for split in splits
            for place, images in enumerate(
                _cut([image for _, image in sorted(self._by_split[split], key=lambda e: e[0])], self._config)
            )
        ]
        return MakePlan(source, shards, classes, self._left_out, splits)

    def _check_fraction(self) -> None:
        """Refuse a fraction that leaves either split without an image."""
        fraction = self._config.val_fraction
        if not fraction or len(self._by_split) > 1:
            return
        (images,) = self._by_split.values()
        places = [_place_of(digest) for digest, _ in images]
        if "val" in self._by_split:
            missing, allowed = "train", f"at most {floor(max(places) * 1000) / 1000}"
        else:
            missing, allowed = "val", f"at least {ceil(min(places) * 1000) / 1000}"
        raise DataError(
            f"val_fraction={fraction}: the hash of its name puts none of the {len(places)} images into {missing}; "
            f"allowed: {allowed} for these images, or 0 for no split"
        )


def make_shards(
    plan: MakePlan, out: Path, config: MakeConfig, progress: Callable[[int], None] = lambda _: None
) -> MakeResult:
    """Write the shards of a plan.

    Args:
        plan: what goes where.
        out: folder of the shards; made if missing.
        config: how.
        progress: called with the number of files dealt with since the last call; first with 0, once the workers run.

    Returns:
        What was written.

    Raises:
        DataError: there are such shards already, or those of other splits and other classes, or every image is damaged.
    """
    out.mkdir(parents=True, exist_ok=True)
    _clear(plan, out, config.overwrite)
    result = MakeResult(classes=plan.classes, left_out=plan.left_out.copy())
    if plan.classes:
        (out / _CLASS_LIST).write_text(_class_list(plan.classes), encoding="utf-8")
    write = partial(_write_shard, source=plan.source, out=out, config=config)
    for shard, path, written, left_out in map_in_order(
        write, plan.shards, workers=config.workers, started=lambda: progress(0)
    ):
        for file, reason in left_out:
            result.left_out[reason] += 1
            result.examples.setdefault(reason, file)
        if written:
            result.shards.setdefault(shard.split, []).append(path)
            result.images[shard.split] += written
            result.num_bytes[shard.split] += path.stat().st_size
        progress(len(shard.images))
    for paths in result.shards.values():
        paths.sort()
    if not result.images:
        raise DataError(
            "every image is damaged: " + ", ".join(f"{n} {reason}" for reason, n in result.left_out.most_common())
        )
    return result


_Written = tuple[_Shard, Path, int, list[tuple[str, str]]]


def _write_shard(shard: _Shard, source: Source, out: Path, config: MakeConfig) -> _Written:
    left_out: list[tuple[str, str]] = []
    written = 0
    with ShardWriter(out, prefix=shard.split, max_bytes=_SIZE_UNKNOWN, first=shard.number) as writer:
        for image in shard.images:
            try:
                data = _encoded(source.read(image.index).image, config)
            except SkipImageError as skip:
                left_out.append((source.locate(image.index), str(skip.reason)))
            except DataError:
                left_out.append((source.locate(image.index), "unreadable"))
            else:
                writer.write(data, label=image.label, key=image.key)
                written += 1
    return shard, out / f"{shard.split}-{shard.number:06d}.tar", written, left_out


def _encoded(image: bytes | Image.Image, config: MakeConfig) -> bytes:
    """Give an image as it goes into the shard: its own bytes, unless it must be resized or its format is not read."""
    upright = open_image(image, max_pixels=config.max_pixels)
    data = image if isinstance(image, bytes) else encode_png(upright.decode(1.0))
    if data is not image:
        upright = open_image(data, max_pixels=config.max_pixels)
    # Phones store several pictures in one JPEG, which Pillow calls MPO.
    kind = upright.image.format if upright.image.format in {"PNG", "WEBP"} else "JPEG"
    wanted = kind if config.encoding == Encoding.KEEP else config.encoding.upper()
    shorter = min(upright.width, upright.height)
    if config.resize is not None and shorter > config.resize:
        factor = shorter / config.resize
        size = (max(1, round(upright.width / factor)), max(1, round(upright.height / factor)))
        small = upright.decode(factor / 2).resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
        return _encode(small, "JPEG" if config.encoding == Encoding.KEEP and kind == "WEBP" else wanted, config.quality)
    if wanted != kind:
        return _encode(upright.decode(1.0), wanted, config.quality)
    if config.check:
        # The smallest scale still reads all of the file.
        upright.decode(8.0)
    return data


def _encode(image: Image.Image, kind: str | None, quality: int) -> bytes:
    if kind == "PNG":
        return encode_png(image)
    buffer = io.BytesIO()
    try:
        image.save(buffer, format=kind, quality=quality)
    except (OSError, ValueError):
        # A JPEG has sides of up to 65,500 pixels, a WebP of up to 16,383.
        raise SkipImageError(SkipReason.TOO_LARGE) from None
    return buffer.getvalue()


def _class_list(classes: list[str]) -> str:
    return json.dumps(classes, indent=1, ensure_ascii=False) + "\n"


def _key(name: str) -> str:
    # A tar reader replaces bytes that are no UTF-8: two such names would become one key.
    text = os.fsencode(os.path.splitext(name)[0]).decode("utf-8", "backslashreplace")
    return text.replace(".", "_").replace(" ", "_")


def _split_of(digest: bytes, val_fraction: float) -> str:
    return "val" if _place_of(digest) < val_fraction else "train"


def _place_of(digest: bytes) -> float:
    """Place in [0, 1] by which an image is told to be of train or val."""
    # The last bytes, since the first ones order the files.
    return int.from_bytes(digest[8:], "big") / 2.0**64


def _cut(images: list[_Image], config: MakeConfig) -> Iterator[list[_Image]]:
    if config.samples_per_shard is not None:
        for first in range(0, len(images), config.samples_per_shard):
            yield images[first : first + config.samples_per_shard]
        return
    sizes = [_size_in_tar(image) for image in images]
    total = sum(sizes)
    # Equal shards, of about the size, rather than full ones and a small last one.
    limit = total / -(-total // config.shard_bytes)
    shard: list[_Image] = []
    number, size = 1, 0
    for image, more in zip(images, sizes, strict=True):
        shard.append(image)
        size += more
        if size >= limit * number:
            yield shard
            shard, number = [], number + 1
    if shard:
        yield shard


def _size_in_tar(image: _Image) -> int:
    blocks = -(-image.size // _TAR_BLOCK) + 1 + (0 if image.label is None else 2)
    return blocks * _TAR_BLOCK


def _clear(plan: MakePlan, out: Path, overwrite: bool) -> None:
    shards = [(found[1], path) for path in sorted(out.iterdir()) if (found := _SHARD.fullmatch(path.name))]
    old = [path for split, path in shards if split in plan.splits]
    if old and not overwrite:
        raise DataError(f"'{out}' holds shards already, such as '{old[0].name}'; give another folder, or --overwrite")
    others = [path for split, path in shards if split not in plan.splits]
    # Splits may be written one after the other; but what replaces a split may have taken in the images of another.
    if old and others:
        raise DataError(
            f"'{out}' also holds '{others[0].name}', of a split that is not written now and may hold the same images; "
            "remove it, or give another folder"
        )
    classes = out / _CLASS_LIST
    if (
        others
        and plan.classes
        and classes.is_file()
        and classes.read_text(encoding="utf-8") != _class_list(plan.classes)
    ):
        raise DataError(
            f"'{out}' also holds '{others[0].name}', of a split with other classes ('{classes}'); give another folder"
        )
    if old:
        classes.unlink(missing_ok=True)
    for path in old:
        index_path(path).unlink(missing_ok=True)
        path.unlink()
