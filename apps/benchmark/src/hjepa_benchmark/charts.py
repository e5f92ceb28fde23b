"""Figures of benchmarks, drawn off screen: numbers in, HTML with vectors out; of images, PNG bytes."""

import base64
import html
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hjepa_eval import Measurement
from hjepa_pretrain.report import figures
from hjepa_pretrain.report.figures import Array, png

COLORS = (*figures.COLORS, "#1f2328", "#8c959f", "#bf8700", "#57ab5a")
HEADS = 6  # that attention is drawn of
Points = Sequence[tuple[float, Measurement]]


def row(pictures: Sequence[str]) -> str:
    """Figures beside one another."""
    return f"<div class=row>{''.join(pictures)}</div>"


def vectors(figure: Figure, title: str) -> str:
    """Close a figure and return it as HTML: vectors, so that it prints; on a narrow screen it scrolls, not shrinks."""
    data = base64.b64encode(figures.svg(figure)).decode()
    image = f'<img alt="{html.escape(title)}" style="max-width:none" src="data:image/svg+xml;base64,{data}">'
    return f'<div style="overflow-x:auto;max-width:100%">{image}</div>'


def bars(groups: Sequence[str], series: Mapping[str, Sequence[Measurement | None]], across: str, title: str) -> str:
    """Draw bars with their intervals, a colour for each series.

    Args:
        groups: names along the axis.
        series: a number for each group by name of the series; None leaves a gap, None alone leaves the series out.
        across: title of the axis of groups.
        title: of the axis of numbers.
    """
    # Series keep the colours that they have in other pictures, where nothing of one was measured here.
    colors = {name: COLORS[number % len(COLORS)] for number, name in enumerate(series)}
    series = {name: values for name, values in series.items() if any(one is not None for one in values)}
    figure, axes = plt.subplots(figsize=(max(3.6, 0.22 * len(groups) * len(series) + 1.4), 2.8))
    # A series with one number, like raw pixels among levels, is a line to compare with.
    counts = {name: sum(one is not None for one in values) for name, values in series.items()}
    lone = {name for name, count in counts.items() if count == 1 < max(counts.values())}
    barred = [name for name in series if name not in lone]
    shown = [at for at in range(len(groups)) if any(series[name][at] is not None for name in barred)]
    width = 0.8 / max(1, len(barred))
    for name, values in series.items():
        color = colors[name]
        if name in lone:
            (one,) = [one for one in values if one is not None]
            axes.axhline(one.value, color=color, linestyle="--", linewidth=1.4, label=_label(name))
            axes.axhspan(one.low, one.high, color=color, alpha=0.13, linewidth=0)
            continue
        known = [(place, found) for place, at in enumerate(shown) if (found := values[at]) is not None]
        offset = (barred.index(name) - (len(barred) - 1) / 2) * width
        places, heights = [place + offset for place, _ in known], [one.value for _, one in known]
        errors = _errors([one for _, one in known])
        axes.bar(places, heights, width * 0.92, color=color, label=_label(name))
        axes.errorbar(places, heights, yerr=errors, fmt="none", ecolor="#1f2328", elinewidth=0.9, capsize=2)
    axes.set_xticks(range(len(shown)), [groups[at] for at in shown], fontsize=9)
    axes.set(xlabel=across, ylabel=title)
    # Student's interval of an accuracy may reach below 0, where nothing is.
    axes.set_ylim(bottom=min(0.0, *(one.value for values in series.values() for one in values if one is not None)))
    _plain(axes)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8, ncols=len(series), loc="lower center", bbox_to_anchor=(0.5, 1))
    return vectors(figure, title)


