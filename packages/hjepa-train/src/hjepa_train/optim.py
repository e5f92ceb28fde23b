"""AdamW and the parameter groups of a transformer: what has a direction decays, what is an offset does not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW; the learning rate and the weight decay come from schedules."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    no_decay_names: tuple[str, ...] = ("bias", "token", "position", "pos_embed", "register")
    """A parameter whose own name (after the last dot) contains one of these words has no weight decay."""
    fused: bool | None = None
    """One kernel for all parameters; None means fused on CUDA and for-each on a CPU."""

    def __post_init__(self) -> None:
        """Refuse what AdamW cannot do."""
        self.betas = (float(self.betas[0]), float(self.betas[1]))
        self.no_decay_names = tuple(self.no_decay_names)
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas={self.betas}: out of range; allowed: 0 <= beta < 1")
        if self.eps <= 0.0:
            raise ValueError(f"eps={self.eps}: not positive; allowed: above 0, e.g. 1e-8")

    def build(self, module: nn.Module) -> torch.optim.AdamW:
        """Return the optimizer of the module's trainable parameters."""
        groups = parameter_groups(module, no_decay_names=self.no_decay_names)
        on_cuda = all(parameter.is_cuda for group in groups for parameter in group["params"])
        fused = on_cuda if self.fused is None else self.fused
        foreach = None if fused else True
        return torch.optim.AdamW(groups, lr=0.0, betas=self.betas, eps=self.eps, fused=fused, foreach=foreach)


def decays(name: str, parameter: torch.Tensor, no_decay_names: tuple[str, ...]) -> bool:
    """Tell whether a parameter is pulled to zero: matrices and kernels are, vectors and named tokens are not.

    >>> decays("blocks.0.mlp.weight", torch.zeros(4, 2), ("token",))
    True
    >>> decays("norm.weight", torch.zeros(4), ("token",)), decays("mask_token", torch.zeros(1, 1, 4), ("token",))
    (False, False)
    """
    leaf = name.rpartition(".")[2]
    return parameter.ndim > 1 and not any(word in leaf for word in no_decay_names)


def parameter_groups(
    module: nn.Module, *, no_decay_names: tuple[str, ...] = OptimizerConfig().no_decay_names
) -> list[dict[str, list[nn.Parameter]]]:
    """Split the trainable parameters into one group that decays and one that does not.

    Args:
        module: The trained module; frozen parameters (a target branch) are left out.
        no_decay_names: Words in a parameter's own name that keep it from decaying.

    Returns:
        `[decay, no_decay]`; the second group has `weight_decay` 0 in every optimizer step.

    Raises:
        ValueError: Where nothing is trainable.
    """
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[0 if decays(name, parameter, no_decay_names) else 1].append(parameter)
    if not any(groups):
        raise ValueError(f"{type(module).__name__}: no trainable parameter; leave requires_grad on online")
    return [{"params": groups[0]}, {"params": groups[1]}]


def set_rates(optimizer: torch.optim.Optimizer, *, learning_rate: float, weight_decay: float) -> None:
    """Set this step's rates on the groups that `parameter_groups` made."""
    for index, group in enumerate(optimizer.param_groups):
        group["lr"] = learning_rate
        group["weight_decay"] = weight_decay if index == 0 else 0.0
