"""Figures of a run, drawn off screen: numbers in, SVG bytes out; of images, PNG bytes."""

import io
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Array = NDArray[Any]
COLORS = ("#0b6e99", "#d9730d", "#0f7b6c", "#6940a5", "#ad1a72", "#64473a")
_CONTEXT, _TARGET = (0.05, 0.45, 0.75), (0.95, 0.45, 0.10)
# Chinese, Japanese and Korean letters of class names, which matplotlib's own font has not: Linux, macOS, Windows.
_CJK = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Droid Sans Fallback", "IPAGothic", "NanumGothic", "Hiragino Sans", "PingFang SC", "Apple SD Gothic Neo",
    "Arial Unicode MS", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic",
)  # fmt: skip
_MISSING = re.compile(r"Glyph (\d+) .*missing from font")


def use_fonts() -> None:
    """Let text take letters that matplotlib's own font has not from fonts that are installed."""
    installed = {font.name for font in fontManager.ttflist}
    plt.rcParams["font.family"] = ["sans-serif", *(name for name in _CJK if name in installed)]


use_fonts()


def png(figure: Figure) -> bytes:
    """Renders a figure to PNG bytes and closes it."""
    return _saved(figure, format="png", dpi=110)


def svg(figure: Figure) -> bytes:
    """Renders a figure to SVG bytes, the same for the same numbers, and closes it."""
    with plt.rc_context({"svg.hashsalt": "hjepa"}):
        return _saved(figure, format="svg", metadata={"Date": None})


