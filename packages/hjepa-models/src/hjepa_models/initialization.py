"""The one place where weights get their first values."""

import math
from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from hjepa_models.layers.block import Block
from hjepa_models.layers.norm import GlobalBatchNorm
from hjepa_models.layers.patch import ConvStem, LinearStem

M = TypeVar("M", bound=nn.Module)


class Initializable(Protocol):
    """A module that fills its own weights from a generator."""

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every parameter and buffer."""


def construct(make: Callable[[], M], seed: int, device: torch.device | str | None) -> M:
    """Build a module without touching the global generator.

    Args:
        make: builds the module; must define `init_weights(generator)`.
        seed: seed of the weights; the same weights on every device.
        device: where the module goes; "meta" leaves it without storage, to be given some by `to_empty` and filled by
            `init_weights`; None means the CPU.

    Returns:
        The module.
    """
    with torch.device("meta"):
        module = make()
    if device is not None and torch.device(device).type == "meta":
        return module
    module.to_empty(device="cpu")
    cast(Initializable, module).init_weights(torch.Generator().manual_seed(seed))
    return module if device is None else module.to(device)


def truncated_normal_(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill a tensor from a normal law cut at two deviations; drawn on the CPU, so every device gets the same values."""
    with torch.no_grad():
        drawn = torch.empty(tensor.shape, dtype=torch.float32)
        tensor.copy_(nn.init.trunc_normal_(drawn, std=std, a=-2 * std, b=2 * std, generator=generator))


def initialize(module: nn.Module, generator: torch.Generator, std: float = 0.02, *, fan_in: bool = False) -> None:
    """Initialise every layer below `module` in order.

    Linear maps: truncated normal of `std`, zero bias; patch embeddings and convolutions: deviation fan_in^-1/2, so that
    pixels weigh as much as positions whatever the patch; norms: one and zero; LayerScale: its constant; the output
    maps of block number i (from 1) are divided by sqrt(2 i), so that the residual stream keeps its scale with depth.

    Args:
        module: any module of this package on a real device.
        generator: a CPU generator; the only source of randomness.
        std: deviation of the linear maps.
        fan_in: give the linear maps the deviation fan_in^-1/2 instead of `std`.
    """
    from timm.layers import LayerScale

    for child in module.modules():
        if isinstance(child, nn.Linear):
            truncated_normal_(child.weight, child.in_features**-0.5 if fan_in else std, generator)
        elif isinstance(child, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            truncated_normal_(child.weight, math.prod(child.weight.shape[1:]) ** -0.5, generator)
        elif isinstance(child, nn.LayerNorm) and child.elementwise_affine:
            nn.init.ones_(child.weight)
        elif isinstance(child, LayerScale | GlobalBatchNorm):
            child.reset_parameters()
            continue
        else:
            continue
        bias = getattr(child, "bias", None)
        if bias is not None:
            nn.init.zeros_(bias)
    for child in module.modules():
        if isinstance(child, LinearStem | ConvStem):
            truncated_normal_(child.proj.weight, child.proj.in_features**-0.5, generator)
        elif isinstance(child, nn.ModuleList) and len(child) and isinstance(child[0], Block):
            _scale_by_depth(child)


@torch.no_grad()
def _scale_by_depth(blocks: nn.ModuleList) -> None:
    for number, block in enumerate(blocks, start=1):
        assert isinstance(block, Block)
        block.attn.proj.weight.div_(math.sqrt(2 * number))
        output = block.mlp.fc2
        assert isinstance(output, nn.Linear)
        output.weight.div_(math.sqrt(2 * number))
