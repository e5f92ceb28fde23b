"""Clips out of video files: a few frames at even times, whatever the file's own rate is.

Frames are chosen by time stamp, so a variable frame rate costs nothing. Decoders give frames in the order in which they
are shown, but some files carry their time stamps in another order (AVI with B-frames): stamps are therefore sorted on
their own in a short queue and dealt to the frames in the order of the decoder.
"""

from __future__ import annotations

import heapq
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain, dropwhile
from typing import Any

import av
import numpy as np
import torch
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import UInt8
from torch import Tensor

from hjepa_data.errors import DataError, choice, one_line
from hjepa_data.random import Draws

__all__ = ["ClipError", "ClipInfo", "ClipProblem", "ShortClip", "clip_start", "probe_clip", "read_clip"]

Picture = np.ndarray[Any, np.dtype[np.uint8]]
Times = np.ndarray[Any, np.dtype[np.float64]]

_REORDER = 4  # frames by which a time stamp may be out of order
_INSTANT = 1e-6  # seconds that are rounding
_FAR = 2.0**62  # the largest time stamp that is sought
_START = 0x57A27
# PyAV before 19 refuses a file whose titles are not UTF-8, and from 19 on it knows no such option.
_ANY_TITLE: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


class ShortClip(StrEnum):
    """What is done with a video that ends before the last frame wanted."""

    loop = "loop"
    refuse = "refuse"


class ClipProblem(StrEnum):
    """Why a clip cannot be had; what streams count."""

    missing = "missing"
    no_video = "no_video"
    undecodable = "undecodable"
    too_short = "too_short"


class ClipError(DataError):
    """A video that gives no clip, in one line.

    Attributes:
        problem: The kind of problem.
    """

    def __init__(self, problem: ClipProblem, message: str) -> None:
        super().__init__(one_line(message))
        self.problem = problem

    def __reduce__(self) -> tuple[type[ClipError], tuple[ClipProblem, str]]:
        return ClipError, (self.problem, str(self))


@dataclass(kw_only=True, slots=True, frozen=True)
class ClipInfo:
    """What a video file says about itself.

    Attributes:
        duration: Seconds.
        fps: Mean number of frames a second.
        width: Pixels, before a rotation that the file asks for.
        height: Pixels, before a rotation that the file asks for.
    """

    duration: float
    fps: float
    width: int
    height: int


def probe_clip(path: str | os.PathLike[str]) -> ClipInfo:
    """Read duration, rate and size of a video from its header (from its packets if the header does not say).

    Args:
        path: A local video file.

    Returns:
        What the file says.

    Raises:
        ClipError: There is no such file, it cannot be read, or it has no video.
    """
    with _opened(path, threads=1) as video:
        return _info(video)


def clip_start(duration: float, span: float, seed: int, epoch: int, sample: int) -> float:
    """Draw where a clip begins: uniform over the starts at which it fits, 0 if it does not.

    Args:
        duration: Of the video, seconds.
        span: Of the clip, seconds.
        seed: Of the stream.
        epoch: In which the clip is shown.
        sample: Number of the video.

    Returns:
        Seconds from the start of the video; a pure function of the arguments.
    """
    return Draws(seed, epoch, sample, _START).uniform(0.0, max(0.0, duration - span))


def read_clip(
    path: str | os.PathLike[str],
    *,
    frames: int = 16,
    fps: float | None = None,
    start: float = 0.0,
    short: ShortClip = ShortClip.loop,
    short_side: int | None = None,
    threads: int = 1,
) -> UInt8[Tensor, "T H W 3"]:
    """Read the frames whose time stamps are nearest to start, start + 1 / fps, start + 2 / fps, ...

    A video ends where its last frame does, whatever its header says; packets that cannot be decoded are passed over.

    Args:
        path: A local video file.
        frames: Number of frames T.
        fps: Frames a second of the clip; None: those of the file.
        start: Seconds from the start of the video.
        short: What is done where the video ends earlier: ``loop`` goes on with its first frame, ``refuse`` raises.
        short_side: Pixels to which the shorter side is scaled down while decoding; None keeps the size.
        threads: Threads of the decoder, 0 for as many as it likes.

    Returns:
        RGB frames, turned upright where the file says how.

    Raises:
        ClipError: There is no such file, no video in it, it cannot be decoded, or it is too short and that is refused.
        ValueError: Arguments out of their range.
    """
    short = choice(ShortClip, "short", short, "no such policy")
    _check(frames, fps, start, short_side, threads)
    with _opened(path, threads) as video:
        info = _info(video)
        times = start + np.arange(frames) / (info.fps if fps is None else fps)
        painter = _Painter(short_side)
        pictures, end = _pictures_at(video, times, 1 / info.fps, painter)
        if end <= 0:
            raise ClipError(ClipProblem.undecodable, f"{video.name}: no frame can be decoded; encode the video anew")
        if len(pictures) < frames:
            _refuse_short(video.name, times, end, short)
            rest = np.maximum(times[len(pictures) :] - end, 0) % end
            more, _ = _pictures_at(video, np.where(rest < end - _INSTANT, rest, 0.0), 1 / info.fps, painter, hold=True)
            if not more:
                raise ClipError(
                    ClipProblem.undecodable, f"{video.name}: its start cannot be decoded; encode the video anew"
                )
            pictures += more
    return torch.from_numpy(np.stack(pictures))


