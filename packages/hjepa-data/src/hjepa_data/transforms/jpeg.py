"""JPEGs by libjpeg-turbo, straight into an array, at the scale and down to the row that suffice."""

from __future__ import annotations

import re

import numpy as np
import simplejpeg  # type: ignore[import-untyped, unused-ignore]
from jaxtyping import UInt8
from PIL import Image

__all__ = ["can_decode_jpeg", "decode_jpeg"]

_END_OF_IMAGE = b"\xff\xd9"
_BLOCK = 8
# Sequential frames of Huffman-coded blocks: baseline and extended.
_FRAMES = frozenset({0xC0, 0xC1})
# Segments that may precede the frame: tables, the restart interval, APP0 to APP15 and comments.
_TABLES = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})
# What libjpeg says of rows behind those of the header: restart markers or the end of the image follow.
_ROWS_LEFT = re.compile(r"Corrupt JPEG data: \d+ extraneous bytes before marker 0xd[0-79]")


def can_decode_jpeg(data: bytes, image: Image.Image) -> bool:
    """Say whether ``decode_jpeg`` is for an image: a JPEG, in colour or grey, that is not cut off.

    Args:
        data: the encoded image.
        image: its header.
    """
    plain = image.format == "JPEG" and image.mode in {"RGB", "L"} and image.width >= _BLOCK
    return plain and data.endswith(_END_OF_IMAGE)


def decode_jpeg(data: bytes, image: Image.Image, scale: int, rows: int) -> UInt8[np.ndarray, "H W *C"] | None:
    """Decode a JPEG from its top down to a row; the pixels are those that Pillow finds.

    Sequential frames are coded from top to bottom: under a header that tells of fewer rows the decoder stops there, and
    only looks for markers in what follows.

    Args:
        data: an encoded image that ``can_decode_jpeg``.
        image: its header.
        scale: how many times smaller it is decoded: 1, 2, 4 or 8.
        rows: rows that are needed, at this scale; those that are coded together with them come, too.

    Returns:
        [H, W, 3], or [H, W] of a grey image; None if the decoder stumbled over anything in what it read.

    Source: ITU-T T.81, B.2.2 (frame header).
    """
    file, height = _cut_below(data, image.height, rows, scale)
    small, width = -(-height // scale), -(-image.width // scale)
    pixels = np.empty((small, width) if image.mode == "L" else (small, width, 3), dtype=np.uint8)
    try:
        if simplejpeg.decode_jpeg_header(file)[:2] != (height, image.width):
            # The limit on pixels was held against another header.
            return None
        colors = "GRAY" if image.mode == "L" else "RGB"
        simplejpeg.decode_jpeg(file, colors, min_height=small, min_width=width, buffer=pixels)
    except ValueError as error:
        # It tells of the first thing that is wrong, or of what made it give up.
        if file is data or not _ROWS_LEFT.fullmatch(str(error)):
            return None
    return pixels


def _cut_below(data: bytes, height: int, rows: int, scale: int) -> tuple[bytes | bytearray, int]:
    """Give the file a header of fewer rows, if that is enough, and say how many."""
    start = _find_frame(data)
    if start is None:
        return data, height
    sampling = max(data[start + 11 + 3 * component] & 15 for component in range(data[start + 9]))
    # Colours of fewer rows are interpolated from the row below.
    needed = (rows + sampling) * scale
    unit = max(1, sampling) * _BLOCK
    kept = -(-needed // unit) * unit
    if kept >= height:
        return data, height
    file = bytearray(data)
    file[start + 5 : start + 7] = kept.to_bytes(2, "big")
    return file, kept


def _find_frame(data: bytes) -> int | None:
    """Find the header of a sequential frame; None if something else than tables precedes it."""
    start = 2
    while start + 10 < len(data) and data[start] == 0xFF:
        marker, size = data[start + 1], int.from_bytes(data[start + 2 : start + 4], "big")
        if marker in _FRAMES:
            whole = size >= 8 + 3 * data[start + 9] > 8 and start + size < len(data)
            return start if whole else None
        if marker not in _TABLES:
            return None
        start += 2 + size
    return None
