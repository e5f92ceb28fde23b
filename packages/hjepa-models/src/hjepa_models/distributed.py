"""Statistics over all processes whose gradients are right."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


def world_size() -> int:
    """Return the number of processes, 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, 0 where torch.distributed is not initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


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


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # noqa: ANN401
        everyone = tensor.new_empty(len(tensor) * dist.get_world_size(), *tensor.shape[1:])
        dist.all_gather_into_tensor(everyone, tensor.contiguous())
        # A view: compiled by torch 2.11, what a collective wrote into has no gradient and says nothing.
        return everyone.view_as(everyone)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ANN401
        gradient = gradients[0].contiguous()
        mine = gradient.new_empty(len(gradient) // dist.get_world_size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(mine, gradient)
        return mine


def all_gather_rows(tensor: Float[Tensor, "n ..."]) -> Float[Tensor, "rows ..."]:
    r"""Return the rows of all W processes in the order of their ranks, differentiable.

    A row's gradient is the sum of what the losses of all processes send to it. Where the loss of the whole batch is the
    mean of the processes' losses, the average of the parameters' gradients over processes (what DDP takes) is then the
    gradient of one process with all rows: the contract of `all_reduce_mean`.

    Args:
        tensor: this process's rows, equally many everywhere; row i is row `rank() * n + i` of the result.

    Returns:
        The rows; the tensor itself where there is one process.
    """
    if world_size() == 1:
        return tensor
    out: Tensor = _AllGatherRows.apply(tensor)
    return out
