"""Wall time of work on a device."""

import time
from collections.abc import Callable

import torch


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Time one call, from an idle device to an idle device."""
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return 1e3 * (time.perf_counter() - began)


def wait(device: torch.device) -> None:
    """Let the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
