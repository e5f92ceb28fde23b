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


def offsets(tensor: Tensor) -> tuple[int, ...]:
    """Return where this rank's part begins in the whole tensor, along each axis."""
    if is_sharded(tensor):
        (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
        return tuple(chunk.offsets)
    return (0,) * tensor.ndim


def is_copy(tensor: Tensor) -> bool:
    """Tell whether another rank of the mesh holds the same part and comes first: hybrid sharding has copies."""
    if not is_sharded(tensor):
        return False
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return any(place.is_replicate() and here for place, here in zip(tensor.placements, coordinate, strict=True))
