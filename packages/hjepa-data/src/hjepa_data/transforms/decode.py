"""Decode one image: refuse what is unsafe, read JPEGs at the smallest scale that suffices, turn it upright."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from hjepa_data.errors import refuse
from hjepa_data.transforms.jpeg import can_decode_jpeg, decode_jpeg

__all__ = ["SMALLEST_SHRINK", "SkipImageError", "SkipReason", "Upright", "check_max_pixels", "open_image"]

_FORMATS = ("JPEG", "PNG", "WEBP")
# Of files that are no members of shards. Never all that Pillow knows: it hands EPS to Ghostscript, a program.
_FILE_FORMATS = (*_FORMATS, "BMP", "GIF", "JPEG2000", "PPM", "TIFF")
_EXIF_ORIENTATION = 0x0112
_JPEG_SCALES = (8, 4, 2)
SMALLEST_SHRINK = min(_JPEG_SCALES)
# What Pillow's decoders raise for damaged files.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    struct.error,
    zlib.error,
)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def check_max_pixels(max_pixels: int) -> None:
    """Refuse a limit on the pixels of an image that none can keep, or that Pillow does not let it reach."""
    most = sys.maxsize if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS
    if not 1 <= max_pixels <= most:
        refuse("max_pixels", max_pixels, "no limit on pixels", f"allowed: 1 to {most}, what Pillow opens")


class SkipReason(StrEnum):
    """Why an image is left out."""

    EMPTY = "empty"
    UNDECODABLE = "undecodable"
    TRUNCATED = "truncated"
    TOO_LARGE = "too_large"
    UNKNOWN_RANGE = "unknown_range"
    UNREADABLE = "unreadable"


class SkipImageError(Exception):
    """An image is left out; the reason is counted.

    Args:
        reason: what is counted.
        detail: more about it, in one line.
    """

    def __init__(self, reason: SkipReason, detail: str = "") -> None:
        super().__init__(detail or reason.value)
        self.reason = reason


@dataclass(slots=True)
class Upright:
    """An opened image whose pixels may not be decoded yet.

    Attributes:
        image: the image as it is stored.
        turn: how it is turned upright (EXIF), or None.
        width: width upright, at full scale, pixels.
        height: height upright, at full scale, pixels.
        jpeg: the file, if it is a JPEG that libjpeg-turbo decodes as Pillow does and that stands upright; else empty.
    """

    image: Image.Image
    turn: Image.Transpose | None
    width: int
    height: int
    jpeg: bytes = b""

    def scale(self, shrink: float) -> int:
        """Choose the scale of ``decode`` and ``pixels``.

        Args:
            shrink: how many times smaller than full scale is still large enough.

        Returns:
            8, 4, 2 or 1 for JPEGs, how many times smaller they are decoded; 1 for the others.
        """
        scales = _JPEG_SCALES if self.image.format == "JPEG" else ()
        return next((scale for scale in scales if scale <= shrink), 1)

    def pixels(self, scale: int, rows: int) -> UInt8[np.ndarray, "H W *C"]:
        """Decode the pixels down to a row.

        What libjpeg-turbo gives up is decoded by Pillow, whose verdict counts for every file.

        Args:
            scale: of ``scale``.
            rows: rows that are needed, at this scale.

        Returns:
            Upright pixels, [H, W, 3] or grey [H, W], of at least so many rows and the whole width.

        Raises:
            SkipImageError: the file is damaged.
        """
        fast = decode_jpeg(self.jpeg, self.image, scale, rows) if self.jpeg else None
        return np.array(self.decode(scale)) if fast is None else fast

    def decode(self, shrink: float) -> Image.Image:
        """Decode the pixels.

        Args:
            shrink: how many times smaller than full scale is still large enough; JPEGs are decoded at the next
                smaller of 1, 2, 4 and 8, the others at full scale.

        Returns:
            The upright image, in mode RGB or L.

        Raises:
            SkipImageError: the file is damaged.
        """
        image = self.image
        try:
            if (scale := self.scale(shrink)) > 1:
                image.draft(None, (max(1, image.width // scale), max(1, image.height // scale)))
            image.load()
            if image.mode not in {"RGB", "L"}:
                image = _to_rgb(image)
        except _DECODER_ERRORS as error:
            cut = isinstance(error, OSError | EOFError) and "truncated" in str(error)
            raise SkipImageError(SkipReason.TRUNCATED if cut else SkipReason.UNDECODABLE) from None
        if self.turn is not None:
            return image.transpose(self.turn)
        return image


def open_image(data: bytes | Image.Image, *, max_pixels: int, any_format: bool = False) -> Upright:
    """Read the header of an encoded image.

    Args:
        data: bytes of a JPEG, PNG or WebP file, or an image that Pillow opened.
        max_pixels: images with more pixels are refused before they are decoded.
        any_format: also read BMP, GIF, JPEG 2000, PPM and TIFF.

    Returns:
        The image, with its pixels not decoded yet.

    Raises:
        SkipImageError: the bytes are empty, no image, or of an image that is too large or whose pixels are integers of
            32 bits or floats: nobody says which of them is white.
    """
    if not data:
        raise SkipImageError(SkipReason.EMPTY)
    # The decoder of WebP takes memory for all pixels as soon as it is opened.
    width, height = _webp_size(data) if isinstance(data, bytes) else (0, 0)
    if width * height > max_pixels:
        raise SkipImageError(SkipReason.TOO_LARGE)
    try:
        if isinstance(data, Image.Image):
            image = data
        else:
            image = Image.open(io.BytesIO(data), formats=_FILE_FORMATS if any_format else _FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise SkipImageError(SkipReason.TOO_LARGE) from None
    except _DECODER_ERRORS:
        raise SkipImageError(SkipReason.UNDECODABLE) from None
    width, height = image.size
    if width * height > max_pixels:
        raise SkipImageError(SkipReason.TOO_LARGE)
    # Of PNG and PNM files Pillow calls 16 bits so, too.
    if image.mode == "F" or (image.mode == "I" and image.format not in {"PNG", "PPM"}):
        raise SkipImageError(SkipReason.UNKNOWN_RANGE)
    orientation = _orientation(image)
    turn = _TURNS.get(orientation)
    if orientation in {5, 6, 7, 8}:
        width, height = height, width
    jpeg = data if isinstance(data, bytes) and turn is None and can_decode_jpeg(data, image) else b""
    return Upright(image=image, turn=turn, width=width, height=height, jpeg=jpeg)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1)) if "exif" in image.info else 1
    except _DECODER_ERRORS:
        # Damaged EXIF says nothing of the pixels.
        return 1


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height in the header of a WebP; (0, 0) for anything else.

    Source: RFC 9649, sections 2.5 to 2.7.
    """
    header = data[12:30]
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(header) < 18:
        return 0, 0
    if header[:4] == b"VP8X":
        return 1 + int.from_bytes(header[12:15], "little"), 1 + int.from_bytes(header[15:18], "little")
    if header[:4] == b"VP8L":
        bits = int.from_bytes(header[9:13], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(header[14:16], "little") & 0x3FFF, int.from_bytes(header[16:18], "little") & 0x3FFF


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow would clip it to white instead of scaling it.
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if isinstance(image.info.get("transparency"), bytes):
        # A palette with transparency, which is dropped as any other is; without this step Pillow warns of it.
        image = image.convert("RGBA")
    return image.convert("RGB")
