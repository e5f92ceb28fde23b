"""Random numbers as a pure function of integers: equal on every device, no generator, no host synchronisation."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hjepa_models.distributed import rank, world_size

# The increment and the two odd multipliers of splitmix64 as signed 64-bit integers; products wrap around.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def fold_in(
    seed: int | Int[Tensor, "*S"], number: int | Int[Tensor, "*S"], device: torch.device | None = None
) -> Int[Tensor, "*S"]:
    """Return the seeds that follow from a seed and a number (a step, a row), spread over all 64 bits.

    Args:
        seed: a seed, or several.
        number: what tells the streams of one seed apart; broadcasts against `seed`.
        device: where plain integers are put; tensors stay where they are.

    Returns:
        One seed for each pair.

    Source:
        Steele et al. 2014 (Fast splittable pseudorandom number generators): the finaliser of splitmix64, keyed by a
        hash of the seed.

    >>> int(fold_in(0, 1)) == int(fold_in(torch.tensor(0), 1)), int(fold_in(0, 1)) == int(fold_in(1, 0))
    (True, False)
    """
    key = _mix(_as_tensor(seed, device) * _INCREMENT + _FIRST)
    # Mixed with the key before it is multiplied: a compiler that knows a number to be a counter (an `arange`) would do
    # the multiplication, which is meant to wrap around, in its arithmetic of indices. torch.compile fails so on a CPU.
    return _mix((key ^ _as_tensor(number, device)) * _INCREMENT)


def uniform(
    seed: int | Int[Tensor, "*S"], shape: tuple[int, ...], device: torch.device | None = None
) -> Float[Tensor, "..."]:
    """Return numbers uniform on the open interval (0, 1), `shape` of them for each seed.

    Args:
        seed: a seed, or several.
        shape: axes of the numbers of one seed.
        device: where they are made.

    Returns:
        Numbers in float32, odd multiples of 2^-24: neither 0 nor 1 occurs.

    >>> uniform(torch.tensor([3, 4]), (5,)).shape
    torch.Size([2, 5])
    """
    counter = torch.arange(math.prod(shape), device=device).view(shape)
    start = _as_tensor(seed, device)
    bits = fold_in(start.view(*start.shape, *(1,) * len(shape)), counter)
    return (_shift(bits, 41).to(torch.float32) + 0.5) * 2.0**-23


def gumbel(
    seed: int | Int[Tensor, "*S"], shape: tuple[int, ...], device: torch.device | None = None
) -> Float[Tensor, "..."]:
    r"""Return standard Gumbel numbers $-\log(-\log u)$, `shape` of them for each seed; finite, in float32.

    Args:
        seed: a seed, or several.
        shape: axes of the numbers of one seed.
        device: where they are made.

    Returns:
        The numbers; the argmax of logits plus them is a sample of the softmax.
    """
    return -(-uniform(seed, shape, device).log()).log()


def row_seeds(
    seed: int | Int[Tensor, "*R"], batch: int, device: torch.device | None = None, views: int = 1
) -> Int[Tensor, " B"]:
    """Return a seed for each row, by its place among the rows of all processes, which hold equally many.

    Args:
        seed: of all rows, e.g. the step; one for each row is returned as it is.
        batch: rows of this process, view after view.
        device: where the seeds are made.
        views: how many views the rows are of: those of all processes lie view after view too.
    """
    if isinstance(seed, Tensor) and seed.ndim:
        return seed.to(device)
    images = batch // views
    row = torch.arange(rank() * images, (rank() + 1) * images, device=device)
    place = torch.arange(views, device=device).unsqueeze(1) * (world_size() * images) + row
    return fold_in(seed.to(device) if isinstance(seed, Tensor) else seed, place.flatten(), device)


def _as_tensor(value: int | Tensor, device: torch.device | None) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.int64, device=device)


def _shift(x: Int[Tensor, "*S"], bits: int) -> Int[Tensor, "*S"]:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Int[Tensor, "*S"]) -> Int[Tensor, "*S"]:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)
