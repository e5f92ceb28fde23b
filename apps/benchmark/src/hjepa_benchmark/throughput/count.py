"""What a step asks of the machine: operations, graph breaks, host synchronisations; and what the machine can give."""

import logging
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hjepa_benchmark.throughput.clock import milliseconds
from hjepa_benchmark.throughput.step import TrainingStep
from hjepa_data import normalize
from hjepa_train.precision import Precision

_COUNTED = 8


def operations(step: TrainingStep) -> float:
    """Floating-point operations of matrix products in forward and backward, mean over `every` steps.

    They are counted on a few images, eagerly and with explicit attention, and scaled to the batch. Optimizer, EMA and
    everything element by element are left out, as usual, and so is what `trainer.recompute` does once more.

    Args:
        step: neither compiled nor told to recompute yet.
    """
    whole, counted = step.batch, min(_COUNTED, len(step.batch))
    step.batch = type(whole)(
        views=tuple(view[:counted] for view in whole.views),
        labels=whole.labels[:counted],
        sample=whole.sample[:counted],
        epoch=whole.epoch[:counted],
        crops=tuple(crop[:counted] for crop in whole.crops),
    )
    total = 0
    try:
        for number in range(step.every):
            with sdpa_kernel(SDPBackend.MATH), _counter() as counter:
                step.forward_backward(number)
            total += counter.get_total_flops()
    finally:
        step.batch = whole
        step.optimizer.zero_grad(set_to_none=True)
    return total / step.every * (len(whole) / counted)


def operations_of(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products of one call."""
    with sdpa_kernel(SDPBackend.MATH), _counter() as counter:
        work()
    return int(counter.get_total_flops())


def _counter() -> FlopCounterMode:
    # Torch counts no product that ends in GELU.
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten._addmm_activation: _product})


def _product(_bias: torch.Size, rows: torch.Size, columns: torch.Size, **_named: object) -> int:
    return 2 * rows[0] * rows[1] * columns[1]


def matmul_peak(precision: Precision, device: torch.device, *, seconds: float = 0.5) -> float:
    """Operations a second of a large square matrix product, the best of a few sizes.

    Args:
        precision: of the product.
        device: where it runs.
        seconds: time for each size.
    """
    best = 0.0
    for size in (4096, 8192, 16384) if device.type == "cuda" else (512, 1024):
        a, b = (torch.randn(size, size, device=device).to(precision.dtype) for _ in range(2))
        milliseconds(lambda a=a, b=b: a @ b, device)  # type: ignore[misc] # kernels are chosen
        times: list[float] = []
        ends = time.perf_counter() + seconds
        while len(times) < 3 or (time.perf_counter() < ends and len(times) < 50):
            times.append(milliseconds(lambda a=a, b=b: a @ b, device))  # type: ignore[misc]
        best = max(best, 2 * size**3 / (statistics.median(times) / 1e3))
    return best


def graph_breaks(step: TrainingStep) -> int:
    """Places where `torch.compile` would cut the forward pass of a model that is not compiled."""
    config, batch = step.config, step.batch
    views = [normalize(view, config.data.mean, config.data.std) for view in batch.views]
    context, targets = step.draw_masks()
    level = logging.getLogger("torch._dynamo").level
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            explain = torch._dynamo.explain(step.task.run_model)
            found = explain(views, context, targets, batch.labels, step.step_of(0), batch.crops)
    finally:
        logging.getLogger("torch._dynamo").setLevel(level)
        torch._dynamo.reset()
    return int(found.graph_break_count)


def compiled_graph_breaks(first: Callable[[], object]) -> int:
    """Places where the compiler cut what it compiled in the first call of it."""
    counted = torch._dynamo.utils.counters["graph_break"]
    counted.clear()
    first()
    return sum(counted.values())


def host_synchronisations(step: TrainingStep) -> int | None:
    """Times that one step lets the host wait for the device; None on a CPU."""
    if step.device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step(0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(one.message) for one in caught)