def lines(
    panels: Mapping[str, Mapping[str, Points]],
    across: str,
    up: str,
    *,
    columns: int = 5,
    doubling: bool = False,
    order: Sequence[str] = (),
) -> str:
    """Draw panels that share their axes, a line with its interval for each series.

    Args:
        panels: points (place, number) by series, by title of the panel.
        across: title of the axis of places.
        up: title of the axis of numbers.
        columns: panels side by side.
        doubling: places lie on a logarithmic axis.
        order: series whose colours are those of other pictures, in the order of those; none: as they come.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    shape = (2.05 * columns + 0.6, 2.0 * rows + 0.5) if columns > 1 else (5.2, 3.2)
    figure, axes = plt.subplots(rows, columns, figsize=shape, squeeze=False, sharey=True)
    names = list(dict.fromkeys([*order, *(name for series in panels.values() for name in series)]))
    for axis, (title, series) in zip(axes.reshape(-1), panels.items(), strict=False):
        for name, points in series.items():
            color = COLORS[names.index(name) % len(COLORS)]
            style = "-" if names.index(name) < len(COLORS) else "--"
            places, known = [place for place, _ in points], [one for _, one in points]
            values = [one.value for one in known]
            axis.plot(places, values, style, color=color, marker="o", markersize=2.5, linewidth=1.2, label=_label(name))
            low, high = _errors(known)
            spread = (np.subtract(values, low), np.add(values, high))
            axis.fill_between(places, *spread, color=color, alpha=0.07, linewidth=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(across, fontsize=8)
        if doubling:
            ticks = sorted({place for points in series.values() for place, _ in points})
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [f"{place:g}" for place in ticks])
        axis.tick_params(labelsize=8)
        _plain(axis)
    for axis in axes[:, 0]:
        axis.set_ylabel(up, fontsize=9)
    for axis in axes.reshape(-1)[len(panels) :]:
        axis.set_visible(False)
    handles = {
        label: handle
        for axis in axes.reshape(-1)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    handles = {shown: handles[shown] for name in names if (shown := _label(name)) in handles}
    figure.tight_layout()
    deep = -(-len(handles) // (2 * columns))
    figure.legend(
        handles.values(), handles.keys(), frameon=False, fontsize=8, loc="upper center",
        ncols=-(-len(handles) // deep), bbox_to_anchor=(0.5, 0),
    )  # fmt: skip
    return vectors(figure, up)


def progress(series: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str) -> str:
    """Draw a line for each series.

    Args:
        series: points (place, number) by name.
        across: title of the axis of places.
        up: title of the axis of numbers.
    """
    figure, axes = plt.subplots(figsize=(5.2, 3.2))
    for number, (name, points) in enumerate(series.items()):
        style = "-" if number < len(COLORS) else "--"
        places, values = zip(*points, strict=True)
        axes.plot(places, values, style, color=COLORS[number % len(COLORS)], linewidth=1.5, label=_label(name))
    axes.set(xlabel=across, ylabel=up)
    axes.locator_params(axis="x", nbins=5)
    _plain(axes)
    figures.legend(axes)
    return vectors(figure, up)


def matrix(values: Array, rows: Sequence[str], columns: Sequence[str], title: str, *, percent: bool = False) -> str:
    """Draw a table of numbers in [0, 1] as a heat map with the numbers in it.

    Args:
        values: [rows, columns]; NaN stays empty.
        rows: names of the rows.
        columns: names of the columns.
        title: of the picture.
        percent: write percentages.
    """
    size = (0.62 * len(columns) + 2.2, 0.42 * len(rows) + 1.3)
    figure, axes = plt.subplots(figsize=size)
    axes.pcolormesh(values, cmap="Blues", vmin=0, vmax=max(1e-9, float(np.nanmax(values))), edgecolors="white")
    axes.invert_yaxis()
    middle = 0.55 * float(np.nanmax(values))
    for row in range(len(rows)):
        for column in range(len(columns)):
            value = float(values[row, column])
            if np.isnan(value):
                continue
            text = f"{100 * value:.0f}" if percent else f"{value:.2f}"
            color = "white" if value > middle else "#1f2328"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8, color=color)
    across, down = (list(map(figures.literal, names)) for names in (columns, rows))
    axes.set_xticks(np.arange(len(columns)) + 0.5, across, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(np.arange(len(rows)) + 0.5, down, fontsize=8)
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=10)
    axes.spines[:].set_visible(False)
    return vectors(figure, title)


def attention(images: Array, maps: Array) -> bytes:
    """Draw which patches are attended to, over all heads and by head.

    Args:
        images: uint8 [n, H, W, 3].
        maps: attention that each patch receives [n, heads, rows, columns].
    """
    shown = np.concatenate([maps.mean(1, keepdims=True), maps[:, :HEADS]], axis=1)
    size = (1.45 * len(images), 1.5 * (1 + shown.shape[1]))
    figure, axes = plt.subplots(1 + shown.shape[1], len(images), figsize=size, squeeze=False)
    for column, image in enumerate(images):
        axes[0, column].imshow(image)
        for row in range(shown.shape[1]):
            axes[row + 1, column].imshow(shown[column, row], cmap="magma", interpolation="nearest")
    labels = ["image", "all heads", *(f"head {head}" for head in range(maps.shape[1]))]
    for row, label in zip(axes, labels, strict=False):
        row[0].set_ylabel(label, fontsize=9)
    for axis in axes.reshape(-1):
        axis.set(xticks=[], yticks=[])
    return png(figure)


def _label(name: str) -> str:
    """The name of a line as matplotlib shows it, and not hidden for its first letter."""
    return (" " if name.startswith("_") else "") + figures.literal(name)


def _errors(known: Sequence[Measurement]) -> tuple[list[float], list[float]]:
    """Distances down and up to the ends of the intervals; 0 where there is none."""
    low = [max(0.0, one.value - one.low) if np.isfinite(one.low) else 0.0 for one in known]
    high = [max(0.0, one.high - one.value) if np.isfinite(one.high) else 0.0 for one in known]
    return low, high


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
