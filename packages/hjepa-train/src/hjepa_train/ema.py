"""The exponential moving average of one branch by another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from hjepa_train.sharded import local


class EMA:
    """Targets that follow their online modules: target = m target + (1 - m) online.

    Parameters and floating-point buffers are averaged in float32; other buffers are copied. With FSDP both
    branches are sharded alike, so that the update is local. It never starts a target: a target is born a copy.

    Args:
        pairs: (online, target) modules of equal structure.

    Raises:
        ValueError: Where names or shapes of a pair differ, or a target is not float32.
    """

    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        self._averaged: list[tuple[Tensor, Tensor]] = []
        self._copied: list[tuple[Tensor, Tensor]] = []
        for online, target in pairs:
            for name, source, copy in _matched(online, target):
                if not copy.is_floating_point():
                    self._copied.append((source, copy))
                elif copy.dtype is torch.float32:
                    self._averaged.append((source, copy))
                else:
                    raise ValueError(
                        f"EMA target {name}: {copy.dtype}; a momentum near 1 needs float32; keep the target in float32"
                    )

    @torch.no_grad()
    def update(self, momentum: float, *, unless: Bool[Tensor, ""] | None = None) -> None:
        """Move the targets once, after a real optimizer step.

        Args:
            momentum: m, between 0 (copy) and 1 (stay).
            unless: On the device: where it is True nothing moves, and the host does not wait to hear of it.
        """
        if self._averaged:
            online = [_laid_out(local(source).float(), local(copy)) for source, copy in self._averaged]
            target = [local(copy) for _, copy in self._averaged]
            if unless is None:
                torch._foreach_lerp_(target, online, 1.0 - momentum)
            else:
                # A step of SGD towards the online tensors by a decay of -1: target - (m - 1) (online - target), one
                # kernel that reads on the device whether to move. A lerp by such a weight is one for each tensor.
                torch._fused_sgd_(
                    target,
                    online,
                    [],
                    weight_decay=-1.0,
                    momentum=0.0,
                    lr=momentum - 1.0,
                    dampening=0.0,
                    nesterov=False,
                    maximize=False,
                    is_first_step=False,
                    found_inf=unless.float(),
                )
        for source, copy in self._copied:
            kept = local(source) if unless is None else torch.where(unless, local(copy), local(source))
            local(copy).copy_(kept)


def _laid_out(source: Tensor, copy: Tensor) -> Tensor:
    """Return the source with the strides of its copy, which the fused kernel takes for granted."""
    return source if source.stride() == copy.stride() else torch.empty_like(copy).copy_(source)


def _matched(online: nn.Module, target: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    sources, copies = dict(_tensors(online)), dict(_tensors(target))
    kind = type(target).__name__
    if sources.keys() != copies.keys():
        differing = sorted(sources.keys() ^ copies.keys())
        first = ", ".join(differing[:3])
        raise ValueError(
            f"EMA of {kind}: {len(differing)} names differ ({first}); make the target a copy of the online"
        )
    for name, source in sources.items():
        if source.shape != copies[name].shape:
            raise ValueError(f"EMA of {kind}.{name}: {tuple(source.shape)} online, {tuple(copies[name].shape)} target")
        yield f"{kind}.{name}", source, copies[name]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
