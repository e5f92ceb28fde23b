"""Show what it saves to process coarse patches and upsample at the end, against processing the fine patches.

`python tools/measure_hybrid.py` prints tokens, floating-point operations, time and peak memory of one forward and one
backward pass of an encoder, and in brackets how many times less that is than in the first row:

- `fine`: every output patch is a token of the blocks.
- `hybrid`: the blocks see the processing patches, all output tokens are upsampled from theirs.
- `hybrid, scored`: the same, and only the output tokens that a loss would use are upsampled.
- `coarse`: the processing patches alone, nothing is upsampled.

Operations are those of matrix products, counted without running them; attention is the products of queries, keys and
values, as they are without a fused kernel. Memory is the most that is alive beyond the model, its gradients and the
images.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hjepa_models import EncoderConfig
from hjepa_models.layers.attention import AttentionBackend


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of coming by the tokens of an image.

    Attributes:
        name: what it is called in the table.
        config: the encoder.
        outputs: how many tokens are returned.
    """

    name: str
    config: EncoderConfig
    outputs: int

    def step(self, device: torch.device, batch: int, *, bfloat16: bool = False) -> Callable[[], None]:
        """Return a forward and backward pass of a new encoder on the device; gradients add up."""
        config = self.config
        encoder = config.build(device=device)
        images = torch.randn(batch, config.in_channels, *config.image_size, device=device)
        asked: dict[str, Any] = {}
        if config.output_patch_size:
            index = torch.arange(self.outputs, device=device) * (math.prod(config.output_grid) // self.outputs)
            asked = {"output_patch_size": config.output_patch, "output_index": index.expand(batch, -1)}

        def run() -> None:
            with torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext():
                tokens = encoder(images, **asked)
            tokens.float().square().mean().backward()

        return run


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a forward and backward pass costs.

    Attributes:
        attention: operations of the products of queries, keys and values.
        operations: operations of all matrix products.
        seconds: wall time, the median of several passes.
        peak: bytes alive at most, beyond the model, its gradients and the images.
    """

    attention: int
    operations: int
    seconds: float
    peak: int


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows how many bytes the tensors that are made inside hold; a CPU keeps no such count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run an operation and count the storages that it makes."""
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (key := leaf.untyped_storage()._cdata) not in given | self.known:
                storage = leaf.untyped_storage()
                self.known.add(key)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._release, key, storage.nbytes())
        return out

    def _release(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def ways(arguments: argparse.Namespace) -> list[Way]:
    """Return the ways that are compared, the dearest first."""
    image, fine, coarse = ((size,) * 2 for size in (arguments.image, arguments.output, arguments.patch))
    described = {
        "image_size": image,
        "embed_dim": arguments.width,
        "depth": arguments.depth,
        "num_heads": arguments.heads,
    }
    dense = EncoderConfig(**described, patch_size=fine)
    plain = EncoderConfig(**described, patch_size=coarse)
    hybrid = dataclasses.replace(plain, output_patch_size=fine, upsampling=arguments.upsampling)
    return [
        Way(name="fine", config=dense, outputs=dense.num_patches),
        Way(name="hybrid", config=hybrid, outputs=dense.num_patches),
        Way(name="hybrid, scored", config=hybrid, outputs=math.ceil(arguments.scored * dense.num_patches)),
        Way(name="coarse", config=plain, outputs=plain.num_patches),
    ]


def count_operations(way: Way, batch: int) -> tuple[int, int]:
    """Return the operations of attention and of all matrix products, counted on tensors without storage."""
    explicit = dataclasses.replace(way, config=dataclasses.replace(way.config, attention=AttentionBackend.explicit))
    with FlopCounterMode(display=False) as counter:
        explicit.step(torch.device("meta"), batch)()
    by_operator = counter.get_flop_counts()["Global"]
    return by_operator[torch.ops.aten.bmm], counter.get_total_flops()


def measure(way: Way, device: torch.device, batch: int, repeats: int, bfloat16: bool) -> Cost:
    """Return what one way costs."""
    attention, operations = count_operations(way, batch)
    step = way.step(device, batch, bfloat16=bfloat16)
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with LiveBytes() as memory:
            step()
        peak = memory.peak
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return Cost(attention=attention, operations=operations, seconds=statistics.median(seconds), peak=peak)


def table(rows: list[tuple[Way, Cost]]) -> str:
    """Return the costs as a Markdown table."""
    first = rows[0][1]
    lines = [
        "| | tokens in the blocks | tokens out | attention GFLOP | other GFLOP | ms | peak MiB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for way, cost in rows:
        cells = [way.name, f"{way.config.num_patches}", f"{way.outputs}"]
        for value, reference, unit in (
            (cost.attention, first.attention, 1e9),
            (cost.operations - cost.attention, first.operations - first.attention, 1e9),
            (cost.seconds, first.seconds, 1e-3),
            (cost.peak, first.peak, 2**20),
        ):
            ratio = reference / value
            less = "" if way is rows[0][0] else f" ({ratio:.0f}x)" if ratio >= 100 else f" ({ratio:.1f}x)"
            cells.append(f"{value / unit:.4g}{less}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=int, default=64, help="pixels of the image along a side (default 64)")
    parser.add_argument("--patch", type=int, default=8, help="pixels of a processing patch along a side (default 8)")
    parser.add_argument("--output", type=int, default=1, help="pixels of an output patch along a side (default 1)")
    parser.add_argument(
        "--scored", type=float, default=1 / 16, help="share of the outputs that is scored (default 1/16)"
    )
    parser.add_argument("--upsampling", default="bilinear", help="bilinear (default) or learned")
    parser.add_argument("--width", type=int, default=192, help="width of a token (default 192)")
    parser.add_argument("--depth", type=int, default=4, help="blocks (default 4)")
    parser.add_argument("--heads", type=int, default=3, help="attention heads (default 3)")
    parser.add_argument("--batch", type=int, default=1, help="images (default 1)")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes, of which the median is shown (default 3)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--bfloat16", action="store_true", help="run under bfloat16 autocast")
    return parser


def main() -> None:
    """Measure every way and print the table."""
    parser = build_parser()
    arguments = parser.parse_args()
    try:
        compared = ways(arguments)
    except ValueError as error:
        parser.error(str(error))
    device = torch.device(arguments.device)
    rows = [(way, measure(way, device, arguments.batch, arguments.repeats, arguments.bfloat16)) for way in compared]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    precision = "bfloat16 autocast" if arguments.bfloat16 else "float32"
    print(
        f"Image {arguments.image}x{arguments.image}, batch {arguments.batch}, width {arguments.width}, depth "
        f"{arguments.depth}, {arguments.upsampling} upsampling, {precision}, {name}; forward and backward.\n"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
