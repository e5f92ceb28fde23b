"""Tensors that FSDP has spread over ranks, handled beside plain ones.

`torch.distributed.tensor` takes a second or more to import: it is looked at only where FSDP has imported it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Tell whether a tensor lies in parts on several ranks."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor; all ranks call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def placed_like(here: Tensor, saved: Tensor) -> Tensor:
    """Return a copy of a whole tensor, placed and sharded like the one here; no rank sends anything."""
    if is_sharded(here):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(saved.to(here.device), here.device_mesh, here.placements, src_data_rank=None)
    return saved.to(here.device, copy=True)
