"""Which rank writes which part of which tensor, and where the parts of the saved tensors lie."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from hjepa_train.sharded import is_copy, is_sharded, local, offsets

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and lengths along each axis of a tensor."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Part:
    """A block of a tensor that one rank writes."""

    offsets: tuple[int, ...]
    values: Tensor


def own_parts(tensors: Mapping[str, Tensor], rank: int, size: int) -> dict[str, Part]:
    """Return what this rank writes: its part of sharded tensors, its share of those that all ranks hold.

    Nothing is sent: every rank comes to the same shares. Every part is written once.

    Args:
        tensors: By name, the same names on every rank.
        rank: This rank.
        size: Number of ranks.
    """
    shared = {name: tensor.nbytes for name, tensor in tensors.items() if not is_sharded(tensor)}
    owners = dict(zip(shared, _shares(list(shared.values()), size), strict=True))
    mine = {}
    for name, tensor in tensors.items():
        if owners.get(name, rank) == rank and not is_copy(tensor) and (local(tensor).numel() or not is_sharded(tensor)):
            mine[name] = Part(offsets=offsets(tensor), values=local(tensor))
    return mine


def overlap(first: Box, second: Box) -> Box | None:
    """Return the block that two blocks have in common, or None.

    >>> overlap(((0, 0), (4, 3)), ((2, 0), (9, 3)))
    ((2, 0), (2, 3))
    """
    begin = tuple(map(max, first[0], second[0]))
    ends = ((a + n, b + m) for a, n, b, m in zip(*first, *second, strict=True))
    lengths = tuple(min(end) - start for end, start in zip(ends, begin, strict=True))
    return (begin, lengths) if all(length > 0 for length in lengths) else None


def whole_shape(parts: Iterable[Box]) -> tuple[int, ...] | None:
    """Return the shape of the tensor that the blocks fill, or None where one is missing or stands twice.

    >>> whole_shape([((0,), (4,)), ((4,), (2,))]), whole_shape([((4,), (2,))])
    ((6,), None)
    """
    boxes = list(parts)
    shape = tuple(
        max(offset + length for offset, length in axis)
        for axis in zip(*(zip(*box, strict=True) for box in boxes), strict=True)
    )
    distinct = len({begin for begin, _ in boxes}) == len(boxes)
    filled = sum(math.prod(lengths) for _, lengths in boxes)
    return shape if distinct and filled == math.prod(shape) else None


def _shares(sizes: list[int], count: int) -> list[int]:
    """Give each size to the one with least so far, the largest first.

    >>> _shares([1, 5, 3, 2], 2)
    [0, 0, 1, 1]
    """
    loads = [0] * count
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += sizes[index]
    return owners
