"""An endless stream of batches of clips over a list of videos, whose state is where it stands."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from hjepa_data import Batch, ViewGroup
from hjepa_data.errors import DataError, choice, refuse
from hjepa_data.random import hash_int
from hjepa_data.shards.index import Int64Array
from hjepa_data.sources.layout import find_files
from hjepa_data.stream import permutation
from hjepa_video.clip import ClipError, ClipProblem, ShortClip, clip_start, probe_clip, read_clip
from hjepa_video.transforms import random_view

__all__ = ["ClipStream", "ClipStreamConfig", "list_clips"]

_log = logging.getLogger(__name__)
_ALWAYS_ALLOWED = 10  # videos that may be left out of the smallest set
_KEPT_ORDERS = 4

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})


def list_clips(folder: str | os.PathLike[str]) -> list[Path]:
    """List the videos of a folder and its subfolders, sorted.

    Args:
        folder: Where to look; links are followed, each folder is read once.

    Returns:
        Paths of files that have the suffix of a video; hidden files and folders, such as ``._pan.mp4``, are left out.

    Raises:
        DataError: There is no such folder, one that cannot be read, or no video in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give a folder with videos")
    names = find_files(os.fspath(root), VIDEO_SUFFIXES, Counter(), other="not a video")
    found = sorted(root / name for name in names)
    if not found:
        raise DataError(f"{root}: no video in it; allowed suffixes: {', '.join(sorted(VIDEO_SUFFIXES))}")
    return found


@dataclass(kw_only=True, slots=True)
class ClipStreamConfig:
    """What a stream of clips gives.

    Attributes:
        global_batch_size: Clips of a step over all ranks; each rank gets an equal part.
        frames: Frames of a clip.
        fps: Frames a second of a clip; None: those of each file.
        view: Crop, flip and size; one view a clip.
        short: What is done with a video that is shorter than a clip: ``loop``, or ``refuse`` (left out and counted).
        short_side: Pixels to which the shorter side is scaled down while decoding; None keeps the size.
        max_skipped_fraction: Share of the clips of a rank that may be replaced because a video is missing or damaged;
            above it the stream stops (ten are always allowed).
        threads: Decoding threads; 0 decodes in the calling thread. The batches do not depend on it.
        prefetch: Batches prepared ahead when there are threads.
    """

    global_batch_size: int = 24
    frames: int = 16
    fps: float | None = 4.0
    view: ViewGroup = field(default_factory=lambda: ViewGroup(size=(256, 256)))
    short: ShortClip = ShortClip.loop
    short_side: int | None = None
    max_skipped_fraction: float = 0.01
    threads: int = 0
    prefetch: int = 2

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "frames", "prefetch"):
            if getattr(self, name) < 1:
                refuse(name, getattr(self, name), "a stream has some", "allowed: 1 and more")
        if self.fps is not None and not 0 < self.fps < math.inf:
            refuse("fps", self.fps, "no rate", "allowed: above 0, or None for the rate of each file")
        if self.view.count != 1:
            refuse("view.count", self.view.count, "a clip is shown in one view", "allowed: 1")
        self.short = choice(ShortClip, "short", self.short, "no such policy")
        if self.short_side is not None and self.short_side < 1:
            refuse("short_side", self.short_side, "no size", "allowed: 1 and more pixels, or None")
        if not 0 <= self.max_skipped_fraction <= 1:
            refuse("max_skipped_fraction", self.max_skipped_fraction, "no fraction", "allowed: 0 to 1")
        if self.threads < 0:
            refuse("threads", self.threads, "no number of threads", "allowed: 0 and more")

    def build(
        self, paths: Sequence[str | os.PathLike[str]], *, seed: int, rank: int = 0, world_size: int = 1
    ) -> ClipStream:
        """Build the stream of one rank over these videos.

        Args:
            paths: Video files; the number of a sample is its place in this list.
            seed: Of the order, the starts, the crops and the flips.
            rank: Which part of each batch this process gets.
            world_size: Parts of a batch.

        Returns:
            The stream, at its start.

        Raises:
            DataError: There are no videos.
            ValueError: The batch cannot be dealt equally to the ranks.
        """
        return ClipStream(self, paths, seed=seed, rank=rank, world_size=world_size)


