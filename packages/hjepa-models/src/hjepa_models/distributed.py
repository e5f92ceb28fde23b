"""Statistics over all processes whose gradients are right."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of processes, 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _AllReduceMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # noqa: ANN401
        return _mean(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ANN401
        return _mean(gradients[0])


def _mean(tensor: Tensor) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / dist.get_world_size()


def all_reduce_mean(tensor: Tensor) -> Tensor:
    r"""Return the mean of a tensor over all processes, differentiable.

    The gradient is averaged over the processes too. With a loss that every process computes from the mean, the average
    of the parameters' gradients over processes (what DDP takes) is then the gradient of one process with all rows.

    Args:
        tensor: a statistic of this process's rows, of equal shape everywhere.

    Returns:
        The mean; the tensor itself where there is one process.
    """
    if world_size() == 1:
        return tensor
    out: Tensor = _AllReduceMean.apply(tensor)
    return out
