"""JPEGs of a batch that travel encoded and are decoded on the device (nvJPEG), with the crops of the CPU path."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional

from hjepa_data.errors import one_line, refuse
from hjepa_data.transforms.crop import CropPlan, Interpolation
from hjepa_data.transforms.decode import Upright

__all__ = ["Decode", "Encoded", "check_decoder", "decode_views", "is_plain_jpeg", "turned"]

# Decoded pixels that lie on the device at a time: 256 photographs of 500x375 are 48 million.
_MAX_PIXELS_AT_ONCE = 1 << 26
_END_OF_IMAGE = b"\xff\xd9"


class Decode(StrEnum):
    """Where JPEGs become pixels."""

    CPU = "cpu"
    GPU = "gpu"


@dataclass(kw_only=True, slots=True)
class Encoded:
    """Encoded images of a batch; its other rows come as finished views.

    Attributes:
        data: the files, one after another.
        ends: where each file ends in ``data``.
        rows: row of the batch that each file fills.
        turns: how each image is turned upright (EXIF), or None.
        pixels: of each image.
        plans: crops of each image, upright.
    """

    data: UInt8[Tensor, " bytes"] = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    ends: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    turns: list[Image.Transpose | None] = field(default_factory=list)
    pixels: list[int] = field(default_factory=list)
    plans: list[list[CropPlan]] = field(default_factory=list)

    def add(self, row: int, upright: Upright, size: int, plans: list[CropPlan]) -> None:
        """Note an image of so many bytes; ``data`` is filled when all are known."""
        self.ends.append(size + (self.ends[-1] if self.ends else 0))
        self.rows.append(row)
        self.turns.append(upright.turn)
        self.pixels.append(upright.width * upright.height)
        self.plans.append(plans)

    def files(self) -> list[UInt8[Tensor, " bytes"]]:
        """Bytes of each file, without a copy."""
        return [self.data[start:end] for start, end in zip([0, *self.ends], self.ends, strict=False)]


def is_plain_jpeg(data: bytes, upright: Upright) -> bool:
    """Say whether a device decodes an image as Pillow does: a JPEG in YCbCr that is not cut off.

    Args:
        data: the encoded image.
        upright: its header.
    """
    image = upright.image
    plain = image.format == "JPEG" and image.mode == "RGB" and image.info.get("adobe_transform", 1) == 1
    return plain and data.endswith(_END_OF_IMAGE)


def check_decoder(device: torch.device) -> None:
    """Decode a small image, so that a missing decoder is an error at once and no damage of each image.

    Args:
        device: where images will be decoded.

    Raises:
        ValueError: there is no such device, or torchvision cannot decode on it.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        refuse("decode", "gpu", "there is no CUDA device", "allowed: cpu")
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, format="JPEG")
    try:
        _decode_jpegs([torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)], device)
    except (RuntimeError, ImportError) as error:
        refuse("decode", "gpu", f"torchvision cannot decode on {device} ({one_line(error)})", "allowed: cpu")


def decode_views(
    encoded: Encoded, finished: Sequence[UInt8[Tensor, "F C H W"]], count: int, device: torch.device
) -> tuple[list[UInt8[Tensor, "B C H W"]], list[int]]:
    """Decode, turn upright, crop, resize (antialiased) and flip on the device.

    JPEGs are decoded at full scale, and nvJPEG interpolates colours in its own way: pixels differ from those of the CPU
    path by some grey levels; boxes and flips are the same. What Pillow refuses is found where the device's decoder
    refuses it, too, or the end of the file is missing; damage that only one of them smooths over may differ.

    Args:
        encoded: the images.
        finished: for each view, the rows of the batch that are not among ``encoded``, in order.
        count: rows of the batch.
        device: where to.

    Returns:
        The views, on the device, and the rows that could not be decoded, whose pixels are undefined.
    """
    views = [torch.empty((count, *view.shape[1:]), dtype=torch.uint8, device=device) for view in finished]
    others = sorted(set(range(count)) - set(encoded.rows))
    if others:
        for view, pixels in zip(views, finished, strict=True):
            view[torch.tensor(others, device=device)] = pixels.to(device, non_blocking=True)
    files = encoded.files()
    failed: list[int] = []
    for part in _parts(encoded.pixels):
        for number, image in zip(part, _decode([files[n] for n in part], device), strict=True):
            row = encoded.rows[number]
            if image is None:
                failed.append(row)
                continue
            upright = turned(image, encoded.turns[number])
            for view, (group, (left, top, width, height), flip) in zip(views, encoded.plans[number], strict=True):
                crop = upright[None, :, top : top + height, left : left + width].float()
                resized = functional.interpolate(crop, group.size, mode=str(group.interpolation), antialias=True)
                if group.interpolation is Interpolation.BICUBIC:
                    resized = resized.clamp_(0, 255)
                view[row] = (resized.flip(3) if flip else resized)[0].round_()
    return views, failed


def turned(image: UInt8[Tensor, "C H W"], turn: Image.Transpose | None) -> UInt8[Tensor, "C h w"]:
    """Turn an image as ``PIL.Image.transpose`` does."""
    match turn:
        case None:
            return image
        case Image.Transpose.FLIP_LEFT_RIGHT:
            return image.flip(2)
        case Image.Transpose.FLIP_TOP_BOTTOM:
            return image.flip(1)
        case Image.Transpose.TRANSPOSE:
            return image.mT
        case Image.Transpose.TRANSVERSE:
            return image.flip(1, 2).mT
    quarters = {Image.Transpose.ROTATE_90: 1, Image.Transpose.ROTATE_180: 2, Image.Transpose.ROTATE_270: 3}
    return image.rot90(quarters[turn], (1, 2))


def _parts(pixels: list[int]) -> Iterator[list[int]]:
    """Deal the images, in order, into parts that fit on the device together; a larger one is alone."""
    part: list[int] = []
    total = 0
    for number, size in enumerate(pixels):
        if part and total + size > _MAX_PIXELS_AT_ONCE:
            yield part
            part, total = [], 0
        part.append(number)
        total += size
    if part:
        yield part


def _decode(files: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """Decode files together; if that fails, one by one, with None for those that fail alone, too."""
    try:
        return [*_decode_jpegs(files, device)]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return [None] if len(files) == 1 else [image for file in files for image in _decode([file], device)]


def _decode_jpegs(files: list[Tensor], device: torch.device) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg  # type: ignore[import-untyped, unused-ignore]

    if device.type == "cuda":
        # Its memory is this stream's, but nvJPEG writes there on a stream of its own, which does not wait for what is
        # still queued here: crops of images that have been let go would be cut out of the next ones.
        torch.cuda.current_stream(device).synchronize()
    with warnings.catch_warnings():
        # torchvision 0.29 announces that its decoders will move to torchcodec; older ones say nothing.
        warnings.filterwarnings("ignore", category=DeprecationWarning, message="The image decoding and encoding cap")
        images: list[Tensor] = decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
    return images
