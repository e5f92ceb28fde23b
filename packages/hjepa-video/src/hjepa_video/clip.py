"""Clips out of video files: a few frames at even times, whatever the file's own rate is.

Frames are chosen by time stamp, so a variable frame rate costs nothing. Decoders give frames in the order in which they
are shown, but some files carry their time stamps in another order (AVI with B-frames): stamps are therefore sorted on
their own in a short queue and dealt to the frames in the order of the decoder.
"""

from __future__ import annotations

import heapq
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from jaxtyping import UInt8
from torch import Tensor

from hjepa_data.errors import DataError, one_line
from hjepa_data.random import Draws

__all__ = ["ClipError", "ClipInfo", "ClipProblem", "ShortClip", "clip_start", "probe_clip", "read_clip"]

Picture = np.ndarray[Any, np.dtype[np.uint8]]

_REORDER = 4  # frames by which a time stamp may be out of order
_START = 0x57A27


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
    with _opened(path, threads=1) as (container, stream):
        return _info(path, container, stream)


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
    short = ShortClip(short)
    if frames < 1 or start < 0 or (fps is not None and fps <= 0) or (short_side is not None and short_side < 1):
        raise ValueError(
            f"frames={frames}, fps={fps}, start={start}, short_side={short_side}: no clip; allowed: frames >= 1, "
            "fps > 0 or None, start >= 0 s, short_side >= 1 or None"
        )
    with _opened(path, threads) as (container, stream):
        info = _info(path, container, stream)
        times = start + np.arange(frames) / (info.fps if fps is None else fps)
        end = info.duration
        # A header may promise more than the file holds: then its real end is known after the first pass.
        for _ in range(2):
            _refuse_short(path, times, end, short)
            pictures, found_end = _pictures_at(container, stream, times % end, 1 / info.fps, short_side)
            if pictures:
                return torch.from_numpy(np.stack(pictures))
            if found_end <= 0:
                break
            end = found_end
    raise ClipError(ClipProblem.undecodable, f"{os.fspath(path)}: no frame can be decoded; encode the video anew")


def _refuse_short(path: str | os.PathLike[str], times: np.ndarray[Any, Any], end: float, short: ShortClip) -> None:
    if short is ShortClip.refuse and times[-1] >= end:
        raise ClipError(
            ClipProblem.too_short,
            f"{os.fspath(path)}: {end:.2f} s are too short for {len(times)} frames up to {times[-1]:.2f} s; "
            "ask for fewer frames, a higher fps or an earlier start, or use short=loop",
        )


@contextmanager
def _opened(path: str | os.PathLike[str], threads: int) -> Iterator[tuple[InputContainer, VideoStream]]:
    name = os.fspath(path)
    if not Path(name).is_file():
        raise ClipError(ClipProblem.missing, f"{name}: no such file; give the path of a local video")
    try:
        # A playlist must not make the reader open anything but files.
        with av.open(name, options={"protocol_whitelist": "file"}) as container:
            if not container.streams.video:
                raise ClipError(ClipProblem.no_video, f"{name}: there is no video stream in it; give a video file")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = threads
            yield container, stream
    except av.error.FFmpegError as error:
        reason = error.strerror or "unknown error"
        raise ClipError(
            ClipProblem.undecodable, f"{name}: cannot be decoded ({reason}); encode the video anew"
        ) from None


def _info(path: str | os.PathLike[str], container: InputContainer, stream: VideoStream) -> ClipInfo:
    rate = stream.average_rate or stream.guessed_rate
    fps = float(rate) if rate else 0.0
    duration = 0.0
    if stream.duration is not None and stream.time_base is not None:
        duration = float(stream.duration * stream.time_base)
    elif container.duration is not None:
        duration = container.duration / av.time_base
    if duration <= 0 or fps <= 0:
        duration, fps = _measure(container, stream)
    if duration <= 0 or fps <= 0:
        raise ClipError(ClipProblem.undecodable, f"{os.fspath(path)}: there are no frames in it; encode the video anew")
    return ClipInfo(duration=duration, fps=fps, width=stream.codec_context.width, height=stream.codec_context.height)


