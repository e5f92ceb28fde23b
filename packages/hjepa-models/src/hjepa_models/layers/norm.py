"""Batch norm whose statistics span all processes, and layer norm without parameters."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from hjepa_models.distributed import all_reduce_mean, world_size


class GlobalBatchNorm(nn.Module):
    """Batch norm over the rows (and places) of every process, so that the split of a batch does not change the result.

    The statistics go through a differentiable mean over processes that hold equally many rows; the running ones, used
    in evaluation, follow with `momentum`, the variance as torch's: without bias.
    """

    running_mean: Float[Tensor, " D"]
    running_var: Float[Tensor, " D"]

    def __init__(self, dim: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.register_buffer("running_mean", torch.empty(dim))
        self.register_buffer("running_var", torch.empty(dim))

    def reset_parameters(self) -> None:
        """Start as the identity with standard statistics."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)

    def forward(self, x: Float[Tensor, "n D *S"], track: bool = True) -> Float[Tensor, "n D *S"]:
        """Return normalised channels.

        Args:
            x: rows, or maps with the channels on axis 1.
            track: let the running statistics follow this batch.

        Returns:
            The same shape; float32 at least where the statistics are reduced over processes.
        """
        if not self.training:
            return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if world_size() == 1:
            mean, variance = (self.running_mean, self.running_var) if track else (None, None)
            return functional.batch_norm(x, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
        axes, shape = [axis for axis in range(x.ndim) if axis != 1], (1, -1, *(1,) * (x.ndim - 2))
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = all_reduce_mean(x.mean(axes))
        centred = x - mean.view(shape)
        variance = all_reduce_mean(centred.square().mean(axes))
        if track:
            self._track(mean, variance, x.numel() // x.shape[1] * world_size())
        return centred * (torch.rsqrt(variance + self.eps) * self.weight).view(shape) + self.bias.view(shape)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        unbiased = variance * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)


def normalize(tokens: Float[Tensor, "B K D"]) -> Float[Tensor, "B K D"]:
    """Layer-norm tokens over their channels, without parameters, in float32 at least."""
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return functional.layer_norm(tokens, tokens.shape[-1:])
