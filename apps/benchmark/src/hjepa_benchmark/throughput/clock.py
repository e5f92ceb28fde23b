"""Wall time of work on a device."""

import time
from collections.abc import Callable

import torch


def milliseconds(work: Callable[[], object], device: torch.device, lead: Callable[[], object] | None = None) -> float:
    """Time one call, from an idle device to an idle device.

    Args:
        work: what is timed.
        device: where it runs.
        lead: on a GPU, work that goes before: the time is then the device's own, with the host ahead of it as in a run.
    """
    if lead is not None and device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        lead()
        begin.record()
        work()
        end.record()
        wait(device)
        return float(begin.elapsed_time(end))
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return 1e3 * (time.perf_counter() - began)


def wait(device: torch.device) -> None:
    """Let the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