class ClipStream(Iterator[Batch]):
    """An endless iterator of batches, each with one view [B, 3, T, H, W] of uint8.

    Step t takes the positions [tG, (t+1)G) of a global order, rank r its r-th part. Epoch e holds the positions
    [eN, (e+1)N) in the order of the hashes of (seed, e). A video that gives no clip is counted and its place is taken
    by the next of the order that does, which is then shown twice: so a batch is a function of the position alone.

    Args:
        config: What is streamed.
        paths: Video files.
        seed: Of the order, the starts, the crops and the flips.
        rank: Which part of each batch this process gets.
        world_size: Parts of a batch.
    """

    def __init__(
        self,
        config: ClipStreamConfig,
        paths: Sequence[str | os.PathLike[str]],
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if isinstance(paths, str | bytes | os.PathLike):
            refuse("paths", paths, "one path, and no list of them", "allowed: list_clips(folder), or [path]")
        if not paths:
            raise DataError("no videos: the list of paths is empty; give at least one video file")
        if not 0 <= rank < world_size:
            refuse("rank", rank, f"no rank of world_size={world_size}", "allowed: 0 to world_size - 1")
        if config.global_batch_size % world_size:
            refuse(
                "global_batch_size",
                config.global_batch_size,
                f"{world_size} ranks cannot share it equally",
                f"allowed: multiples of {world_size}",
            )
        self.config = config
        self.paths = [Path(path) for path in paths]
        self._seed = seed
        self._skipped: Counter[str] = Counter()
        self._shown = 0
        self._expected = len(self.paths) // world_size
        self._count = config.global_batch_size // world_size
        self._offset = rank * self._count
        self._position = 0
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[list[Future[_Clip]]] = deque()

    def __iter__(self) -> ClipStream:
        return self

    def __next__(self) -> Batch:
        first = self._position + self._offset
        try:
            if self.config.threads == 0:
                clips = [self._load(first + i) for i in range(self._count)]
            else:
                clips = [future.result() for future in self._next_futures(first)]
            self._count_skipped(clips)
        except BaseException:
            # The batches that were prepared are not those of this position.
            self.close()
            raise
        self._position += self.config.global_batch_size
        return Batch(
            views=(torch.stack([clip.pixels for clip in clips]),),
            labels=torch.full((len(clips),), -1),
            sample=torch.tensor([clip.sample for clip in clips]),
            epoch=torch.tensor([clip.epoch for clip in clips]),
        )

    @property
    def skipped(self) -> dict[str, int]:
        """Clips that this rank replaced since the stream was built, by what was wrong with their videos."""
        return dict(self._skipped)

    def state_dict(self) -> dict[str, int]:
        """Say where the stream stands after the batches that were handed out.

        Returns:
            Epoch and position in it, the number of videos, a hash of the order, and one of the names of their files.
        """
        epoch, position = divmod(self._position, len(self.paths))
        where = {"epoch": epoch, "position": position, "samples": len(self.paths)}
        return {**where, "order": self._fingerprint, "contents": self._contents}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go where another stream stood, of any number of ranks and threads and any batch size.

        Args:
            state: What ``state_dict`` gave.

        Raises:
            DataError: This is no state of a stream, or it belongs to other videos, which are known by the names of
                their files wherever these lie, or to another seed.
        """
        # Streams did not always say what they hold.
        state = {"contents": self._contents, **state}
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise DataError(f"the saved state lacks {', '.join(missing)}: it is not that of a stream; start anew")
        if int(state["contents"]) != self._contents:
            raise DataError(
                f"the saved stream had other videos than these {len(self.paths)}; give the same, wherever they lie "
                "now, or start anew"
            )
        if int(state["samples"]) != len(self.paths) or int(state["order"]) != self._fingerprint:
            raise DataError(
                f"the saved stream had {state['samples']} videos in another order than these {len(self.paths)}; "
                "give the same videos and seed, or start anew"
            )
        self.close()
        self._position = int(state["epoch"]) * len(self.paths) + int(state["position"])

    def close(self) -> None:
        """End the threads; the stream goes on with new ones when it is asked for a batch.

        A program that ends without it waits until the batches ahead are prepared.
        """
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    @cached_property
    def _contents(self) -> int:
        names = b"\0".join(os.fsencode(path.name) for path in self.paths)
        return int.from_bytes(hashlib.blake2b(names, digest_size=8).digest()) >> 1

    @property
    def _fingerprint(self) -> int:
        return hash_int(self._seed, len(self.paths)) >> 1

    def _count_skipped(self, clips: list[_Clip]) -> None:
        errors = [clip.error for clip in clips if clip.error is not None]
        for error in errors:
            if error.problem.value not in self._skipped:
                _log.warning("a video is left out (%s): %s; the next ones are only counted", error.problem, error)
            self._skipped[error.problem.value] += 1
        self._shown += len(clips)
        # Short videos are left out because that was asked for.
        damaged = self._skipped.total() - self._skipped[ClipProblem.too_short.value]
        limit = self.config.max_skipped_fraction * max(self._shown, self._expected)
        if errors and damaged > max(_ALWAYS_ALLOWED, limit):
            raise DataError(
                f"{damaged} of {self._shown} clips had missing or damaged videos (the last: {errors[-1]}), more than "
                f"max_skipped_fraction={self.config.max_skipped_fraction}; mend the videos, or raise the limit"
            )

    def _next_futures(self, first: int) -> list[Future[_Clip]]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.config.threads, thread_name_prefix="hjepa-clips")
        while len(self._ahead) <= self.config.prefetch:
            start = first + len(self._ahead) * self.config.global_batch_size
            self._ahead.append([self._pool.submit(self._load, start + i) for i in range(self._count)])
        return self._ahead.popleft()

    def _load(self, position: int) -> _Clip:
        """The clip at a position of the global order, or the next one that there is."""
        config = self.config
        first = last = None
        # These hold one whole epoch, wherever they begin; as many as there are videos may miss some, as orders differ.
        for attempt in range(2 * len(self.paths)):
            epoch, place = divmod(position + attempt, len(self.paths))
            sample = int(_order(len(self.paths), self._seed, epoch)[place])
            path = self.paths[sample]
            try:
                info = probe_clip(path)
                span = config.frames / (info.fps if config.fps is None else config.fps)
                frames = self._read(path, clip_start(info.duration, span, self._seed, epoch, sample))
            except ClipError as error:
                # The problems of the videos after the first are counted at their own positions.
                first, last = first or error, error
                continue
            pixels = random_view(frames, config.view, self._seed, epoch, sample, 0)
            return _Clip(pixels=pixels, sample=sample, epoch=epoch, error=first)
        raise DataError(f"none of the {len(self.paths)} videos gives a clip; the last problem: {last}")

    def _read(self, path: Path, start: float) -> UInt8[Tensor, "T H W 3"]:
        """Read a clip; from the start of the video where its header promised more than there is."""
        config = self.config
        try:
            return read_clip(
                path,
                frames=config.frames,
                fps=config.fps,
                start=start,
                short=config.short,
                short_side=config.short_side,
            )
        except ClipError as error:
            if start == 0 or error.problem is not ClipProblem.too_short:
                raise
        return self._read(path, 0.0)


@lru_cache(_KEPT_ORDERS)
def _order(count: int, seed: int, epoch: int) -> Int64Array:
    """The videos of an epoch; sorting many takes longer than reading a clip."""
    return permutation(count, seed, epoch)


@dataclass(slots=True)
class _Clip:
    """A clip, and why that of the video at its position could not be had."""

    pixels: UInt8[Tensor, "3 T H W"]
    sample: int
    epoch: int
    error: ClipError | None
