"""Rows of features in float64, some at a time: norms, and which rows are copies."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

CACHED = 2**22  # bytes that a CPU reads over and over faster than it reads memory
MEMORY = 2**28  # bytes that are held at once


def rows_at_once(rows: Tensor, bytes_each: int, memory: int = MEMORY) -> int:
    """How many rows to turn into float64 at once, where each of their numbers takes so many bytes."""
    held = min(memory, CACHED) if rows.is_cpu else memory
    return max(1, held // (bytes_each * rows.shape[1]))


def norms(rows: Float[Tensor, "n D"], memory: int = MEMORY) -> Float[Tensor, " n"]:
    """Float64 norms of rows, however small they are; 1 for a row of zeros, whose cosines are all 0."""
    pieces = torch.split(rows, rows_at_once(rows, 16, memory))
    squares = torch.cat([part.double().square().sum(dim=1) for part in pieces])
    # Before the root, whose slope at 0 is infinite.
    return torch.where(squares == 0, 1.0, squares).sqrt()


def unit(rows: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    """Rows divided by their norms; a row of zeros stays one."""
    return rows.double() / norms(rows)[:, None]


def first_equal(rows: Float[Tensor, "n D"], memory: int = MEMORY) -> Int[Tensor, " n"]:
    """Position of the first row that each row equals: its own where no earlier one does."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator).to(rows.device)
    step = rows_at_once(rows, 32, memory)
    # Two zeros are equal whose bits are not: the sum is 0 of both.
    bits = ((part.double() + 0.0).view(torch.int64) for part in torch.split(rows, step))
    # The low bits of a float32 in 64 bits are 0 and would stay so under a product.
    key = torch.cat([((part ^ (part >> 29)) * factors).sum(dim=1) for part in bits])
    ordered, order = key.sort(stable=True)
    original = order[torch.searchsorted(ordered, ordered)]
    later = order != original
    copies, originals = order[later], original[later]
    pieces = zip(torch.split(copies, step), torch.split(originals, step), strict=True)
    same = torch.cat([(rows[a] == rows[b]).all(dim=1) for a, b in pieces])
    first = torch.arange(len(rows), device=rows.device)
    first[copies[same]] = originals[same]
    return first
