"""Muon for matrices and kernels and AdamW for the rest, as one optimizer with one state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Of the published quintic, and how often it is applied.
_COEFFICIENTS, _ROUNDS, _EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7
_CPU_NUMBERS = 2**19


class MuonWithAdamW(torch.optim.Optimizer):
    """Steps groups with `muon=True` by Muon and the others by `torch.optim.AdamW`.

    Muon is `torch.optim.Muon` with Nesterov momentum, but the matrices of one shape go through each product together:
    a model of 12 blocks has 60 products to a step and not 720. Its update is scaled to the root mean square of AdamW's,
    so that one learning rate serves both. The kernel of a convolution is the matrix that its output channels are the
    rows of.

    Args:
        groups: Parameter groups; each has `params` and `muon` (bool, its parameters are matrices or kernels).
        betas: Of AdamW.
        eps: Of AdamW.
        fused: Of AdamW; a fused step is left out where `found_inf` says so, as under a gradient scaler.
        momentum: Of Muon.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the scale is that of Liu et
    al., arXiv 2502.16982, section 2.2.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        fused: bool,
        momentum: float,
    ) -> None:
        rest = [group for group in groups if not group["muon"]]
        matrices = [{"lr": 0.0, "weight_decay": 0.0, **group} for group in groups if group["muon"]]
        self._adamw = torch.optim.AdamW(
            rest, lr=0.0, betas=betas, eps=eps, fused=fused, foreach=None if fused else True
        )
        self._momentum = momentum
        self._step_supports_amp_scaling = fused
        super().__init__([*self._adamw.param_groups, *matrices], {})
        self._share()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; the two parts share it."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step both parts."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        bad: Tensor | None = getattr(self, "found_inf", None)
        self._adamw.found_inf, self._adamw.grad_scale = bad, None  # type: ignore[attr-defined]
        self._adamw.step()
        for group in self.param_groups:
            if group["muon"]:
                for matrices in _of_one_shape(group["params"]):
                    self._step_matrices(matrices, group["lr"], group["weight_decay"], None if bad is None else bad > 0)
        return loss

    def _step_matrices(
        self, matrices: list[Tensor], rate: float, weight_decay: float, bad: Bool[Tensor, ""] | None
    ) -> None:
        """Step matrices of one shape; where `bad` is True they and their momentum stay bit for bit."""
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        gradient = torch.stack([matrix.grad for matrix in matrices if matrix.grad is not None])
        before = torch.stack(buffers)
        mean = before.lerp(gradient, 1 - self._momentum)
        update = orthogonalize(gradient.lerp(mean, self._momentum).flatten(2))
        scale = rate * 0.2 * max(update.shape[1:]) ** 0.5
        # In the type of the matrices, or a GPU adds to each in a kernel of its own.
        update = update.view(gradient.shape).to(gradient.dtype)
        keep: float | Tensor = 1 - rate * weight_decay
        if bad is not None:
            mean, update = torch.where(bad, before, mean), torch.where(bad, 0.0, update)
            keep = torch.where(bad, 1.0, keep)
        torch._foreach_copy_(buffers, list(mean))
        torch._foreach_mul_(matrices, keep)
        torch._foreach_add_(matrices, list(update), alpha=-scale)

    def _share(self) -> None:
        """Let AdamW work on this optimizer's groups and state, so that there is one of each to save."""
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]


def orthogonalize(matrices: Float[Tensor, "n A B"]) -> Float[Tensor, "n A B"]:
    r"""Bring the singular values of each matrix to about 1 (0.7 to 1.2), in bfloat16.

    Five rounds of $X \leftarrow a X + (b G + c G^2) X$ with $G = X X^T$, from $X / \|X\|_F$.

    Args:
        matrices: All at once; tall ones are worked on as wide ones.

    Source: Jordan et al. (2024), section "Newton-Schulz"; the coefficients are theirs.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_EPS)
    for _ in range(_ROUNDS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _of_one_shape(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group those that have a gradient, on a CPU into groups that fit its caches."""
    found: defaultdict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            found[parameter.shape].append(parameter)
    groups = []
    for same in found.values():
        size = max(1, _CPU_NUMBERS // same[0].numel()) if same[0].is_cpu else len(same)
        groups += [same[first : first + size] for first in range(0, len(same), size)]
    return groups
