"""Batch norm whose statistics span all processes."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hjepa_models.distributed import all_reduce_mean


class GlobalBatchNorm(nn.Module):
    """Batch norm over the rows of every process, so that the split of a batch does not change the result.

    The statistics go through a differentiable mean over processes that hold equally many rows; the running ones, used
    in evaluation, follow with `momentum`.
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

    def forward(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        """Return the normalised rows, in float32 at least."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.training:
            mean = all_reduce_mean(x.mean(0))
            variance = all_reduce_mean((x - mean).square().mean(0))
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)
        else:
            mean, variance = self.running_mean, self.running_var
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias
