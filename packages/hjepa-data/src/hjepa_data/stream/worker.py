"""What a loader's worker does for one batch: read, decode, crop, count what had to be left out."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from hjepa_data.errors import DataError
from hjepa_data.shards.index import Int64Array
from hjepa_data.shards.source import RawSample
from hjepa_data.sources.base import Source
from hjepa_data.stream.batch import Batch
from hjepa_data.stream.gpu_decode import Decode, Encoded, is_plain_jpeg
from hjepa_data.stream.order import Order
from hjepa_data.transforms.crop import (
    NUMBERS_PER_CROP,
    CropPlan,
    Crops,
    Interpolation,
    Pixels,
    ViewGroup,
    center_crop,
    crop_numbers,
    crop_plans,
    cut_views,
)
from hjepa_data.transforms.decode import SMALLEST_SHRINK, SkipImageError, SkipReason, Upright, open_image

__all__ = ["EvalTasks", "Loaded", "TrainTasks", "UnreadablePolicy"]

# A longer run of damaged images is no accident.
MAX_REPLACEMENTS = 1000
_CROP = 3
# Pillow holds four bytes for each pixel; beside them an image costs about so much.
_BYTES_PER_PIXEL = 4
_BYTES_PER_IMAGE = 1024


class UnreadablePolicy(StrEnum):
    """What happens when a sample cannot be read because its shard is gone, cut off or cannot be fetched."""

    STOP = "stop"
    SKIP = "skip"


@dataclass(kw_only=True, slots=True)
class Loaded:
    """What comes back from a worker.

    Attributes:
        batch: the batch; None if the worker met an error.
        encoded: images that are missing in the views of the batch, to be decoded on the device; None if there are none.
        skipped: images that were left out, by reason.
        examples: where the first image of each reason lies.
        error: the one-line message of a data error.
    """

    batch: Batch | None = None
    encoded: Encoded | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    def leave_out(self, skip: SkipImageError, where: str) -> None:
        """Count an image that is left out."""
        reason = str(skip.reason)
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.examples.setdefault(reason, where if str(skip) == reason else str(skip))

    def pin_memory(self) -> Self:
        """Pin the batch; called by the loader. Decoders read encoded images from any memory."""
        if self.batch is not None:
            self.batch.pin_memory()
        return self


class TrainTasks(Dataset[Loaded]):
    """Batches of random views by their first global position.

    An image that is left out is counted at its own position, which shows the next good image of the order instead. What
    a position shows is so a pure function of the position, and of what can be read.

    Args:
        source: the samples.
        order: which sample stands where.
        groups: views of each image.
        count: images of a batch.
        seed: of the crops and flips.
        max_pixels: larger images are left out.
        cache_bytes: decoded pixels that are kept.
        unreadable: what happens to samples that cannot be read.
        decode: whether plain JPEGs are left encoded.
        max_replacements: images in a row that may be left out.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        groups: tuple[ViewGroup, ...],
        count: int,
        seed: int,
        max_pixels: int,
        cache_bytes: int = 0,
        unreadable: UnreadablePolicy = UnreadablePolicy.STOP,
        decode: Decode = Decode.CPU,
        max_replacements: int = MAX_REPLACEMENTS,
    ) -> None:
        self._source = source
        self._order = order
        self._groups = groups
        self._count = count
        self._seed = seed
        self._max_pixels = max_pixels
        self._cache: dict[int, Upright] = {}
        self._cache_left = cache_bytes
        self._unreadable = unreadable
        self._decode = decode
        self._max_replacements = max_replacements
        self._ahead: set[int] = set()

    def __getitem__(self, start: int) -> Loaded:
        """Load the batch whose first image stands at a position."""
        return self.load(start)

    def load(self, start: int, views: Sequence[torch.Tensor] | None = None) -> Loaded:
        """Load the batch whose first image stands at a position.

        Args:
            start: the position.
            views: where its pixels are written, or None for new memory.
        """
        try:
            self._read_ahead(start)
            return self._load(start, self._count, Encoded() if self._decode is Decode.GPU else None, views)
        except DataError as error:
            return Loaded(batch=None, error=str(error))

    def mend(self, loaded: Loaded, start: int, views: list[torch.Tensor], row: int) -> None:
        """Decode one row of a batch by Pillow after all, or replace it.

        Args:
            loaded: the batch; its numbers and counts are brought up to date.
            start: position of its first image.
            views: where the pixels go, on any device.
            row: which image.

        Raises:
            DataError: the sample cannot be read any more, or too many in a row are damaged.
        """
        assert loaded.batch is not None
        batch = loaded.batch
        alone = self._load(start + row, 1, None)
        assert alone.batch is not None
        if self._order.at(start + row)[1] == int(batch.sample[row]):
            # Else the worker has counted the image of this position already.
            for reason, number in alone.skipped.items():
                loaded.skipped[reason] = loaded.skipped.get(reason, 0) + number
                loaded.examples.setdefault(reason, alone.examples[reason])
        for whole, one in zip((*views, *batch.numbers), (*alone.batch.views, *alone.batch.numbers), strict=True):
            whole[row] = one[0]

    def shapes(self, count: int) -> list[tuple[int, ...]]:
        """Shapes of the views of a batch of so many images."""
        return [(count, 3, *group.size) for group in self._groups for _ in range(group.count)]

    def _load(
        self, start: int, count: int, encoded: Encoded | None, views: Sequence[torch.Tensor] | None = None
    ) -> Loaded:
        epochs, samples = self._order.span(start, count)
        if views is None:
            views = [torch.empty(shape, dtype=torch.uint8) for shape in self.shapes(count)]
        pixels = [view.numpy() for view in views]
        crops = np.empty((len(pixels), count, NUMBERS_PER_CROP), dtype=np.float32)
        loaded = Loaded(encoded=encoded)
        files: list[bytes] = []
        finished: list[int] = []
        good = 0
        for row, own in enumerate(range(start, start + count)):
            place = own
            while True:
                try:
                    key = (self._seed, _CROP, int(epochs[row]), int(samples[row]))
                    if (file := self._write(key, pixels, crops, row, encoded)) is None:
                        finished.append(row)
                    else:
                        files.append(file)
                except SkipImageError as skip:
                    where = self._source.locate(int(samples[row]))
                    if place == own:
                        loaded.leave_out(skip, where)
                    place += 1
                    if place - own >= self._max_replacements:
                        raise DataError(
                            f"{place - own} images in a row cannot be decoded, the last at {where}"
                        ) from None
                    # What the rows before have found: none between them and it is good.
                    place = max(place, good)
                    epochs[row], samples[row] = self._order.at(place)
                    continue
                good = place
                break
        if encoded is not None:
            if files:
                encoded.data = torch.frombuffer(bytearray().join(files), dtype=torch.uint8)
            views = [view[finished] for view in views]
        loaded.batch = _batch(views, self._source.labels[samples], samples, epochs, torch.from_numpy(crops).unbind())
        return loaded

    def _read_ahead(self, start: int) -> None:
        """Have the shards of this window and of the next one read by one of the workers, if they were not just now."""
        worker = get_worker_info()
        if worker is not None and worker.id > 0:
            return
        coming = dict.fromkeys(int(shard) for _, shards in self._order.windows_from(start, 2) for shard in shards)
        new = [shard for shard in coming if shard not in self._ahead]
        self._ahead = set(coming)
        if new:
            # The call lasts as long as the disk does.
            threading.Thread(target=self._source.read_ahead, args=(new,), daemon=True).start()

    def _write(
        self, draws_key: tuple[int, ...], pixels: list[Pixels], crops: Crops, row: int, encoded: Encoded | None
    ) -> bytes | None:
        """Cut the views of a row, or plan them and give the file where the device is to decode it."""
        sample = draws_key[-1]
        upright = self._cache.get(sample)
        if upright is None:
            raw = _read(self._source, sample, self._unreadable)
            upright = open_image(raw.image, max_pixels=self._max_pixels)
            if encoded is not None and isinstance(raw.image, bytes) and is_plain_jpeg(raw.image, upright):
                encoded.add(row, upright, len(raw.image), self._plan(upright, draws_key, crops, row))
                return raw.image
            upright = self._kept(sample, upright)
        cut_views(upright, self._plan(upright, draws_key, crops, row), pixels, row)
        return None

    def _plan(self, upright: Upright, draws_key: tuple[int, ...], crops: Crops, row: int) -> list[CropPlan]:
        """Draw the crops of a row and note where they lie."""
        plans = crop_plans(upright, self._groups, draws_key)
        crops[:, row] = crop_numbers(upright, plans)
        return plans

    def _kept(self, sample: int, upright: Upright) -> Upright:
        """Keep the decoded image if there is room, and if no crop would decode it at a smaller scale."""
        room = _BYTES_PER_PIXEL * upright.width * upright.height + _BYTES_PER_IMAGE
        shrink = max(min(upright.width / g.size[1], upright.height / g.size[0]) for g in self._groups)
        if room > self._cache_left or shrink >= SMALLEST_SHRINK:
            return upright
        kept = Upright(image=upright.decode(1.0).copy(), turn=None, width=upright.width, height=upright.height)
        self._cache[sample] = kept
        self._cache_left -= room
        return kept


