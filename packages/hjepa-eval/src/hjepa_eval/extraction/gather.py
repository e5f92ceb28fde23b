"""Rows of all processes, exactly as many as there are: no padding enters and none is lost."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")
PIECE_ELEMENTS = 2**22  # elements that a collective carries: 16 MiB of float32


def rank() -> int:
    """Number of this process; 0 where none were started together."""
    return dist.get_rank() if world_size() > 1 else 0


def world_size() -> int:
    """Number of processes; 1 where none were started together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate the rows of every process, those of rank 0 first, on every process.

    Ranks may hold different numbers of rows, and none at all. Memory beside the result: one piece a rank.

    Args:
        tensors: Named tensors [n, ...] on the CPU; a rank without samples may leave them out.

    Returns:
        The named tensors [sum of the n, ...]; the same ones in a single process.

    Raises:
        ValueError: Where ranks have tensors of different names, widths or types.
    """
    if world_size() == 1:
        return dict(tensors)
    shapes = exchange({key: (tuple(value.shape), value.dtype) for key, value in tensors.items()})
    known = [shape for shape in shapes if shape]
    kinds = {tuple((key, shape[1:], dtype) for key, (shape, dtype) in shape.items()) for shape in known}
    if len(kinds) > 1:
        raise ValueError(f"tensors={sorted(map(str, kinds))}: ranks hold different ones; extract with one model on all")
    found = {}
    for key, (shape, dtype) in known[0].items() if known else ():
        counts = [rank_shapes[key][0][0] if rank_shapes else 0 for rank_shapes in shapes]
        own = tensors[key] if key in tensors else torch.empty(0, *shape[1:], dtype=dtype)
        found[key] = _gather(own.contiguous(), counts)
    return found


def gather_names(names: Mapping[str, Any]) -> dict[str, Any]:
    """Names that any process has, for those that have none: what belongs to the keys of gather_rows."""
    if world_size() == 1:
        return dict(names)
    found: dict[str, Any] = {}
    for part in exchange(dict(names)):
        found |= part
    return found


def exchange(value: T) -> list[T]:
    """What every process holds, by rank; plain small values only."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return cast("list[T]", values)


def _gather(own: Tensor, counts: list[int]) -> Tensor:
    # NCCL moves what lies on a GPU only.
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else own.device
    result = own.new_empty(sum(counts), *own.shape[1:])
    starts = [sum(counts[:source]) for source in range(len(counts))]
    step = max(1, PIECE_ELEMENTS // max(1, math.prod(own.shape[1:])))
    for first in range(0, max(counts), step):
        size = min(step, max(counts) - first)
        piece = own.new_zeros(size, *own.shape[1:], device=device)
        mine = own[first : first + size]
        piece[: len(mine)] = mine
        pieces = [torch.empty_like(piece) for _ in counts]
        dist.all_gather(pieces, piece)
        for source, count in enumerate(counts):
            kept = max(0, min(size, count - first))
            result[starts[source] + first : starts[source] + first + kept] = pieces[source][:kept].to(own.device)
    return result
