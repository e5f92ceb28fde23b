"""Helpers for tests and examples: short videos of a picture that moves, whose frames tell their number."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
import torch
from av.video.stream import VideoStream
from jaxtyping import Int, UInt8
from torch import Tensor

__all__ = ["frame_numbers", "moving_frames", "write_clip", "write_moving_clip"]

Frames = np.ndarray[Any, np.dtype[np.uint8]]

_BITS = 8
_SIDE = 8  # pixels of a square that shows one bit


def moving_frames(count: int, *, size: tuple[int, int] = (96, 128), seed: int = 0) -> UInt8[Tensor, "T H W 3"]:
    """Make frames of a window that moves over a smooth coloured texture; squares at the top show the frame's number.

    Args:
        count: Number of frames, at most 256.
        size: Height and width, pixels; the width holds the 8 squares.
        seed: Of the texture.

    Returns:
        The frames; frame i shows the texture from (i, 2 i) on, as light squares for the bits of i that are set.
    """
    assert 0 < count <= 2**_BITS
    assert size[0] > _SIDE
    assert size[1] >= _BITS * _SIDE
    height, width = size[0] + count, size[1] + 2 * count
    generator = torch.Generator().manual_seed(seed)
    texture = torch.zeros(1, 3, height, width)
    for cells in (4, 12, 36):
        noise = torch.rand(1, 3, cells, cells, generator=generator)
        texture += torch.nn.functional.interpolate(noise, (height, width), mode="bicubic") / 3
    pixels = (texture[0].clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0)
    frames = torch.stack([pixels[i : i + size[0], 2 * i : 2 * i + size[1]] for i in range(count)])
    for i in range(count):
        for bit in range(_BITS):
            frames[i, :_SIDE, bit * _SIDE : (bit + 1) * _SIDE] = 235 if i >> bit & 1 else 20
    return frames


def frame_numbers(frames: UInt8[Tensor, "T H W 3"]) -> Int[Tensor, " T"]:
    """Read the numbers that moving_frames writes into frames, also after lossy coding."""
    squares = frames[:, :_SIDE, : _BITS * _SIDE].float().mean(-1).reshape(len(frames), _SIDE, _BITS, _SIDE)
    bits = squares[:, 2:-2, :, 2:-2].mean((1, 3)) > 128
    numbers: Tensor = (bits.long() << torch.arange(_BITS)).sum(1)
    return numbers


def write_clip(
    path: str | os.PathLike[str],
    frames: UInt8[Tensor, "T H W 3"],
    *,
    fps: int = 30,
    stamps: Sequence[int] | None = None,
    b_frames: int = 0,
    rotation: int = 0,
    codec: str = "mpeg4",
) -> None:
    """Write frames as a video; the suffix of the path chooses the container.

    Args:
        path: Where to.
        frames: RGB frames.
        fps: Frames a second, and the unit of ``stamps``.
        stamps: Time of each frame in units of 1 / fps; None: 0, 1, 2, ...
        b_frames: Frames between two that may refer to both.
        rotation: Degrees counter-clockwise by which a player turns the frames.
        codec: An encoder of FFmpeg.
    """
    with av.open(os.fspath(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.bit_rate = 4_000_000
        stream.codec_context.gop_size = 12
        stream.codec_context.max_b_frames = b_frames
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        for number, pixels in enumerate(frames.numpy()):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number if stamps is None else stamps[number]
            frame.time_base = Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_moving_clip(path: str | os.PathLike[str], *, seconds: float = 2.0, fps: int = 30, seed: int = 0) -> None:
    """Write a video of moving_frames.

    Args:
        path: Where to.
        seconds: Its length.
        fps: Frames a second.
        seed: Of the texture.
    """
    write_clip(path, moving_frames(round(seconds * fps), seed=seed), fps=fps)