class EvalTasks(Dataset[Loaded]):
    """Batches of centre crops by the numbers of their samples; damaged images are counted and missing.

    Args:
        source: the samples.
        size: height and width, pixels.
        crop_fraction: part of the sides that is kept.
        interpolation: bilinear or bicubic.
        max_pixels: larger images are left out.
        unreadable: what happens to samples that cannot be read.
    """

    def __init__(
        self,
        source: Source,
        size: tuple[int, ...],
        crop_fraction: float,
        interpolation: Interpolation,
        max_pixels: int,
        unreadable: UnreadablePolicy = UnreadablePolicy.STOP,
    ) -> None:
        self._source = source
        self._size = size
        self._crop_fraction = crop_fraction
        self._interpolation = interpolation
        self._max_pixels = max_pixels
        self._unreadable = unreadable

    def __getitem__(self, samples: Sequence[int]) -> Loaded:
        """Load these samples."""
        try:
            return self._load(samples)
        except DataError as error:
            return Loaded(batch=None, error=str(error))

    def _load(self, samples: Sequence[int]) -> Loaded:
        view = torch.empty((len(samples), 3, *self._size), dtype=torch.uint8)
        pixels = view.numpy()
        kept: list[tuple[int, int]] = []
        loaded = Loaded()
        for sample in samples:
            try:
                raw = _read(self._source, sample, self._unreadable)
                upright = open_image(raw.image, max_pixels=self._max_pixels)
                center_crop(upright, self._size, self._crop_fraction, self._interpolation, pixels[len(kept)])
            except SkipImageError as skip:
                loaded.leave_out(skip, self._source.locate(sample))
                continue
            kept.append((sample, raw.label))
        rows = np.array(kept, dtype=np.int64).reshape(-1, 2)
        loaded.batch = _batch(
            [view[: len(kept)]], rows[:, 1].copy(), rows[:, 0].copy(), np.zeros(len(kept), dtype=np.int64)
        )
        return loaded


def _read(source: Source, sample: int, unreadable: UnreadablePolicy) -> RawSample:
    try:
        return source.read(sample)
    except DataError as error:
        if unreadable is UnreadablePolicy.STOP:
            raise
        raise SkipImageError(SkipReason.UNREADABLE, str(error)) from None


def _batch(
    views: Sequence[torch.Tensor],
    labels: Int64Array,
    samples: Int64Array,
    epochs: Int64Array,
    crops: tuple[torch.Tensor, ...] = (),
) -> Batch:
    return Batch(
        views=tuple(views),
        labels=torch.from_numpy(labels),
        sample=torch.from_numpy(samples),
        epoch=torch.from_numpy(epochs),
        crops=crops,
    )
