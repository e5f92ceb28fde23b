"""SIGReg: how far random one-dimensional projections of embeddings are from the standard normal law."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hjepa_models._validation import check_positive
from hjepa_models.distributed import all_reduce_mean, world_size
from hjepa_models.random import uniform


def check_knots(knots: int) -> None:
    """Refuse a quadrature without an interval."""
    if knots < 2:
        raise ValueError(f"knots={knots}: no quadrature; allowed: 2 and more; use e.g. 17")


def random_directions(
    seed: int | Int[Tensor, ""], dim: int, count: int, device: torch.device | None = None
) -> Float[Tensor, "D M"]:
    """Return unit vectors uniform on the sphere, a pure function of the seed: equal on every process and device.

    Hashed counters make uniform numbers and those normal ones (Box-Muller): no generator, no host synchronisation.

    Args:
        seed: e.g. the step; an int64 tensor on the device gives the same numbers as the int, and a compiled step that
            takes it is not compiled anew when it changes.
        dim: width of the vectors.
        count: number of vectors.
        device: where they are made; None means the device of the seed, the CPU for an int.

    Returns:
        Columns of length 1, float32.
    """
    if device is None and isinstance(seed, Tensor):
        device = seed.device
    radius, angle = uniform(seed, (2 * dim * count,), device).chunk(2)
    normal = ((-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()).view(dim, count)
    return torch.nn.functional.normalize(normal, dim=0)


class _CharacteristicFunction(torch.autograd.Function):
    """Mean of cos and sin of k times an angle over the rows, for k = 0 ... knots - 1.

    The multiples follow from the first by rotation and are made anew in the backward pass: one cosine and one sine for
    each angle, and memory for one knot instead of all.
    """

    @staticmethod
    def forward(ctx: Any, angle: Float[Tensor, "*V n M"], knots: int) -> Float[Tensor, "2 *V K M"]:  # noqa: ANN401
        cos, sin = angle.cos(), angle.sin()
        ctx.save_for_backward(cos, sin)
        real, imaginary = [], []
        for c, s in _multiples(cos, sin, knots):
            real.append(c.mean(-2))
            imaginary.append(s.mean(-2))
        return torch.stack([torch.stack(real, dim=-2), torch.stack(imaginary, dim=-2)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        cos, sin = ctx.saved_tensors
        real, imaginary = gradients[0] / cos.shape[-2]
        total = torch.zeros_like(cos)
        for k, (c, s) in enumerate(_multiples(cos, sin, real.shape[-2])):
            total.addcmul_(c, k * imaginary[..., k, :].unsqueeze(-2))
            total.addcmul_(s, k * real[..., k, :].unsqueeze(-2), value=-1)
        return total, None


def _multiples(cos: Tensor, sin: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield cos and sin of 0, 1, 2, ... times an angle."""
    c, s = torch.ones_like(cos), torch.zeros_like(sin)
    for _ in range(count):
        yield c, s
        c, s = (c * cos).addcmul_(s, sin, value=-1), (s * cos).addcmul_(c, sin)


def sigreg(
    z: Float[Tensor, "*V n D"],
    seed: int | Int[Tensor, ""],
    num_directions: int = 1024,
    knots: int = 17,
    t_max: float = 3.0,
) -> Float[Tensor, ""]:
    r"""Epps-Pulley statistic of random projections against the standard normal law, averaged over directions.

    $$T = N \int w(t)\,|\hat\varphi(t) - e^{-t^2/2}|^2\,dt, \quad \hat\varphi(t) = \frac1N \sum_n e^{i t a^T z_n}, \quad
    w(t) = e^{-t^2/2}$$

    by the trapezoid rule on [0, t_max], doubled for the negative half. Projections are *not* standardised: scale and
    place of the embeddings are part of what is tested. The mean over n runs over all processes.

    Args:
        z: embeddings; leading axes are separate samples (views), whose statistics are averaged.
        seed: seed of the directions, e.g. the step, as an int or as an int64 tensor on the device of z; must be equal
            on all processes.
        num_directions: number of random directions.
        knots: points of the quadrature.
        t_max: end of the quadrature.

    Returns:
        The statistic, about 1 for a standard normal sample of any size.

    Raises:
        ValueError: for no direction, fewer than 2 knots, or an end that is not above 0.

    Source:
        Balestriero and LeCun 2025 (LeJEPA, arXiv 2511.08544), section 4 (SIGReg with the Epps-Pulley test).
    """
    check_positive(num_directions=num_directions, t_max=t_max)
    check_knots(knots)
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        directions = random_directions(seed, z.shape[-1], num_directions, z.device).to(z.dtype)
        t = torch.linspace(0, t_max, knots, device=z.device, dtype=z.dtype)
        normal = (-0.5 * t.square()).exp()
        step = t_max / (knots - 1)
        quadrature = torch.full_like(t, 2 * step)
        quadrature[:: knots - 1].fill_(step)  # both ends; to assign a number would copy it to a GPU in torch 2.11
        both: Tensor = _CharacteristicFunction.apply((z @ directions) * step, knots)
        real, imaginary = all_reduce_mean(both)
        error = (real - normal.unsqueeze(-1)).square() + imaginary.square()
        statistic: Tensor = (error * (quadrature * normal).unsqueeze(-1)).sum(-2).mean()
        return statistic * (z.shape[-2] * world_size())
