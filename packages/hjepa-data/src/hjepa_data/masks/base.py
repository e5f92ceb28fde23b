"""What all mask laws share: the masks of a batch, the sampler that draws them, and the choice of a constant number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["MaskSampler", "Masks"]

LAST = (1 << 63) - 1
"""The key of a place that must not be kept."""

_HOST = torch.device("cpu")
_Constants = TypeVar("_Constants", bound=NamedTuple)


@dataclass(kw_only=True, slots=True)
class Masks:
    """Which tokens are seen and which are predicted, as ascending flat indices on the grid.

    Attributes:
        context: tokens that the model sees.
        targets: tokens of each block that it predicts; disjoint from the context, blocks may overlap one another.
    """

    context: Int[Tensor, "B Kc"]
    targets: Int[Tensor, "B M Kt"]


class MaskSampler(Protocol):
    """What every law builds: masks as a pure function of (seed, step, sample), on the device of ``sample``."""

    def __call__(self, step: int, sample: Int[Tensor, " B"]) -> Masks:
        """Draw the masks of a batch.

        Args:
            step: number of the step.
            sample: number of each image in its source; the masks are drawn on its device.

        Returns:
            Indices of the context and of the targets.
        """
        ...


class OnDevices(Generic[_Constants]):
    """The constant tensors of a sampler, copied once to each device that it draws on.

    Args:
        constants: on the host.
    """

    def __init__(self, constants: _Constants) -> None:
        self._copies = {_HOST: constants}

    def on(self, device: torch.device) -> _Constants:
        """Return the constants on a device."""
        if device not in self._copies:
            constants = self._copies[_HOST]
            self._copies[device] = constants._make(tensor.to(device) for tensor in constants)
        return self._copies[device]


def low_bits(places: int) -> int:
    """Return the mask of the bits that hold a place of so many."""
    return (1 << max(1, (places - 1).bit_length())) - 1


def sort_keys(
    random: Int[Tensor, "*B N"], place: Int[Tensor, " N"], low: Int[Tensor, " N"] | int
) -> Int[Tensor, "*B N"]:
    """Turn random bits into keys of at most ``LAST``, with the place in the ``low`` bits: no two are equal."""
    return (random & (LAST ^ low)).bitwise_or_(place)


def keep(keys: Int[Tensor, "*B N"], count: int) -> Int[Tensor, "*B K"]:
    """Keep the ``count`` places of the smallest keys; ascending."""
    return keys.topk(count, dim=-1, largest=False, sorted=False).indices.sort(dim=-1).values


def repeat_over_time(index: Int[Tensor, "*B K"], num_cells: int, repeats: int) -> Int[Tensor, "*B K2"]:
    """Repeat indices of a spatial grid of ``num_cells`` at each of ``repeats`` times: a tube."""
    if repeats == 1:
        return index
    start = torch.arange(0, repeats * num_cells, num_cells, device=index.device)
    return (index[..., None, :] + start[:, None]).flatten(-2)
