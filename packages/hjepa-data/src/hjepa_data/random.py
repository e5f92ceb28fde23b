"""Counter-based random numbers: a pure function of (seed, counters), the same on every device, process and machine.

``h <- mix(h + gamma * (c + 1))`` is folded over the counters, where ``mix`` is the finaliser of SplitMix64; 64-bit
arithmetic wraps around. There are three forms of the one function: tensors (any device), numpy arrays, and Python
integers for the code of one sample.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Draws", "below", "bits", "bits_numpy", "bits_of_sets", "hash_int", "leading", "uniform"]

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MUL1 = 0xBF58476D1CE4E5B9
_MUL2 = 0x94D049BB133111EB
LEADING = 24
"""Bits of a random number that become a float or a small integer."""


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def hash_int(seed: int, *counters: int) -> int:
    """Hash (seed, counters) to an integer in [0, 2^64).

    Args:
        seed: any integer.
        counters: what the number belongs to, such as epoch and sample; any integers.

    Returns:
        64 uniform bits.
    """
    state = 0
    for counter in (seed, *counters):
        z = (state + _GAMMA * (counter + 1)) & _MASK
        z = ((z ^ (z >> 30)) * _MUL1) & _MASK
        z = ((z ^ (z >> 27)) * _MUL2) & _MASK
        state = z ^ (z >> 31)
    return state


def _shift(x: Tensor, by: int) -> Tensor:
    # int64 shifts are arithmetic: the copies of the sign are masked away.
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def _mix(z: Tensor) -> Tensor:
    # In place: these few operations on large tensors are bound by memory.
    z.bitwise_xor_(_shift(z, 30)).mul_(_signed(_MUL1))
    z.bitwise_xor_(_shift(z, 27)).mul_(_signed(_MUL2))
    return z.bitwise_xor_(_shift(z, 31))


def _absorb(state: int | Tensor, counter: int | Tensor) -> Tensor:
    """Return ``state + gamma * (counter + 1)``, in one launch but where both are tensors."""
    if isinstance(counter, int):
        assert isinstance(state, Tensor), "integers are folded by hash_int"
        return state + _signed(_GAMMA * (counter + 1))
    if isinstance(state, int):
        return torch.rsub(counter.long(), _signed(state + _GAMMA), alpha=-_signed(_GAMMA))
    return torch.add(state, counter.long() + 1, alpha=_signed(_GAMMA))


def bits(
    seed: int, *counters: int | Int[Tensor, "*B"], n: int, device: torch.device | str | None = None
) -> Int[Tensor, "*B n"]:
    """Hash (seed, counters, 0..n-1) to 64 bits each, held as int64.

    Args:
        seed: any integer.
        counters: integers or integer tensors, broadcast against one another.
        n: how many numbers are drawn for each.
        device: where to draw if no counter is a tensor.

    Returns:
        Uniform int64 over its whole range, [*B, n]; ``bits(s, a, n=n)[i] == hash_int(s, a, i)`` modulo 2^64.
    """
    plain = 0
    while plain < len(counters) and isinstance(counters[plain], int):
        plain += 1
    state: int | Tensor = hash_int(seed, *(int(c) for c in counters[:plain]))
    for counter in counters[plain:]:
        state = _mix(_absorb(state, counter))
    if isinstance(state, int):
        return _mix(_absorb(state, torch.arange(n, device=device)))
    last = torch.arange(1, n + 1, device=state.device)
    return _mix(torch.add(state[..., None], last, alpha=_signed(_GAMMA)))


def bits_of_sets(seed: int, sets: dict[int, int], sample: Int[Tensor, " B"]) -> Int[Tensor, "B n"]:
    """Draw several sets of bits for each sample in one pass: ``bits(seed, c, sample, n=n)`` of all (c, n) side by side.

    A small draw on a GPU costs its number of launches, and all sets share theirs.

    Args:
        seed: any integer.
        sets: counter of each set, and how many numbers it has.
        sample: number of each sample.

    Returns:
        Uniform int64, set after set.
    """
    sample, counts = sample.long(), tuple(sets.values())
    states = _mix(torch.stack([_absorb(hash_int(seed, counter), sample) for counter in sets], dim=1))
    last = torch.arange(1, max(counts) + 1, device=sample.device)
    z = states.new_empty(len(sample), sum(counts))
    start = 0
    for number, count in enumerate(counts):
        torch.add(states[:, number, None], last[:count], alpha=_signed(_GAMMA), out=z[:, start : start + count])
        start += count
    return _mix(z)


def uniform(
    seed: int, *counters: int | Int[Tensor, "*B"], n: int, device: torch.device | str | None = None
) -> Float[Tensor, "*B n"]:
    """Draw n float32 numbers in [0, 1) for each counter: the top 24 bits of the hash times 2^-24.

    Args:
        seed: any integer.
        counters: integers or integer tensors, broadcast against one another.
        n: how many numbers are drawn for each.
        device: where to draw if no counter is a tensor.

    Returns:
        Uniform numbers, [*B, n], equal bit for bit on every device.
    """
    return unit(bits(seed, *counters, n=n, device=device))


def leading(random_bits: Int[Tensor, "*B"]) -> Int[Tensor, "*B"]:
    """Take the 24 leading bits, of which ``unit`` and ``below`` are made."""
    return _shift(random_bits, 64 - LEADING)


def unit(random_bits: Int[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """Turn 64 random bits into a float32 in [0, 1)."""
    return leading(random_bits).float() * 2.0**-LEADING


def below(leading_bits: Int[Tensor, "*B"], limit: Int[Tensor, "*#B"] | int) -> Int[Tensor, "*B"]:
    """Turn ``leading`` bits into an integer in [0, limit), ``(bits * limit) >> 24``.

    Args:
        leading_bits: the 24 leading of 64 random bits.
        limit: at most 2^20, so that the rounding of probabilities stays under 2^-4 of one count in 24 bits.

    Returns:
        Integers in [0, limit).
    """
    return leading_bits * limit >> LEADING


def bits_numpy(seed: int, *counters: int, n: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Hash (seed, counters, 0..n-1) to an array of n uint64; the numpy form of ``bits``."""
    state = hash_int(seed, *counters)
    with np.errstate(over="ignore"):
        z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GAMMA) + np.uint64(state)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MUL1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MUL2)
        return z ^ (z >> np.uint64(31))


