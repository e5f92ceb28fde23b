"""SIGReg: how far random one-dimensional projections of embeddings are from the standard normal law."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hjepa_models.distributed import all_reduce_mean, world_size

# The two odd multipliers and the increment of splitmix64 as signed 64-bit integers; products wrap around.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def _shift(x: Int[Tensor, "..."], bits: int) -> Int[Tensor, "..."]:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def random_directions(seed: int, dim: int, count: int, device: torch.device | None = None) -> Float[Tensor, "D M"]:
    """Return unit vectors drawn uniformly from the sphere: a pure function of the seed, equal on every process and device.

    A counter is hashed (splitmix64) into uniform numbers and those into normal ones (Box-Muller): no generator, no host
    synchronisation.

    Args:
        seed: e.g. the step.
        dim: width of the vectors.
        count: number of vectors.
        device: where they are made.

    Returns:
        Columns of length 1, float32.
    """
    start = torch.full((), seed, dtype=torch.int64, device=device)
    key = _mix(_mix(start * _INCREMENT + _FIRST))
    counter = torch.arange(2 * dim * count, device=device) * _INCREMENT + key
    uniform = (_shift(_mix(counter), 40).to(torch.float32) + 0.5) * 2.0**-24
    radius, angle = uniform.chunk(2)
    normal = ((-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()).view(dim, count)
    return normal / normal.norm(dim=0, keepdim=True)


def sigreg(
    z: Float[Tensor, "*V n D"],
    seed: int,
    num_directions: int = 1024,
    knots: int = 17,
    t_max: float = 3.0,
) -> Float[Tensor, ""]:
    r"""Epps-Pulley statistic of random projections against the standard normal law, averaged over directions.

    $$T = N \int w(t)\,|\hat\varphi(t) - e^{-t^2/2}|^2\,dt, \qquad \hat\varphi(t) = \frac1N \sum_n e^{i t a^T z_n}, \quad
    w(t) = e^{-t^2/2}$$

    by the trapezoid rule on [0, t_max], doubled for the negative half. Projections are *not* standardised: scale and place
    of the embeddings are part of what is tested. The mean over n runs over all processes.

    Args:
        z: embeddings; leading axes are separate samples (views), whose statistics are averaged.
        seed: seed of the directions, e.g. the step; must be equal on all processes.
        num_directions: number of random directions.
        knots: points of the quadrature.
        t_max: end of the quadrature.

    Returns:
        The statistic, about 1 for a standard normal sample of any size.

    Source:
        Balestriero and LeCun 2025 (LeJEPA, arXiv 2511.08544), section 4 (SIGReg with the Epps-Pulley test).
    """
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        directions = random_directions(seed, z.shape[-1], num_directions, z.device).to(z.dtype)
        t = torch.linspace(0, t_max, knots, device=z.device, dtype=z.dtype)
        normal = (-0.5 * t.square()).exp()
        step = t_max / (knots - 1)
        quadrature = torch.full_like(t, 2 * step)
        quadrature[0] = quadrature[-1] = step
        angle = (z @ directions).unsqueeze(-1) * t
        real, imaginary = all_reduce_mean(torch.stack([angle.cos().mean(-3), angle.sin().mean(-3)]))
        error = (real - normal).square() + imaginary.square()
        statistic = error @ (quadrature * normal) * (z.shape[-2] * world_size())
        return statistic.mean()
