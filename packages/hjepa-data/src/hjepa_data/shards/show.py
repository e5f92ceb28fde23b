"""A contact sheet of shards: samples drawn by a seed, with their labels, as one PNG or one HTML file."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hjepa_data.errors import DataError, one_line, refuse
from hjepa_data.shards.index import index_shard
from hjepa_data.transforms.decode import SkipImageError, check_max_pixels, open_image

__all__ = ["SheetConfig", "SheetSample", "draw_samples", "read_classes", "sheet_html", "sheet_png"]

_MAX_COUNT = 10_000
_CAPTION_LINES = 2
_LINE, _FONT, _GAP = 15, 12, 10
_INK, _PALE, _PAPER, _TILE = (28, 30, 34), (110, 114, 122), (255, 255, 255), (236, 238, 241)


@dataclass(kw_only=True, slots=True)
class SheetConfig:
    """What a contact sheet shows.

    Attributes:
        count: samples; all of them if there are fewer.
        seed: of the draw.
        tile: longest side of a picture, pixels.
        max_pixels: larger images are not decoded.
    """

    count: int = 64
    seed: int = 0
    tile: int = 144
    max_pixels: int = 89_478_485

    def __post_init__(self) -> None:
        if not 1 <= self.count <= _MAX_COUNT:
            refuse("count", self.count, "no number of samples for a sheet", f"allowed: 1 to {_MAX_COUNT}")
        check_max_pixels(self.max_pixels)
        if self.seed < 0:
            refuse("seed", self.seed, "negative", "allowed: 0 and more")
        if not 16 <= self.tile <= 1024:
            refuse("tile", self.tile, "no size of a picture on a sheet", "allowed: 16 to 1024 pixels")


@dataclass(kw_only=True, slots=True)
class SheetSample:
    """One sample of a sheet.

    Attributes:
        shard: name of its shard.
        key: its name in there.
        label: class number, -1 if unknown.
        name: name of its class; empty if unknown.
        size: width and height upright, pixels; None for a damaged image.
        image: the picture, small; None for a damaged image.
        problem: why it is damaged.
    """

    shard: str
    key: str
    label: int
    name: str
    size: tuple[int, int] | None = None
    image: Image.Image | None = None
    problem: str = ""

    @property
    def caption(self) -> str:
        """Class name and number, as far as they are known."""
        if self.label < 0:
            return "no label"
        return f"{self.name} ({self.label})" if self.name else f"class {self.label}"

    @property
    def detail(self) -> str:
        """Size, or what is wrong."""
        return self.problem if self.size is None else f"{self.size[0]} x {self.size[1]}"


def read_classes(shards: Sequence[Path], path: Path | None = None) -> list[str]:
    """Read the names of classes.

    Args:
        shards: tar files; ``classes.json`` beside the first is taken if no path is given.
        path: a JSON list of names by class number.

    Returns:
        The names; empty if there is no such file beside the shards.

    Raises:
        DataError: the file is missing or is no list of names.
    """
    file = path or shards[0].parent / "classes.json"
    if path is None and not file.is_file():
        return []
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"class list '{file}' cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f'class list \'{file}\' is no JSON list of names, such as ["cat", "dog"]')
    return names


def draw_samples(shards: Sequence[Path], classes: Sequence[str], config: SheetConfig) -> tuple[list[SheetSample], int]:
    """Draw samples uniformly from all shards, without repetition.

    Args:
        shards: tar files.
        classes: names by class number.
        config: how many, and by which seed.

    Returns:
        The samples, and how many there are in all shards.

    Raises:
        DataError: a shard is missing, damaged, or holds no image.
    """
    with ThreadPoolExecutor(8) as pool:
        indexes = list(pool.map(index_shard, shards))
    ends = np.cumsum([len(index) for index in indexes])
    total = int(ends[-1])
    drawn = np.random.default_rng(config.seed).choice(total, min(config.count, total), replace=False)
    samples = []
    for number in drawn.tolist():
        place = int(np.searchsorted(ends, number, side="right"))
        index, row = indexes[place], number - int(ends[place]) + len(indexes[place])
        label = int(index.labels[row])
        sample = SheetSample(
            shard=shards[place].name,
            key=index.keys[row],
            label=label,
            name=classes[label] if 0 <= label < len(classes) else "",
        )
        _fill(sample, _read(shards[place], int(index.offsets[row]), int(index.sizes[row])), config)
        samples.append(sample)
    return samples, total


def _read(shard: Path, offset: int, size: int) -> bytes:
    try:
        with open(shard, "rb") as file:
            return os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise DataError(f"shard '{shard}' cannot be read: {error.strerror}") from None


def _fill(sample: SheetSample, data: bytes, config: SheetConfig) -> None:
    try:
        upright = open_image(data, max_pixels=config.max_pixels)
        image = upright.decode(max(1.0, max(upright.width, upright.height) / config.tile / 2))
    except SkipImageError as skip:
        sample.problem = str(skip.reason).replace("_", " ")
        return
    sample.size = (upright.width, upright.height)
    # A copy drops the file behind the image.
    sample.image = image.convert("RGB")
    sample.image.thumbnail((config.tile, config.tile), Image.Resampling.BICUBIC)


def sheet_png(samples: Sequence[SheetSample], title: str, config: SheetConfig) -> bytes:
    """Draw a contact sheet.

    Args:
        samples: at least one.
        title: line above them.
        config: size of the pictures.

    Returns:
        The bytes of a PNG.
    """
    columns = ceil(len(samples) ** 0.5)
    rows = -(-len(samples) // columns)
    wide, high = config.tile + _GAP, config.tile + _CAPTION_LINES * _LINE + _GAP
    font = ImageFont.load_default(_FONT)
    title_lines = _wrapped(title, font, columns * wide - _GAP)
    top = _GAP + len(title_lines) * _LINE + _GAP // 2
    sheet = Image.new("RGB", (columns * wide + _GAP, top + rows * high + _GAP // 2), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(title_lines):
        pen.text((_GAP, _GAP + number * _LINE), line, fill=_INK, font=font)
    for number, sample in enumerate(samples):
        left, upper = _GAP + number % columns * wide, top + number // columns * high
        pen.rectangle((left, upper, left + config.tile - 1, upper + config.tile - 1), fill=_TILE)
        if sample.image is not None:
            width, height = sample.image.size
            sheet.paste(sample.image, (left + (config.tile - width) // 2, upper + (config.tile - height) // 2))
        for row, (text, ink) in enumerate(((sample.caption, _INK), (sample.detail, _PALE))):
            place = (left, upper + config.tile + 2 + row * _LINE)
            pen.text(place, _fitting(text, font, config.tile), fill=ink, font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _fitting(text: str, font: _Font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _wrapped(text: str, font: _Font, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [_fitting(line, font, width) for line in lines]


_STYLE = """\
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e22; --pale: #62666e; --tile: #eceef1; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #e8eaee; --pale: #9a9fa8; --tile: #24272d; } }
body { margin: 24px; background: var(--paper); color: var(--ink); font: 14px/1.4 system-ui, sans-serif; }
h1 { font-size: 18px; margin: 0 0 4px; overflow-wrap: anywhere; }
p { margin: 0 0 16px; color: var(--pale); }
main { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(TILEpx, 1fr)); }
figure { margin: 0; min-width: 0; }
figure div { height: TILEpx; background: var(--tile); border-radius: 4px; display: flex; align-items: center;
  justify-content: center; color: var(--pale); }
