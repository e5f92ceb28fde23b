"""Write webdataset shards: deterministic tars of ``<key>.jpg|png|webp`` and ``<key>.cls``, each with its index."""

from __future__ import annotations

import io
import operator
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from PIL import Image, ImageOps

from hjepa_data.errors import DataError, one_line, refuse
from hjepa_data.shards.index import IMAGE_EXTENSIONS, MAX_LABEL_BYTES, index_path, write_index

__all__ = ["ImageLike", "ShardWriter", "encode_png", "image_extension", "write_shards"]

ImageLike = bytes | np.ndarray[Any, Any] | Image.Image

_MAGIC = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"))


def image_extension(data: bytes) -> str | None:
    """Tell the extension of encoded image bytes from their first bytes.

    Args:
        data: the content of a file.

    Returns:
        ``jpg``, ``png`` or ``webp``; None for anything else.
    """
    for magic, extension in _MAGIC:
        if data.startswith(magic):
            return extension
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def encode_png(image: np.ndarray[Any, Any] | Image.Image) -> bytes:
    """Encode pixels without loss.

    Args:
        image: uint8 [H, W, 3] or [H, W], or a PIL image.

    Returns:
        The bytes of a PNG.
    """
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


class ShardWriter:
    """Write samples into ``<prefix>-000000.tar``, ``<prefix>-000001.tar``, ... of a folder.

    A shard carries its name only when it is complete: it is written aside, closed and renamed, and its index is
    written beside it. The same samples give the same bytes.

    Args:
        folder: where the shards go; made if missing.
        prefix: first part of the names.
        samples_per_shard: samples after which a shard is closed, or None.
        max_bytes: size after which a shard is closed, or None.
        first: number of the first shard.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        prefix: str = "train",
        samples_per_shard: int | None = None,
        max_bytes: int | None = 256 << 20,
        first: int = 0,
    ) -> None:
        if samples_per_shard is not None and samples_per_shard < 1:
            refuse("samples_per_shard", samples_per_shard, "a shard holds at least one sample", "allowed: 1 and more")
        if max_bytes is not None and max_bytes < 1:
            refuse("max_bytes", max_bytes, "a shard has a size", "allowed: 1 and more bytes")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.prefix = prefix
        self.shards: list[Path] = []
        self.num_samples = 0
        self._limits = (samples_per_shard or 1 << 62, max_bytes or 1 << 62)
        self._next = first
        self._file: IO[bytes] | None = None
        self._tar: Any = None
        self._in_shard: set[str] = set()

    def write(self, image: ImageLike, *, label: int | None = None, key: str | None = None) -> None:
        """Add a sample.

        Args:
            image: encoded JPEG, PNG or WebP bytes, or pixels (uint8 [H, W, 3] or a PIL image, which is turned upright),
                which are stored as PNG.
            label: class number; None, or -1, if it is unknown.
            key: name of the sample in its shard, without a dot; by default its number.

        Raises:
            DataError: this is no image of a known format, the label is no class number, the key has a dot or is that
                of another sample of the shard, or there is such a shard already.
        """
        try:
            if isinstance(image, Image.Image):
                image = ImageOps.exif_transpose(image)
            data = image if isinstance(image, bytes) else encode_png(image)
        except (AttributeError, TypeError, OSError, SyntaxError) as error:
            raise DataError(
                one_line(
                    f"sample {self.num_samples} is no image ({error}); allowed: bytes of "
                    f"{', '.join(IMAGE_EXTENSIONS)}, uint8 [H, W, 3] or [H, W], or a PIL image that PNG can hold"
                )
            ) from None
        extension = image_extension(data)
        if extension is None:
            raise DataError(f"sample {self.num_samples} is no image; allowed: bytes of {', '.join(IMAGE_EXTENSIONS)}")
        key = f"{self.num_samples:09d}" if key is None else key
        if not key or "." in key or key.startswith("/"):
            raise DataError(f"key '{key}': a sample's key has no dot, no leading slash and is not empty")
        if key in self._in_shard:
            raise DataError(f"key '{key}': the shard has a sample of that key; a reader would see one of them only")
        members: dict[str, Any] = {"__key__": key, extension: data}
        if label is not None:
            members["cls"] = self._label(label)
        self._tar_for_next().write(members)
        self._in_shard.add(key)
        self.num_samples += 1
        assert self._file is not None
        if len(self._in_shard) >= self._limits[0] or self._file.tell() >= self._limits[1]:
            self._finish()

    def close(self) -> None:
        """Finish the last shard."""
        if self._file is not None:
            self._finish()

    def abort(self) -> None:
        """Drop the shard that is not complete."""
        if self._file is not None:
            # On a full disk the end of the tar cannot be written either.
            with suppress(OSError):
                self._tar.close()
            with suppress(OSError):
                self._file.close()
            Path(self._file.name).unlink(missing_ok=True)
            self._file = self._tar = None
            self._in_shard.clear()

    def _label(self, label: int) -> bytes:
        try:
            text = str(operator.index(label))
        except TypeError:
            text = ""
        if not (text.isdigit() and len(text) <= MAX_LABEL_BYTES) and text != "-1":
            raise DataError(
                f"label {label!r} of sample {self.num_samples} is no class number; allowed: 0 and more, of up to "
                f"{MAX_LABEL_BYTES} digits, or -1 or None if it is unknown"
            )
        return text.encode()

    def _tar_for_next(self) -> Any:  # noqa: ANN401 (webdataset has no types)
        if self._file is None:
            # webdataset takes a while to import, and only writers need it.
            from webdataset import TarWriter

            name = f"{self.prefix}-{self._next:06d}.tar"
            if (self.folder / name).exists():
                raise DataError(f"'{self.folder / name}' is there already; remove it, or give another folder or prefix")
            self._file = open(self.folder / f".{name}.tmp", "wb")  # noqa: SIM115 (closed with the shard)
            self._tar = TarWriter(
                self._file,
                user="hjepa",
                group="hjepa",
                mode=0o644,
                mtime=0,
                encoder=False,
                compress=False,
                format="PAX_FORMAT",
            )
        return self._tar

    def _finish(self) -> None:
        assert self._file is not None
        self._tar.close()
        self._file.close()
        shard = self.folder / f"{self.prefix}-{self._next:06d}.tar"
        index_path(shard).unlink(missing_ok=True)
        os.replace(self._file.name, shard)
        write_index(shard)
        self.shards.append(shard)
        self._file = self._tar = None
        self._next += 1
        self._in_shard.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abort()


def write_shards(
    images: Iterable[ImageLike | tuple[ImageLike, int]],
    folder: str | os.PathLike[str],
    *,
    prefix: str = "train",
    samples_per_shard: int | None = None,
    max_bytes: int | None = 256 << 20,
) -> list[Path]:
    """Write images, with or without labels, into shards.

    Args:
        images: images, or pairs (image, class number); an image is encoded bytes or pixels.
        folder: where the shards go.
        prefix: first part of their names.
        samples_per_shard: samples after which a shard is closed, or None.
        max_bytes: size after which a shard is closed, or None.

    Returns:
        The shards.

    Raises:
        DataError: something is no image, or there are such shards already.
    """
    with ShardWriter(folder, prefix=prefix, samples_per_shard=samples_per_shard, max_bytes=max_bytes) as writer:
        for item in images:
            if isinstance(item, tuple):
                writer.write(item[0], label=item[1])
            else:
                writer.write(item)
    return writer.shards
