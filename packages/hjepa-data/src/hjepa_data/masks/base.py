"""What all mask laws share: the masks of a batch, the sampler that draws them, and the choice of a constant number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["MaskSampler", "Masks"]

_LAST = (1 << 63) - 1


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


def keep(random: Int[Tensor, "*B N"], allowed: Bool[Tensor, "*B N"], count: int) -> Int[Tensor, "*B K"]:
    """Keep ``count`` of the allowed places, uniformly; ascending."""
    places = random.shape[-1]
    low_bits = (1 << max(1, (places - 1).bit_length())) - 1
    # The place stands in the low bits of its key: no two keys are equal, and no gather is needed to find it.
    key = (random & (_LAST & ~low_bits)) | torch.arange(places, device=random.device)
    key = torch.where(allowed, key, _LAST)
    return key.topk(count, dim=-1, largest=False, sorted=False).values.bitwise_and(low_bits).sort(dim=-1).values


def repeat_over_time(index: Int[Tensor, "*B K"], num_cells: int, repeats: int) -> Int[Tensor, "*B K2"]:
    """Repeat indices of a spatial grid of ``num_cells`` at each of ``repeats`` times: a tube."""
    if repeats == 1:
        return index
    start = torch.arange(repeats, device=index.device) * num_cells
    return (index[..., None, :] + start[:, None]).flatten(-2)