def _check(frames: int, fps: float | None, start: float, short_side: int | None, threads: int) -> None:
    if (
        frames < 1
        or not 0 <= start < math.inf
        or (fps is not None and not 0 < fps < math.inf)
        or (short_side is not None and short_side < 1)
        or threads < 0
    ):
        raise ValueError(
            f"frames={frames}, fps={fps}, start={start}, short_side={short_side}, threads={threads}: no clip; allowed: "
            "frames >= 1, fps > 0 or None, start >= 0 s, short_side >= 1 or None, threads >= 0"
        )


def _refuse_short(name: str, times: Times, end: float, short: ShortClip) -> None:
    if short is ShortClip.refuse:
        raise ClipError(
            ClipProblem.too_short,
            f"{name}: {end:.2f} s are too short for {len(times)} frames up to {times[-1]:.2f} s; "
            "ask for fewer frames, a higher fps or an earlier start, or use short=loop",
        )


class _Video:
    """An open file and the video in it."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self._threads = threads
        self._open()

    def _open(self) -> None:
        # With the scheme a colon in a name names no other protocol, and a playlist opens nothing but files.
        self.container = av.open(f"file:{self.name}", options={"protocol_whitelist": "file"}, **_ANY_TITLE)
        self._moved = False
        # The picture on the cover of a song is a video stream too.
        videos = [s for s in self.container.streams.video if not s.disposition & Disposition.attached_pic]
        if not videos:
            self.container.close()
            raise ClipError(ClipProblem.no_video, f"{self.name}: there is no video stream in it; give a video file")
        self.stream = videos[0]
        if not self.stream.codec_context:
            self.container.close()
            raise ClipError(
                ClipProblem.undecodable, f"{self.name}: there is no decoder for its codec; encode the video anew"
            )
        self.stream.codec_context.thread_count = self._threads

    @property
    def base(self) -> float:
        """Seconds of a unit of the time stamps, 0 if the file does not say."""
        return float(self.stream.time_base or 0)

    def rewind(self) -> None:
        """Go back to the start; seeking there would lose the first frames of MPEG streams with B-frames."""
        if self._moved:
            self.container.close()
            self._open()

    def seek(self, time: float) -> bool:
        """Go to a keyframe before a time, or say that this file cannot."""
        stamp = int(min(time / self.base, _FAR)) + (self.stream.start_time or 0) if self.base else 0
        self._moved = True
        try:
            self.container.seek(stamp, stream=self.stream, backward=True)
        except av.error.FFmpegError:
            return False
        return self.base > 0

    def packets(self) -> Iterator[Packet[VideoStream]]:
        """The packets from here on, up to the first that cannot be read."""
        self._moved = True
        # PyAV ends with an IndexError if streams have appeared that were not there at the start of the file.
        with suppress(av.error.FFmpegError, IndexError):
            yield from self.container.demux(self.stream)


@contextmanager
def _opened(path: str | os.PathLike[str], threads: int) -> Iterator[_Video]:
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise ClipError(ClipProblem.missing, f"{name}: no such file; give the path of a local video")
    try:
        video = _Video(name, threads)
        try:
            yield video
        finally:
            video.container.close()
    except av.error.FFmpegError as error:
        reason = error.strerror or "unknown error"
        raise ClipError(
            ClipProblem.undecodable, f"{name}: cannot be decoded ({reason}); encode the video anew"
        ) from None


def _info(video: _Video) -> ClipInfo:
    container, stream = video.container, video.stream
    rate = stream.average_rate or stream.guessed_rate
    fps = float(rate) if rate else 0.0
    duration = 0.0
    if stream.duration is not None and stream.time_base is not None:
        duration = float(stream.duration * stream.time_base)
    elif container.duration is not None:
        # Matroska says when the last frame ends, and the first may be late.
        duration = container.duration / av.time_base - (stream.start_time or 0) * video.base
    if duration <= 0 or fps <= 0:
        duration, fps = _measure(video)
    if duration <= 0 or fps <= 0:
        raise ClipError(
            ClipProblem.undecodable, f"{video.name}: no frame of it has a time stamp; encode the video anew"
        )
    return ClipInfo(duration=duration, fps=fps, width=stream.codec_context.width, height=stream.codec_context.height)


def _measure(video: _Video) -> tuple[float, float]:
    """Duration and rate by the time stamps of the packets, without decoding."""
    stamps = sorted(packet.pts * video.base for packet in video.packets() if packet.pts is not None)
    if len(stamps) < 2 or stamps[-1] <= stamps[0]:
        return (1.0, 1.0) if stamps else (0.0, 0.0)
    fps = (len(stamps) - 1) / (stamps[-1] - stamps[0])
    return len(stamps) / fps, fps


class _Painter:
    """Turns frames into pictures, all of the size of the first."""

    def __init__(self, short_side: int | None) -> None:
        self._short_side = short_side
        self._size: tuple[int, int] | None = None
        # A frame's own converter starts as many threads as there are cores, for this frame alone.
        self._converter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> Picture:
        self._size = self._size or _size(frame, self._short_side)
        width, height = self._size
        pixels = self._converter.reformat(frame, width=width, height=height, format="rgb24", threads=1).to_ndarray()
        # The display matrix turns counter-clockwise, as rot90 does.
        turns = round(frame.rotation / 90) % 4
        return np.ascontiguousarray(np.rot90(pixels, turns))


def _pictures_at(
    video: _Video, times: Times, interval: float, painter: _Painter, *, hold: bool = False
) -> tuple[list[Picture], float]:
    """The pictures nearest to times, and where the last frame ends (0 without one).

    Times at and after the end are left out, which all stand last, or ``hold`` the last picture.
    """
    wanted = np.unique(times)
    chosen: list[Picture] = []
    before: tuple[float, VideoFrame] | None = None
    end = 0.0
    for time, frame in _frames_from(video, float(wanted[0]), interval):
        while len(chosen) < len(wanted) and wanted[len(chosen)] <= time:
            near = frame
            if before is not None and wanted[len(chosen)] - before[0] <= time - wanted[len(chosen)]:
                near = before[1]
            chosen.append(painter(near))
        before = (time, frame)
        end = time + (frame.duration * video.base or interval)
        if len(chosen) == len(wanted):
            break
    last = None if before is None else before[1]
    while last is not None and len(chosen) < len(wanted) and (hold or wanted[len(chosen)] < end - _INSTANT):
        chosen.append(painter(last))
    return [chosen[i] for i in np.searchsorted(wanted, times) if i < len(chosen)], end


def _frames_from(video: _Video, start: float, interval: float) -> Iterator[tuple[float, VideoFrame]]:
    """Frames with their times in seconds, from a keyframe at or before ``start``."""
    if start > interval and video.seek(start - interval):
        # Seeking in MPEG streams ends between keyframes; a frame there lacks what it refers to, and may lack its time.
        packets = dropwhile(lambda packet: not packet.is_keyframe or packet.pts is None, video.packets())
        timed = timed_frames(packets, video.stream, interval)
        first = next(timed, None)
        if first is not None and first[0] <= start:
            yield first
            yield from timed
            return
    # Seeking overshot, or there was no need of it.
    video.rewind()
    yield from timed_frames(video.packets(), video.stream, interval)


def timed_frames(
    packets: Iterable[Packet[VideoStream]], stream: VideoStream, interval: float
) -> Iterator[tuple[float, VideoFrame]]:
    """Decode frames in the order of the decoder, each with its time in seconds, which never falls.

    Args:
        packets: Of the video; those that cannot be decoded are passed over.
        stream: The video.
        interval: Seconds between two frames, for those that have no time stamp.

    Returns:
        Times from the start of the stream and frames.
    """
    base = float(stream.time_base or 0)
    offset = (stream.start_time or 0) * base
    frames: deque[VideoFrame] = deque()
    stamps: list[float] = []
    last = -interval
    for frame in chain.from_iterable(_decoded(packet) for packet in packets):
        time = last + interval if frame.pts is None else frame.pts * base - offset
        last = time
        frames.append(frame)
        heapq.heappush(stamps, time)
        if len(frames) > _REORDER:
            yield heapq.heappop(stamps), frames.popleft()
    while frames:
        yield heapq.heappop(stamps), frames.popleft()


def _decoded(packet: Packet[VideoStream]) -> list[VideoFrame]:
    try:
        return packet.decode()
    except av.error.FFmpegError:
        return []


def _size(frame: VideoFrame, short_side: int | None) -> tuple[int, int]:
    """Width and height to which all frames of the clip are brought."""
    shrink = 1.0 if short_side is None else min(1.0, short_side / min(frame.width, frame.height))
    return max(1, round(frame.width * shrink)), max(1, round(frame.height * shrink))