def _measure(container: InputContainer, stream: VideoStream) -> tuple[float, float]:
    """Duration and rate by the time stamps of the packets, without decoding."""
    base = float(stream.time_base or 0)
    stamps = sorted(packet.pts * base for packet in container.demux(stream) if packet.pts is not None)
    _rewind(container, stream)
    if len(stamps) < 2 or stamps[-1] <= stamps[0]:
        return (1.0, 1.0) if stamps else (0.0, 0.0)
    fps = (len(stamps) - 1) / (stamps[-1] - stamps[0])
    return len(stamps) / fps, fps


def _pictures_at(
    container: InputContainer,
    stream: VideoStream,
    times: np.ndarray[Any, Any],
    interval: float,
    short_side: int | None,
) -> tuple[list[Picture], float]:
    """The pictures nearest to each time, or none and the end of the video if it ends before the last of them."""
    wanted = np.unique(times)
    chosen: list[Picture] = []
    size: tuple[int, int] | None = None
    before: tuple[float, VideoFrame] | None = None
    for time, frame in _frames_from(container, stream, float(wanted[0]), interval):
        while len(chosen) < len(wanted) and wanted[len(chosen)] <= time:
            near = frame
            if before is not None and wanted[len(chosen)] - before[0] <= time - wanted[len(chosen)]:
                near = before[1]
            size = size or _size(near, short_side)
            chosen.append(_picture(near, size))
        before = (time, frame)
        if len(chosen) == len(wanted):
            break
    if before is None:
        return [], 0.0
    while len(chosen) < len(wanted) and wanted[len(chosen)] < before[0] + 1.5 * interval:
        size = size or _size(before[1], short_side)
        chosen.append(_picture(before[1], size))
    if len(chosen) < len(wanted):
        return [], before[0] + interval
    return [chosen[i] for i in np.searchsorted(wanted, times)], before[0]


def _frames_from(
    container: InputContainer, stream: VideoStream, start: float, interval: float
) -> Iterator[tuple[float, VideoFrame]]:
    """Frames with their times in seconds, from a keyframe at or before ``start``."""
    base = float(stream.time_base or 0)
    if start > interval and base > 0:
        container.seek(int((start - interval) / base) + (stream.start_time or 0), stream=stream, backward=True)
        timed = timed_frames(container, stream, interval)
        first = next(timed, None)
        if first is not None and first[0] <= start:
            yield first
            yield from timed
            return
    # Seeking overshot, or there was no need of it.
    _rewind(container, stream)
    yield from timed_frames(container, stream, interval)


def timed_frames(container: InputContainer, stream: VideoStream, interval: float) -> Iterator[tuple[float, VideoFrame]]:
    """Decode frames in the order of the decoder, each with its time in seconds, which never falls.

    Args:
        container: The open file, wherever it stands.
        stream: Its video.
        interval: Seconds between two frames, for those that have no time stamp.

    Returns:
        Times from the start of the stream and frames.
    """
    base = float(stream.time_base or 0)
    offset = (stream.start_time or 0) * base
    frames: deque[VideoFrame] = deque()
    stamps: list[float] = []
    last = -interval
    for frame in container.decode(stream):
        time = last + interval if frame.pts is None else frame.pts * base - offset
        last = time
        frames.append(frame)
        heapq.heappush(stamps, time)
        if len(frames) > _REORDER:
            yield heapq.heappop(stamps), frames.popleft()
    while frames:
        yield heapq.heappop(stamps), frames.popleft()


def _rewind(container: InputContainer, stream: VideoStream) -> None:
    container.seek(stream.start_time or 0, stream=stream, backward=True)


def _size(frame: VideoFrame, short_side: int | None) -> tuple[int, int]:
    """Width and height to which all frames of the clip are brought."""
    shrink = 1.0 if short_side is None else min(1.0, short_side / min(frame.width, frame.height))
    return max(1, round(frame.width * shrink)), max(1, round(frame.height * shrink))


def _picture(frame: VideoFrame, size: tuple[int, int]) -> Picture:
    pixels = frame.reformat(width=size[0], height=size[1], format="rgb24").to_ndarray()
    # The display matrix turns counter-clockwise, as rot90 does.
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns))