def _saved(figure: Figure, **options: Any) -> bytes:  # noqa: ANN401
    """Save a figure and close it; letters that no font has are one line, not a warning each."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", _MISSING.pattern)
        figure.savefig(buffer, bbox_inches="tight", **options)
    plt.close(figure)
    missing: dict[str, None] = {}
    for one in caught:
        if found := _MISSING.match(str(one.message)):
            missing[chr(int(found[1]))] = None
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if missing:
        logger.warning("no font has %s, drawn as boxes; install one that has, such as Noto Sans CJK", "".join(missing))
    return buffer.getvalue()


def legend(axes: Axes) -> None:
    """Names the lines below the axes: no place among them is free, and long curves take seconds to search for one."""
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def literal(name: str) -> str:
    """Returns a name as matplotlib shows it: none of it is mathematics."""
    return name.replace("$", r"\$")


def curves(rows: Sequence[Mapping[str, float]], keys: Sequence[str], title: str, *, smooth: int = 1) -> bytes | None:
    """Draws one line a key over the steps; None if no row has any of the keys.

    Args:
        rows: rows of `metrics.jsonl`.
        keys: which entries to draw.
        title: title of the plot.
        smooth: length of the running mean in rows; the raw curve stays visible behind it.
    """
    lines = {key: [(row["step"], row[key]) for row in rows if key in row] for key in keys}
    lines = {key: points for key, points in lines.items() if points}
    if not lines:
        return None
    figure, axes = plt.subplots(figsize=(5.2, 3.0))
    for number, (key, points) in enumerate(lines.items()):
        color, style = COLORS[number % len(COLORS)], "-" if number < len(COLORS) else "--"
        steps, values = np.asarray(points, dtype=float).T
        label = key.split("/", 1)[-1]
        window = min(smooth, len(values))
        if window > 1:
            axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.8)
            mean = np.convolve(values, np.ones(window) / window, mode="valid")
            axes.plot(steps[window - 1 :], mean, style, color=color, linewidth=1.6, label=label)
        else:
            marker = "o" if len(values) < 20 else None
            axes.plot(steps, values, style, color=color, linewidth=1.6, marker=marker, markersize=3, label=label)
    axes.set(title=title, xlabel="step")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    legend(axes)
    return svg(figure)


def masks(images: Array, grid: tuple[int, int], context: Array, targets: Array) -> bytes:
    """Draws what the context encoder sees and what the predictor has to predict.

    Args:
        images: uint8 [n, H, W, 3].
        grid: rows and columns of patches.
        context: flat indices of the context patches [n, Kc].
        targets: flat indices of the target blocks [n, M, Kt].
    """
    shown = [
        [_only(image, _cells(index[column], grid)) for column, image in enumerate(images)]
        for index in (context, targets)
    ]
    figure, _ = _three_rows({"image": images, "context": shown[0], "targets": shown[1]})
    return png(figure)


def views(images: Array, pair: tuple[Array, Array], crops: Array, inside: Array) -> bytes:
    """Draws two views of each image, and which patches of the second lie in the first.

    Args:
        images: uint8 [n, H, W, 3].
        pair: the two views, uint8 [n, h, w, 3].
        crops: left, top, width and height as parts of the image, and whether the view is mirrored [2, n, 5].
        inside: for each patch of the second view whether its centre lies in the first [n, rows, columns].
    """
    counted = [_only(view, cells) for view, cells in zip(pair[1], inside, strict=True)]
    figure, axes = _three_rows({"image": images, "seen": pair[0], "predicted": counted})
    for column, image in enumerate(images):
        height, width = image.shape[:2]
        for (left, top, across, down, _), edge in zip(crops[:, column], (_CONTEXT, _TARGET), strict=True):
            corner = (left * width - 0.5, top * height - 0.5)
            axes[0, column].add_patch(
                Rectangle(corner, across * width, down * height, fill=False, color=edge, linewidth=1.6)
            )
    return png(figure)


def _three_rows(rows: Mapping[str, Sequence[Array] | Array]) -> tuple[Figure, Array]:
    """Draw images, below each what is seen of it and what has to be predicted, in frames of their colours."""
    count = len(next(iter(rows.values())))
    figure, axes = plt.subplots(3, count, figsize=(1.45 * count, 4.6), squeeze=False)
    for (label, images), line, edge in zip(rows.items(), axes, ("black", _CONTEXT, _TARGET), strict=True):
        line[0].set_ylabel(label)
        for place, image in zip(line, images, strict=True):
            place.imshow(image)
            for spine in place.spines.values():
                spine.set_color(edge)
    _bare(axes)
    return figure, axes


def _only(image: Array, cells: Array) -> Array:
    """Return an image that is grey where cells [rows, columns] are false."""
    return np.where(_enlarge(cells, image.shape[:2])[..., None], image, np.full_like(image, 235))


def pca_features(images: Array, levels: Mapping[str, Array]) -> bytes:
    """Colours every token by the first three principal components of its level.

    Args:
        images: uint8 [n, H, W, 3].
        levels: features [n, rows, columns, D] by level.
    """
    figure, axes = plt.subplots(
        1 + len(levels), len(images), figsize=(1.45 * len(images), 1.5 * (1 + len(levels))), squeeze=False
    )
    for column, image in enumerate(images):
        axes[0, column].imshow(image)
    axes[0, 0].set_ylabel("image")
    for row, (name, features) in enumerate(levels.items(), start=1):
        colored = principal_colors(features)
        for column in range(len(images)):
            axes[row, column].imshow(colored[column], interpolation="nearest")
        axes[row, 0].set_ylabel(name)
    _bare(axes)
    return png(figure)


def principal_colors(features: Array) -> Array:
    """Maps features [n, rows, columns, D] to colours [n, rows, columns, 3] in [0, 1] by their first principal axes.

    Each axis is scaled between its 2nd and 98th percentile; axes that the data does not span are left grey.
    """
    flat = features.reshape(-1, features.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(0)
    axes = np.linalg.svd(flat, full_matrices=False)[2][:3]
    projected = np.full((len(flat), 3), 0.5)
    projected[:, : len(axes)] = flat @ axes.T
    low, high = np.percentile(projected, (2, 98), axis=0)
    span = high - low
    scaled = np.where(span > 1e-9, (projected - low) / np.where(span > 1e-9, span, 1.0), 0.5)
    return np.clip(scaled, 0, 1).reshape(*features.shape[:-1], 3)


def neighbours(
    queries: Array, found: Array, labels: Sequence[str] | None, found_labels: Sequence[Sequence[str]] | None
) -> bytes:
    """Draws each query beside its nearest neighbours; a frame says whether the label agrees.

    Args:
        queries: uint8 [n, H, W, 3].
        found: uint8 [n, k, H, W, 3], nearest first.
        labels: class of each query, or None.
        found_labels: classes of its neighbours, or None.
    """
    count, k = found.shape[:2]
    figure, axes = plt.subplots(count, k + 1, figsize=(1.1 * (k + 1), 1.2 * count), squeeze=False)
    for row in range(count):
        axes[row, 0].imshow(queries[row])
        if labels is not None:
            axes[row, 0].set_ylabel(literal(labels[row]), fontsize=7)
        for column in range(k):
            axis = axes[row, column + 1]
            axis.imshow(found[row, column])
            if labels is not None and found_labels is not None:
                axis.set_xlabel(literal(found_labels[row][column]), fontsize=6, labelpad=1)
                color = "#0f7b6c" if found_labels[row][column] == labels[row] else "#c4554d"
                for spine in axis.spines.values():
                    spine.set(color=color, linewidth=2)
    axes[0, 0].set_title("query", fontsize=8)
    axes[0, 1].set_title("nearest", fontsize=8)
    _bare(axes)
    return png(figure)


def _cells(index: Array, grid: tuple[int, int]) -> Array:
    cells = np.zeros(grid[0] * grid[1], dtype=bool)
    cells[np.asarray(index).reshape(-1)] = True
    return cells.reshape(grid)


def _enlarge(cells: Array, size: tuple[int, ...]) -> Array:
    return np.kron(cells, np.ones((size[0] // cells.shape[0], size[1] // cells.shape[1]), dtype=bool))


def _bare(axes: Array) -> None:
    for axis in axes.reshape(-1):
        axis.set(xticks=[], yticks=[])