def spread(count: int, wanted: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Draw so many of the numbers below a count, rising: one of each of as many equal stretches, by a fixed seed.

    Of samples in a row the first ones may be of one class, and so may every n-th one.

    Args:
        count: of the samples.
        wanted: how many of them; all where there are no more.

    >>> spread(5, 9), len(set(spread(1000, 10) % 100)) > 1
    (array([0, 1, 2, 3, 4]), True)
    """
    wanted = min(count, wanted)
    edges = np.arange(wanted + 1) * count // max(wanted, 1)
    return edges[:-1] + (bits_numpy(0, n=wanted) % np.diff(edges).astype(np.uint64)).astype(np.int64)


class Draws:
    """A sequence of numbers that belongs to (seed, counters): the form for code that handles one sample.

    Args:
        seed: any integer.
        counters: what the sequence belongs to, such as (epoch, sample, view).
    """

    __slots__ = ("_count", "_state")

    def __init__(self, seed: int, *counters: int) -> None:
        self._state = hash_int(seed, *counters)
        self._count = 0

    def _next(self) -> int:
        self._count += 1
        z = (self._state + _GAMMA * self._count) & _MASK
        z = ((z ^ (z >> 30)) * _MUL1) & _MASK
        z = ((z ^ (z >> 27)) * _MUL2) & _MASK
        return z ^ (z >> 31)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Draw a number in [low, high)."""
        return low + (high - low) * ((self._next() >> (64 - LEADING)) * 2.0**-LEADING)

    def below(self, limit: int) -> int:
        """Draw an integer in [0, limit)."""
        return (self._next() * limit) >> 64
