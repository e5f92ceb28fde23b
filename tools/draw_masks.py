"""Show what the mask laws of hjepa-data do to each place of a 14x14 grid.

python tools/draw_masks.py docs/images/masks.png    # how often each cell is context and target, one column a law
python tools/draw_masks.py --rows                   # the same by row, as a table, with the budgets
python tools/draw_masks.py --time                   # milliseconds for 256 images, on one thread of the CPU
python tools/draw_masks.py --time --device cuda
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from hjepa_data.masks import (
    BlockMaskConfig,
    CellLaw,
    HierarchicalMaskConfig,
    MaskConfig,
    Masks,
    MultiBlockConfig,
    RandomMaskConfig,
    ReleasedMaskConfig,
)

GRID = (14, 14)
STEPS, IMAGES = 400, 64
TIMED, WARM, BATCH = 100, 10, 256
EXAMPLE_STEP, EXAMPLE_SAMPLE = 6, 2
LAWS: dict[str, MaskConfig] = {
    "multi-block": MultiBlockConfig(grid=GRID),
    "released\nbatch 16": ReleasedMaskConfig(grid=GRID, batch_size=16),
    "released\nbatch 128": ReleasedMaskConfig(grid=GRID, batch_size=128),
    "released\nbatch 1024": ReleasedMaskConfig(grid=GRID, batch_size=1024),
    "block": BlockMaskConfig(grid=GRID),
    "random": RandomMaskConfig(grid=GRID),
    "hierarchical\nmulti-block": HierarchicalMaskConfig(grid=GRID, level=1),
    "hierarchical\nrandom": HierarchicalMaskConfig(grid=GRID, level=1, law=CellLaw.random),
}


def marked(masks: Masks) -> tuple[Tensor, Tensor]:
    """Mark the context and the targets of each image on its grid, [B, h, w]."""
    context = torch.zeros(len(masks.context), GRID[0] * GRID[1])
    target = torch.zeros_like(context).scatter_(1, masks.targets.flatten(1), 1)
    return context.scatter_(1, masks.context, 1).view(-1, *GRID), target.view(-1, *GRID)


def marginals(config: MaskConfig) -> tuple[Tensor, Tensor]:
    """Measure how often each cell is context, and target, [h, w]."""
    sampler, sample = config.build(seed=0), torch.arange(IMAGES)
    drawn = [marked(sampler(step, sample)) for step in range(STEPS)]
    context, target = (torch.cat(sets).mean(0) for sets in zip(*drawn, strict=True))
    return context, target


def draw(output: Path) -> None:
    """Write the heat maps as a PNG."""
    # Times are also taken where there is nothing to draw with.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 * len(LAWS), 6.6), dpi=84, layout="constrained")
    axes = figure.subplots(3, len(LAWS))
    for column, (name, config) in enumerate(LAWS.items()):
        sampler = config.build(seed=0)
        context, target = marked(sampler(EXAMPLE_STEP, torch.arange(EXAMPLE_SAMPLE, EXAMPLE_SAMPLE + 1)))
        example = axes[0, column].imshow(
            (context + 2 * target)[0], cmap=ListedColormap(["#e6e6e6", "#2c7fb8", "#f28e2b"]), vmin=0, vmax=2
        )
        example.axes.set_title(f"{name}\nKc {config.num_context_tokens}, Kt {config.num_target_tokens}", fontsize=10)
        for row, probability in enumerate(marginals(config), start=1):
            heat = axes[row, column].imshow(probability, cmap="magma", vmin=0, vmax=1)
    for row, label in enumerate(("one draw", "P(context)", "P(target)")):
        axes[row, 0].set_ylabel(label)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(heat, ax=axes[1:, -1], shrink=0.8)
    FigureCanvasAgg(figure)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def print_rows() -> None:
    """Print the budgets of each law and how often a cell of the rows is context."""
    whole = ReleasedMaskConfig(grid=GRID, batch_size=1).num_context_tokens
    places = (0, 4, 9, 12, 13)
    print("law                         Kc    Kt  P(context) in row " + " ".join(f"{place + 1:>5}" for place in places))
    for name, config in LAWS.items():
        rows = marginals(config)[0].mean(1)
        print(
            f"{name.replace(chr(10), ' '):<26}{config.num_context_tokens:>4}{config.num_target_tokens:>6}{'':>19}"
            + " ".join(f"{float(rows[place]):>5.2f}" for place in places)
        )
    for size in (16, 128, 1024):
        kept = ReleasedMaskConfig(grid=GRID, batch_size=size).num_context_tokens
        print(f"released, batch {size}: {kept} of {whole} context cells, {1 - kept / whole:.0%} are cut off")


def measure(config: MaskConfig, device: torch.device) -> float:
    """Measure the median milliseconds of one call for 256 images."""
    # Other programs on the same cores cost wall time and no processor time.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    sampler, sample, times = config.build(seed=0), torch.arange(BATCH, device=device), []
    for step in range(WARM + TIMED):
        begin = clock()
        sampler(step, sample)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - begin)
    return 1000 * sorted(times[WARM:])[TIMED // 2]


def print_times(device: torch.device) -> None:
    """Print the time of every law."""
    torch.set_num_threads(1)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "processor time of one CPU thread"
    print(f"{BATCH} images on {GRID[0]}x{GRID[1]}, {where}, median of {TIMED} calls")
    for name, config in LAWS.items():
        print(f"{name.replace(chr(10), ' '):<26}{measure(config, device):>6.2f} ms")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, help="write the heat maps to this PNG")
    parser.add_argument("--rows", action="store_true", help="print how often the rows are context")
    parser.add_argument("--time", action="store_true", help="print the time of a call for 256 images")
    parser.add_argument("--device", default="cpu", help="where --time draws: cpu (default) or cuda")
    arguments = parser.parse_args()
    if not (arguments.output or arguments.rows or arguments.time):
        parser.error("say what to show: a file OUT.png, --rows or --time")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device={arguments.device}: torch sees no CUDA device; allowed here: cpu")
    if arguments.output:
        if arguments.output.suffix != ".png":
            parser.error(f"{arguments.output}: the picture is a PNG; name it .png")
        draw(arguments.output)
    if arguments.rows:
        print_rows()
    if arguments.time:
        print_times(torch.device(arguments.device))


if __name__ == "__main__":
    main()
