"""Two-hot: regression as classification over bins that are evenly spaced in symlog space."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hjepa_models.initialization import construct, initialize
from hjepa_models.objectives.prediction import weighted_mean
from hjepa_models.objectives.symlog import symexp, symlog


def symlog_bins(limit: float, count: int, device: torch.device | None = None) -> Float[Tensor, " n"]:
    """Return evenly spaced bins from -limit to limit in symlog space, float32.

    Args:
        limit: the last bin, which stands for the value `symexp(limit)`: 20.1 for 3.
        count: number of bins; odd, so that 0 is one of them.
        device: where they are made.

    Returns:
        The bins, rising.

    Raises:
        ValueError: for an even number of bins, fewer than 3, or a limit that is not above 0.

    >>> symlog_bins(3.0, 5)
    tensor([-3.0000, -1.5000,  0.0000,  1.5000,  3.0000])
    """
    _check_bins("limit", limit, "count", count)
    half = count // 2
    # Not linspace, whose middle is not always exactly 0.
    return torch.arange(-half, half + 1, device=device) / half * limit


def two_hot(values: Float[Tensor, "..."], bins: Float[Tensor, " n"]) -> Float[Tensor, "... n"]:
    r"""Return each value as two neighbouring bins that share a weight of 1.

    $$x = \mathrm{symlog}(v), \quad b_k \le x < b_{k+1}: \qquad q_{k+1} = \frac{x - b_k}{b_{k+1} - b_k}, \quad
    q_k = 1 - q_{k+1}$$

    so that $\mathrm{symexp}(\sum_k q_k b_k) = v$. Values beyond the bins belong to the last bin of their side.

    Args:
        values: plain values, *not* in symlog space.
        bins: rising, in symlog space, at least two.

    Returns:
        Rows that sum to 1, float32 at least.

    Source:
        Hafner et al. 2023 (DreamerV3, arXiv 2301.04104), two-hot encoding of symlog-transformed targets.
    """
    lower, share = _place(values, bins)
    encoded = share.new_zeros(*share.shape, len(bins))
    both = torch.stack([1 - share, share], dim=-1)
    return encoded.scatter(-1, torch.stack([lower, lower + 1], dim=-1), both)


def two_hot_mean(logits: Float[Tensor, "... n"], bins: Float[Tensor, " n"]) -> Float[Tensor, "..."]:
    r"""Return the predicted value $\mathrm{symexp}(\sum_k p_k b_k)$ with $p = \mathrm{softmax}(\mathrm{logits})$.

    The expectation is taken in symlog space, as in the first version of the DreamerV3 paper; its later ones take
    $\sum_k p_k\,\mathrm{symexp}(b_k)$, which a little probability far out moves a lot.

    Args:
        logits: of each bin.
        bins: the bins, in symlog space.

    Returns:
        Plain values, float32 at least; exactly 0 for equal logits and symmetric bins.

    Source:
        Hafner et al. 2023 (DreamerV3, arXiv 2301.04104 version 1), two-hot critic.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    terms = logits.softmax(-1) * bins.to(logits.dtype)
    # Mirrored, the terms of symmetric bins cancel to the last bit.
    return symexp((terms + terms.flip(-1)).sum(-1) / 2)


def two_hot_loss(
    logits: Float[Tensor, "B N D n"],
    target: Float[Tensor, "B N D"],
    bins: Float[Tensor, " n"],
    weight: Float[Tensor, "B N"] | None = None,
) -> Float[Tensor, ""]:
    r"""Cross entropy between two-hot targets and predicted bins, averaged over channels, then over tokens.

    $$-\sum_k q_k \ln p_k = \ln \sum_k e^{z_k} - q_k z_k - q_{k+1} z_{k+1}$$

    from the two bins of the target alone: the encoding is never written out.

    Args:
        logits: of each bin, for every channel of every token.
        target: wanted tokens, plain values.
        bins: the bins, in symlog space.
        weight: weight of each token; None means 1.

    Returns:
        The loss; at least the entropy of the encoding, which is at most ln 2.

    Source:
        Hafner et al. 2023 (DreamerV3, arXiv 2301.04104), two-hot loss.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lower, share = _place(target, bins)
    first, second = logits.gather(-1, torch.stack([lower, lower + 1], dim=-1)).unbind(-1)
    distance = logits.logsumexp(-1) - torch.lerp(first, second, share.to(first.dtype))
    return weighted_mean(distance.mean(-1), weight)


@dataclass(kw_only=True, slots=True)
class TwoHotConfig:
    """Describes a head of two-hot bins.

    Attributes:
        num_bins: bins of each channel; odd.
        limit: the last bin in symlog space; values beyond `symexp(limit)` (20.1 for 3) are clamped to it.
    """

    num_bins: int = 41
    limit: float = 3.0

    def __post_init__(self) -> None:
        """Refuse bins without a middle or without width."""
        _check_bins("limit", self.limit, "num_bins", self.num_bins)

    def build(self, embed_dim: int, *, seed: int = 0, device: torch.device | str | None = None) -> "TwoHotHead":
        """Return the head for tokens of width `embed_dim`, its weights drawn from `seed`."""
        return construct(lambda: TwoHotHead(self, embed_dim), seed, device)


class TwoHotHead(nn.Module):
    """A linear map from a token to the bins of each of its channels.

    The bins follow from the configuration and are made anew where they are needed: they are no state.
    """

    def __init__(self, config: TwoHotConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Linear(embed_dim, embed_dim * config.num_bins)

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every parameter from a CPU generator; small, so that the first predictions are near 0."""
        initialize(self, generator, std=1e-3)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D n"]:
        """Return the logits of each channel's bins."""
        # Tokens of a canvas are float32, a model may be bfloat16.
        out: Tensor = self.proj(tokens.to(self.proj.weight.dtype))
        return out.view(*tokens.shape, self.config.num_bins)

    def mean(self, logits: Float[Tensor, "B N D n"]) -> Float[Tensor, "B N D"]:
        """Return the predicted tokens."""
        return two_hot_mean(logits, self._bins(logits))

    def loss(
        self,
        logits: Float[Tensor, "B N D n"],
        target: Float[Tensor, "B N D"],
        weight: Float[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the cross entropy with the target tokens."""
        return two_hot_loss(logits, target, self._bins(logits), weight)

    def _bins(self, like: Tensor) -> Float[Tensor, " n"]:
        return symlog_bins(self.config.limit, self.config.num_bins, like.device)


def _place(values: Tensor, bins: Tensor) -> tuple[Int[Tensor, "..."], Float[Tensor, "..."]]:
    """Return the bin below each value and how far the value is on the way to the next, from 0 to 1."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    bins, x = bins.to(dtype), symlog(values.to(dtype)).contiguous()
    x = torch.clamp(x, bins[0], bins[-1])
    lower = (torch.searchsorted(bins, x.detach(), right=True) - 1).clamp(0, len(bins) - 2)
    start = bins[lower]
    return lower, (x - start) / (bins[lower + 1] - start)


def _check_bins(limit_field: str, limit: float, count_field: str, count: int) -> None:
    if not limit > 0:
        raise ValueError(f"{limit_field}={limit}: bins without width; allowed: > 0; use e.g. 3.0")
    if count < 3 or count % 2 == 0:
        raise ValueError(
            f"{count_field}={count}: 0 would not be a bin; allowed: odd numbers from 3; use e.g. {max(3, count + 1)}"
        )
