"""The endless stream of training batches, whose state is where it stands."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count

import torch

from hjepa_data.errors import DataError, choice, refuse
from hjepa_data.sources.base import Source, contents_of
from hjepa_data.stream.batch import Batch
from hjepa_data.stream.gpu_decode import Decode, check_decoder, decode_views
from hjepa_data.stream.loader import SkipCount, WorkerConfig, load
from hjepa_data.stream.order import order_of
from hjepa_data.stream.pool import BatchPool, PooledTasks
from hjepa_data.stream.worker import MAX_REPLACEMENTS, Loaded, TrainTasks, UnreadablePolicy
from hjepa_data.transforms.crop import ViewGroup
from hjepa_data.transforms.decode import check_max_pixels

__all__ = ["DEFAULT_MAX_PIXELS", "StreamConfig", "TrainStream"]

_log = logging.getLogger(__name__)
DEFAULT_MAX_PIXELS = 89_478_485
# Batches that those who take them usually hold: the present one, the one before it and one ahead.
_HELD = 3


@dataclass(kw_only=True, slots=True)
class StreamConfig:
    """What a training stream gives.

    Attributes:
        global_batch_size: images of a step over all ranks; each rank gets an equal part of them.
        window_shards: shards (or other groups of a source) that are shuffled together; more mix better and touch more
            files at a time.
        views: groups of views that are cut out of each image.
        workers: who loads them.
        cache_bytes: decoded pixels that each worker keeps, bytes; small images are then decoded once, not in each
            epoch. The batches do not depend on it.
        unreadable: what happens when a shard is gone, cut off or cannot be fetched: ``stop`` with an error, or ``skip``
            its samples, which are counted and replaced as damaged images are.
        max_skipped_fraction: share of the images left out by a rank since it was built, above which the stream stops
            (ten are always allowed).
        max_pixels: images with more pixels are left out, undecoded.
        decode: where JPEGs become pixels: ``cpu``, in the workers, or ``gpu``, on the device, in the process that takes
            the batches; boxes, flips and order are the same, pixels differ by some grey levels.
    """

    global_batch_size: int = 256
    window_shards: int = 16
    views: tuple[ViewGroup, ...] = field(default_factory=lambda: (ViewGroup(),))
    workers: WorkerConfig = field(default_factory=WorkerConfig)
    cache_bytes: int = 0
    unreadable: UnreadablePolicy = UnreadablePolicy.STOP
    max_skipped_fraction: float = 0.01
    max_pixels: int = DEFAULT_MAX_PIXELS
    decode: Decode = Decode.CPU

    def __post_init__(self) -> None:
        self.views = tuple(self.views)
        self.unreadable = choice(UnreadablePolicy, "unreadable", self.unreadable, "no such policy")
        self.decode = choice(Decode, "decode", self.decode, "no such place")
        if self.global_batch_size < 1:
            refuse("global_batch_size", self.global_batch_size, "a batch holds images", "allowed: 1 and more")
        if self.window_shards < 1:
            refuse("window_shards", self.window_shards, "a window holds at least one shard", "allowed: 1 and more")
        if not self.views:
            refuse("views", self.views, "an image has at least one view", "allowed: one ViewGroup or more")
        if not 0 <= self.max_skipped_fraction <= 1:
            refuse("max_skipped_fraction", self.max_skipped_fraction, "no fraction", "allowed: 0 to 1")
        if self.cache_bytes < 0:
            refuse("cache_bytes", self.cache_bytes, "no size", "allowed: 0 (keep nothing) and more")
        if self.cache_bytes and self.decode is Decode.GPU:
            refuse("cache_bytes", self.cache_bytes, "decode='gpu' leaves no decoded image to keep", "allowed: 0")
        check_max_pixels(self.max_pixels)

    @property
    def num_views(self) -> int:
        """Views of an image over all groups."""
        return sum(group.count for group in self.views)

    def build(
        self,
        source: Source,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cuda",
    ) -> TrainStream:
        """Build the stream of one rank.

        Args:
            source: the samples.
            seed: of the order, the crops and the flips.
            rank: which part of each batch this process gets, 0 to world_size - 1.
            world_size: parts of a batch.
            device: on which ``decode="gpu"`` decodes, and where its views are then; ``cpu`` takes torchvision's decoder
                for CPUs. ``decode="cpu"`` does not look at it.

        Returns:
            The stream, at its start.

        Raises:
            ValueError: the batch cannot be dealt equally to the ranks, or the device cannot decode.
        """
        return TrainStream(self, source, seed=seed, rank=rank, world_size=world_size, device=device)


class TrainStream(Iterator[Batch]):
    """An endless iterator of batches.

    Step t takes the positions [tG, (t+1)G) of the global order, rank r its r-th part. What stands at a position depends
    on the seed and the source only, so batches do not depend on workers, ranks or interruptions. An epoch may end
    within a batch.

    Args:
        config: what is streamed.
        source: the samples.
        seed: of the order, the crops and the flips.
        rank: which part of each batch this process gets.
        world_size: parts of a batch.
        device: on which ``decode="gpu"`` decodes.
    """

    def __init__(
        self,
        config: StreamConfig,
        source: Source,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cuda",
    ) -> None:
        if not 0 <= rank < world_size:
            refuse("rank", rank, f"no rank of world_size={world_size}", "allowed: 0 to world_size - 1")
        if config.global_batch_size % world_size:
            refuse(
                "global_batch_size",
                config.global_batch_size,
                f"{world_size} ranks cannot share it equally",
                f"allowed: multiples of {world_size}",
            )
        self._device = torch.device(device)
        if config.decode is Decode.GPU:
            check_decoder(self._device)
        self.config = config
        self.source = source
        self._order = order_of(source, config.window_shards, seed)
        self._count = config.global_batch_size // world_size
        self._offset = rank * self._count
        self._tasks = TrainTasks(
            source,
            self._order,
            config.views,
            self._count,
            seed,
            config.max_pixels,
            config.cache_bytes,
            config.unreadable,
            config.decode,
            # So many are borne if they stand apart, and a lost shard's stand together.
            max(MAX_REPLACEMENTS, int(config.max_skipped_fraction * self._order.num_samples)),
        )
        self._position = 0
        self._failed = False
        self._batches: Iterator[Loaded] | None = None
        self._skips = SkipCount(config.max_skipped_fraction, self._order.num_samples // world_size)

    @property
    def samples_per_epoch(self) -> int:
        """Number of samples of the source."""
        return self._order.num_samples

    @cached_property
    def _contents(self) -> int:
        return contents_of(self.source)

    @property
    def skipped(self) -> dict[str, int]:
        """Images left out by this rank since the stream was built, by reason."""
        return dict(self._skips.reasons)

    def __iter__(self) -> TrainStream:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._load()
        try:
            loaded = next(self._batches)
            if loaded.encoded is not None:
                self._decode(loaded)
            batch = self._skips.add(loaded)
        except BaseException:
            # The batches that come next are not those of this position.
            self.close()
            raise
        self._position += self.config.global_batch_size
        return batch

    def _load(self) -> Iterator[Loaded]:
        """Start the workers, if there are any."""
        workers = self.config.workers
        if workers.count == 0 or self.config.decode is Decode.GPU:
            return load(self._tasks, self._starts(), workers)
        pool = BatchPool(self._tasks.shapes(self._count), workers.count * workers.prefetch + _HELD)
        tasks = PooledTasks(self._tasks, pool)
        return load(tasks, tasks.items(self._starts()), workers)

    def _decode(self, loaded: Loaded) -> None:
        """Fill in the views of a batch on the device; what fails there goes the way of the CPU path."""
        assert loaded.encoded is not None
        assert loaded.batch is not None
        views, failed = decode_views(loaded.encoded, loaded.batch.views, self._count, self._device)
        if failed and not self._failed:
            where = self.source.locate(int(loaded.batch.sample[failed[0]]))
            _log.warning("an image cannot be decoded on %s: %s; Pillow tries, also the next ones", self._device, where)
        self._failed |= bool(failed)
        for row in failed:
            self._tasks.mend(loaded, self._position + self._offset, views, row)
        loaded.batch.views = tuple(views)

    def state_dict(self) -> dict[str, int]:
        """Say where the stream stands after the batches that were handed out, not those prepared ahead.

        Returns:
            epoch and position in it (the same on every rank), the number of samples, a hash of the order, and one of
            what the source holds. An epoch of a mixture with weights is as many positions as it has samples.
        """
        epoch, position = divmod(self._position, self.samples_per_epoch)
        return {
            "epoch": epoch,
            "position": position,
            "samples": self.samples_per_epoch,
            "order": self._order.fingerprint,
            "contents": self._contents,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go where another stream stood, of any number of ranks and workers and any batch size.

        Args:
            state: what ``state_dict`` gave.

        Raises:
            DataError: this is no state of a stream, or that of another seed, ``window_shards`` or weights, or of a
                source that holds other samples, wherever they lie.
        """
        # Streams did not always say what their source holds.
        state = {"contents": self._contents, **state}
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise DataError(f"the saved state lacks {', '.join(missing)}: it is not that of a stream; start anew")
        if int(state["samples"]) != self.samples_per_epoch:
            raise DataError(
                f"the saved stream had {state['samples']} samples, this source has {self.samples_per_epoch}: its "
                "order cannot be continued; give the same source, or start anew"
            )
        if int(state["order"]) != self._order.fingerprint:
            raise DataError(
                "the saved stream had another order; give the same source, seed, window_shards and weights, or start "
                "anew"
            )
        if int(state["contents"]) != self._contents:
            raise DataError(
                f"the saved stream had other samples than these {self.samples_per_epoch}, as many in the same groups; "
                "give the same source, wherever it lies now, or start anew"
            )
        self.close()
        self._position = int(state["epoch"]) * self.samples_per_epoch + int(state["position"])

    def _starts(self) -> Iterator[int]:
        """Position of the first image in each batch of this rank, from here on."""
        return count(self._position + self._offset, self.config.global_batch_size)

    def close(self) -> None:
        """End the workers; the stream goes on with new ones when it is asked for a batch."""
        self._batches = None