figcaption { overflow-wrap: anywhere; line-height: 1.3; padding-top: 4px; }
small { color: var(--pale); font-size: 11px; display: block; }
"""


def sheet_html(samples: Sequence[SheetSample], title: str, config: SheetConfig) -> bytes:
    """Write a contact sheet as one file that needs no other and runs no script.

    Args:
        samples: at least one.
        title: line above them.
        config: size of the pictures.

    Returns:
        The bytes of an HTML page.
    """
    heading, _, rest = title.partition(": ")
    figures = "\n".join(_figure(sample) for sample in samples)
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE.replace('TILE', str(config.tile))}</style></head>\n"
        f"<body><h1>{html.escape(heading)}</h1>\n<p>{html.escape(rest)}</p>\n<main>\n{figures}\n</main></body></html>\n"
    ).encode("utf-8", "replace")


def _figure(sample: SheetSample) -> str:
    if sample.image is None:
        picture = html.escape(sample.problem)
    else:
        buffer = io.BytesIO()
        sample.image.save(buffer, format="JPEG", quality=88)
        data = base64.b64encode(buffer.getvalue()).decode()
        picture = f'<img alt="{html.escape(sample.caption)}" src="data:image/jpeg;base64,{data}">'
    where = html.escape(one_line(f"{sample.shard}: {sample.key}"))
    return (
        f"<figure><div>{picture}</div><figcaption>{html.escape(sample.caption)}"
        f"<small>{html.escape(sample.detail)}</small><small>{where}</small></figcaption></figure>"
    )
