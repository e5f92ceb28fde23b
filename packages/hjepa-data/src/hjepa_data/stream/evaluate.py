"""Finite streams for evaluation: every sample exactly once, on every number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from hjepa_data.errors import choice, refuse
from hjepa_data.random import spread
from hjepa_data.sources.base import Source
from hjepa_data.stream.batch import Batch
from hjepa_data.stream.loader import SkipCount, WorkerConfig, load
from hjepa_data.stream.train import DEFAULT_MAX_PIXELS
from hjepa_data.stream.worker import EvalTasks, UnreadablePolicy
from hjepa_data.transforms.crop import Interpolation, size_of
from hjepa_data.transforms.decode import check_max_pixels

__all__ = ["EvalConfig", "EvalStream"]


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """What an evaluation stream gives.

    Attributes:
        batch_size: images of a batch on each rank; the last batch is smaller.
        size: height and width of the images, pixels.
        crop_fraction: part of the largest centred box that is kept; 0.875 is 224 of 256, 1 keeps all.
        interpolation: bilinear or bicubic.
        max_samples: use this many samples, drawn by a fixed seed from all parts of the source; None uses all.
        workers: who loads them.
        unreadable: what happens when a shard is gone, cut off or cannot be fetched: ``stop`` with an error, or ``skip``
            its samples, which are counted and missing as damaged images are.
        max_skipped_fraction: share of the images left out by a rank in a pass, above which the stream stops (ten are
            always allowed).
        max_pixels: images with more pixels are left out, undecoded.
    """

    batch_size: int = 256
    size: tuple[int, ...] = (224, 224)
    crop_fraction: float = 0.875
    interpolation: Interpolation = Interpolation.BICUBIC
    max_samples: int | None = None
    workers: WorkerConfig = field(default_factory=WorkerConfig)
    unreadable: UnreadablePolicy = UnreadablePolicy.STOP
    max_skipped_fraction: float = 0.01
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __post_init__(self) -> None:
        self.size = size_of(self.size)
        self.unreadable = choice(UnreadablePolicy, "unreadable", self.unreadable, "no such policy")
        self.interpolation = choice(Interpolation, "interpolation", self.interpolation, "no such interpolation")
        if self.batch_size < 1:
            refuse("batch_size", self.batch_size, "a batch holds images", "allowed: 1 and more")
        if self.max_samples is not None and self.max_samples < 1:
            refuse("max_samples", self.max_samples, "nothing to evaluate", "allowed: 1 and more, or None for all")
        if not 0 < self.crop_fraction <= 1:
            refuse("crop_fraction", self.crop_fraction, "no part of an image", "allowed: above 0, up to 1")
        if not 0 <= self.max_skipped_fraction <= 1:
            refuse("max_skipped_fraction", self.max_skipped_fraction, "no fraction", "allowed: 0 to 1")
        check_max_pixels(self.max_pixels)

    def build(self, source: Source, *, rank: int = 0, world_size: int = 1) -> EvalStream:
        """Build the stream of one rank.

        Args:
            source: the samples.
            rank: which part of the samples this process gets, 0 to world_size - 1.
            world_size: parts of the samples.

        Returns:
            The stream.
        """
        return EvalStream(self, source, rank=rank, world_size=world_size)


class EvalStream:
    """A finite iterable of batches of centre crops, in the order of the source; each ``iter`` starts anew.

    Rank r of W gets the samples [rN // W, (r+1)N // W) of the N that are used: each exactly once over all ranks. A
    damaged image is counted and missing.

    Args:
        config: what is streamed.
        source: the samples.
        rank: which part of the samples this process gets.
        world_size: parts of the samples.
    """

    def __init__(self, config: EvalConfig, source: Source, *, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            refuse("rank", rank, f"no rank of world_size={world_size}", "allowed: 0 to world_size - 1")
        self.config = config
        self.source = source
        used = spread(len(source), len(source) if config.max_samples is None else config.max_samples)
        self._samples = used[rank * len(used) // world_size : (rank + 1) * len(used) // world_size].tolist()
        self._skips = SkipCount(config.max_skipped_fraction, self.num_samples)

    @property
    def num_samples(self) -> int:
        """Samples of this rank, damaged ones included."""
        return len(self._samples)

    @property
    def skipped(self) -> dict[str, int]:
        """Images left out by this rank in the latest pass, by reason."""
        return dict(self._skips.reasons)

    def __len__(self) -> int:
        return (self.num_samples + self.config.batch_size - 1) // self.config.batch_size

    def __iter__(self) -> Iterator[Batch]:
        config = self.config
        tasks = EvalTasks(
            self.source,
            config.size,
            config.crop_fraction,
            config.interpolation,
            config.max_pixels,
            config.unreadable,
        )
        starts = range(0, self.num_samples, config.batch_size)
        parts = [self._samples[start : start + config.batch_size] for start in starts]
        self._skips = SkipCount(config.max_skipped_fraction, self.num_samples)
        for loaded in load(tasks, parts, config.workers):
            batch = self._skips.add(loaded)
            if len(batch):
                yield batch
