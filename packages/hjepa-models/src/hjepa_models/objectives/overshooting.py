"""Overshooting: a predictor that is fed its own predictions for several steps."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from hjepa_models.objectives.prediction import smooth_l1


def overshooting_loss(
    step: Callable[..., Tensor],
    start: Float[Tensor, "B T *D"],
    targets: Float[Tensor, "B T *D"],
    distance: int,
    discount: float = 0.9,
    distance_fn: Callable[[Tensor, Tensor], Tensor] = smooth_l1,
    actions: Float[Tensor, "B T A"] | None = None,
) -> Float[Tensor, ""]:
    r"""Error of a deterministic latent predictor that is fed its own predictions for 1 to D steps.

    $$\frac1D \sum_{d=1}^{D} \gamma^{d-1}\, \mathrm{dist}(f^d(x_t), y_{t+d}), \qquad \text{all } t \text{ at once}$$

    The gradient flows through all the rolled predictions and into `start`; detach `targets` that should not train.

    Args:
        step: f, from latents (and, where given, the actions that lead into the next ones) to the next latents; the
            leading axes are rows and starts.
        start: latents x of each time.
        targets: wanted latents y of each time.
        distance: D, at most T - 1.
        discount: γ.
        distance_fn: scalar distance of predictions and targets; any of the `objectives`.
        actions: action t leads into time t, so that the first is not used.

    Returns:
        The loss.

    Raises:
        ValueError: for a distance beyond the sequence.

    Source:
        Hafner et al. 2019 (PlaNet, arXiv 1811.04551), section 4, without a stochastic part. V-JEPA 2-AC (arXiv
        2506.09985), equations 2 to 4, has D = 2 and an L1 distance, the longer one from the first time only.

    >>> time = torch.arange(5.0).view(1, 5, 1)
    >>> overshooting_loss(lambda x: x + 1, time, time, distance=4)
    tensor(0.)
    """
    steps = start.shape[1]
    check_distance(distance, steps - 1)
    latents, terms = start, []
    for ahead in range(1, distance + 1):
        latents = latents[:, : steps - ahead]
        latents = step(latents) if actions is None else step(latents, actions[:, ahead:])
        terms.append(discount ** (ahead - 1) * distance_fn(latents, targets[:, ahead:]))
    return torch.stack(terms).mean()


def check_distance(distance: int, longest: int) -> None:
    """Refuse a distance beyond the sequence."""
    if not 1 <= distance <= longest:
        raise ValueError(
            f"distance={distance}: not within the sequence; allowed: 1 to {longest}; "
            "shorten the distance or lengthen the sequence"
        )
