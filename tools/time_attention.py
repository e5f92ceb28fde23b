"""Time the fused attention of a CPU beside the plain softmax, which `attention=auto` chooses by.

python tools/time_attention.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from hjepa_models.layers.attention import AttentionBackend, attend
from hjepa_models.layers.positions import Place

# Images, heads, tokens, width of a head.
SHAPES = (
    (64, 4, 16, 32), (8, 6, 49, 64), (8, 6, 196, 64), (8, 12, 189, 32), (4, 6, 576, 64), (2, 6, 1024, 64),
    (1, 6, 2048, 64),
)  # fmt: skip
WARM, TIMED = 2, 8


def shortest(work: Callable[[], object]) -> float:
    """Return the milliseconds of the fastest of some calls: other work on the machine only adds to them."""
    for _ in range(WARM):
        work()
    times = []
    for _ in range(TIMED):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


def time_both(shape: tuple[int, int, int, int], dtype: torch.dtype, trained: bool) -> list[float]:
    """Return the milliseconds of the fused kernel and of the plain softmax, with their backward pass if `trained`."""
    times = []
    for backend in (AttentionBackend.sdpa, AttentionBackend.explicit):
        parts = [torch.randn(shape, dtype=dtype, requires_grad=trained) for _ in range(3)]

        def work(parts: list[torch.Tensor] = parts, backend: AttentionBackend = backend) -> None:
            mixed = attend(parts[0], parts[1], parts[2], Place(), backend)
            if trained:
                torch.autograd.grad(mixed.sum(), parts)

        times.append(shortest(work))
    return times


def main() -> None:
    """Print a line for each number format and shape."""
    torch.set_num_threads(1)
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            for trained in (False, True):
                fused, plain = time_both(shape, dtype, trained)
                name = "forward and backward" if trained else "forward"
                print(f"{dtype} {shape} {name}: fused {fused:.2f} ms, plain {plain:.2f} ms, ratio {fused / plain:.2f}")


if __name__ == "__main__":
    main()
