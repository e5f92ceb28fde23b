"""Optimizers and the parameter groups of a transformer: what has a direction decays, what is an offset does not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from hjepa_train.errors import choice
from hjepa_train.extra import load
from hjepa_train.muon import MuonWithAdamW


class OptimizerKind(StrEnum):
    """What turns gradients into steps."""

    adamw = "adamw"
    muon = "muon"
    lion = "lion"
    lars = "lars"


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW, Muon for matrices and kernels, Lion or LARS; learning rate and weight decay come from schedules."""

    kind: OptimizerKind = OptimizerKind.adamw
    """`adamw`; `muon` for what `muon_names` names and AdamW for the rest; `lion` or `lars`, of timm."""
    muon_names: tuple[str, ...] = ("blocks.",)
    """Matrices, and kernels of convolutions, whose full name contains one of these words are Muon's."""
    muon_scale: float = 1.0
    """Learning rate of Muon's part over that of AdamW's."""
    muon_momentum: float = 0.95
    """Decay of Muon's running mean of the gradient."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square; Lion (0.9, 0.99): of its update and its memory."""
    momentum: float = 0.9
    """LARS: decay of the running sum of its steps."""
    trust: float = 0.001
    """LARS: largest relative change of a matrix in a step of learning rate 1."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    no_decay_names: tuple[str, ...] = (
        "bias", "token", "position", "pos_embed", "register", "table", "frequencies", "logits",
    )  # fmt: skip
    """A parameter whose own name (after the last dot, or that of the list that it is in) contains one of these words
    has no weight decay."""
    fused: bool | None = None
    """One kernel for all parameters; None means fused on CUDA and for-each on a CPU."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        self.no_decay_names = tuple(self.no_decay_names)
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas={self.betas}: out of range; allowed: two numbers, each 0 <= beta < 1")
        self.betas = (float(self.betas[0]), float(self.betas[1]))
        self.kind = choice(OptimizerKind, "kind", self.kind)
        self.muon_names = tuple(self.muon_names)
        if not 0.0 <= self.muon_momentum < 1.0:
            raise ValueError(f"muon_momentum={self.muon_momentum}: out of range; allowed: 0 <= momentum < 1")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum={self.momentum}: out of range; allowed: 0 <= momentum < 1")
        if not 0.0 < self.trust < math.inf:
            raise ValueError(f"trust={self.trust}: not positive; allowed: above 0, e.g. 0.001")
        if not 0.0 < self.muon_scale < math.inf:
            raise ValueError(f"muon_scale={self.muon_scale}: not positive; allowed: above 0, e.g. 1")
        if not 0.0 < self.eps < math.inf:
            raise ValueError(f"eps={self.eps}: not positive; allowed: above 0, e.g. 1e-8")

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of the module's trainable parameters.

        Raises:
            ValueError: Where nothing is trainable, `kind=muon` finds no matrix, or timm is not installed.
        """
        groups = parameter_groups(module, no_decay_names=self.no_decay_names)
        on_cuda = all(parameter.is_cuda for group in groups for parameter in group["params"])
        fused = on_cuda if self.fused is None else self.fused
        if self.kind is OptimizerKind.muon:
            groups = self._split_off_muon(module, groups)
            momentum = self.muon_momentum
            return MuonWithAdamW(groups, betas=self.betas, eps=self.eps, fused=fused, momentum=momentum)
        if self.kind is not OptimizerKind.adamw:
            return self._of_timm(groups)
        # A step counter on the device lets the guard undo a step there.
        return torch.optim.AdamW(
            groups,
            lr=0.0,
            betas=self.betas,
            eps=self.eps,
            fused=fused,
            foreach=None if fused else True,
            capturable=on_cuda and not fused,
        )

    def _of_timm(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        optimizers = load("timm.optim", f"optimizer.kind={self.kind}", "timm")
        made: torch.optim.Optimizer
        if self.kind is OptimizerKind.lion:
            made = optimizers.Lion(groups, lr=0.0, betas=self.betas)
        else:
            # Matrices are adapted whatever their weight decay; norms, biases and tokens never.
            adapted = [{**group, "always_adapt": group["decays"]} for group in groups]
            made = optimizers.Lars(adapted, lr=1.0, momentum=self.momentum, trust_coeff=self.trust)
        return made

    def _split_off_muon(self, module: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        chosen = {
            parameter
            for name, parameter in module.named_parameters()
            if parameter.ndim >= 2 and any(word in name for word in self.muon_names)
        }
        decay = groups[0]
        matrices = [parameter for parameter in decay["params"] if parameter in chosen]
        if not matrices:
            words = ", ".join(self.muon_names)
            raise ValueError(f"kind=muon: no trainable matrix is named by muon_names={words}; use kind=adamw")
        decay["params"] = [parameter for parameter in decay["params"] if parameter not in chosen]
        muon = {"params": matrices, "decays": True, "rate": self.muon_scale}
        return [{**decay, "muon": False}, {**groups[1], "muon": False}, {**muon, "muon": True}]


def decays(name: str, parameter: torch.Tensor, no_decay_names: tuple[str, ...]) -> bool:
    """Tell whether a parameter is pulled to zero: matrices and kernels are, vectors and named tokens are not.

    >>> decays("blocks.0.mlp.weight", torch.zeros(4, 2), ("token",))
    True
    >>> decays("norm.weight", torch.zeros(4), ("token",)), decays("mask_token", torch.zeros(1, 1, 4), ("token",))
    (False, False)
    >>> decays("cell_logits.0", torch.zeros(4, 2), ("logits",))
    False
    """
    leaf = next((word for word in reversed(name.split(".")) if not word.isdigit()), "")
    return parameter.ndim > 1 and not any(word in leaf for word in no_decay_names)


def parameter_groups(
    module: nn.Module, *, no_decay_names: tuple[str, ...] = OptimizerConfig().no_decay_names
) -> list[dict[str, Any]]:
    """Split the trainable parameters into one group that decays and one that does not.

    Args:
        module: The trained module; frozen parameters (a target branch) are left out.
        no_decay_names: Words in a parameter's own name that keep it from decaying.

    Returns:
        `[decay, no_decay]`; the second group has `decays` False, and so `weight_decay` 0 in every optimizer step.

    Raises:
        ValueError: Where nothing is trainable.
    """
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[0 if decays(name, parameter, no_decay_names) else 1].append(parameter)
    if not any(groups):
        raise ValueError(f"{type(module).__name__}: no trainable parameter; leave requires_grad on online")
    return [{"params": groups[0], "decays": True}, {"params": groups[1], "decays": False}]


def set_rates(optimizer: torch.optim.Optimizer, *, learning_rate: float, weight_decay: float) -> None:
    """Set this step's rates on the groups that `parameter_groups` made."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("rate", 1.0)
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
