"""What streams give: a batch of uint8 views with the numbers that say where each image comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

__all__ = ["Batch"]


@dataclass(kw_only=True, slots=True)
class Batch:
    """Images and where they come from.

    Attributes:
        views: uint8 pixels, a tensor for each view.
        labels: class numbers, -1 if unknown.
        sample: number of each image in its source; the same in every epoch and on every layout.
        epoch: epoch in which each image is shown.
        crops: where each view was cut, float32, a tensor for each view: left, top, width and height of the box that was
            drawn, as parts of the width (left, width) and height (top, height) of the upright image, and 1 where the
            view is mirrored, else 0. Empty where it is not known: centre crops, clips, batches made by hand.
    """

    views: tuple[UInt8[Tensor, "B C H W"], ...]
    labels: Int[Tensor, " B"]
    sample: Int[Tensor, " B"]
    epoch: Int[Tensor, " B"]
    crops: tuple[Float[Tensor, "B 5"], ...] = ()

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    @property
    def numbers(self) -> tuple[Tensor, ...]:
        """What is said of the views: labels, sample, epoch and crops."""
        return (self.labels, self.sample, self.epoch, *self.crops)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Copy the batch to a device.

        Args:
            device: where to.
            non_blocking: do not wait for the copy; takes effect from pinned memory.

        Returns:
            The batch on the device.
        """
        return Batch(
            views=tuple(view.to(device, non_blocking=non_blocking) for view in self.views),
            labels=self.labels.to(device, non_blocking=non_blocking),
            sample=self.sample.to(device, non_blocking=non_blocking),
            epoch=self.epoch.to(device, non_blocking=non_blocking),
            crops=tuple(crop.to(device, non_blocking=non_blocking) for crop in self.crops),
        )

    def pin_memory(self) -> Self:
        """Move the batch to pinned memory, from which copies to a GPU need not wait."""
        self.views = tuple(view.pin_memory() for view in self.views)
        self.labels, self.sample, self.epoch, *crops = (tensor.pin_memory() for tensor in self.numbers)
        self.crops = tuple(crops)
        return self

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Say that a CUDA stream uses the batch, so that its memory is not used again before that is done.

        Args:
            stream: other than the one on which the batch was copied.
        """
        for tensor in (*self.views, *self.numbers):
            tensor.record_stream(stream)
