"""Symlog: a logarithm for values of either sign, and its inverse."""

import torch
from jaxtyping import Float
from torch import Tensor


def symlog(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""Return $\mathrm{sign}(x)\,\ln(1 + |x|)$: the identity near 0, a logarithm far from it.

    The derivative $1/(1+|x|)$ is right at 0 too, where that of the formula as written would come out as 0.

    Args:
        x: values of any size.

    Returns:
        The same shape and dtype; `symexp` undoes it.

    Source:
        Hafner et al. 2023 (DreamerV3, arXiv 2301.04104), section on symlog predictions.

    >>> symlog(torch.tensor([-999.0, 0.0, 999.0]))
    tensor([-6.9078,  0.0000,  6.9078])
    """
    above, below = _sides(x)
    return above.log1p() - below.log1p()


def symexp(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""Return $\mathrm{sign}(x)\,(e^{|x|} - 1)$, the inverse of `symlog`.

    Args:
        x: values in symlog space; beyond about ±88 the result is infinite in float32.

    Returns:
        The same shape and dtype.

    Source:
        Hafner et al. 2023 (DreamerV3, arXiv 2301.04104), section on symlog predictions.
    """
    above, below = _sides(x)
    return above.expm1() - below.expm1()


def _sides(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what lies above 0 and what lies below; at 0 the gradient goes through the first alone, NaN stays NaN."""
    return torch.where(x < 0, 0, x), torch.where(x >= 0, 0, -x)
