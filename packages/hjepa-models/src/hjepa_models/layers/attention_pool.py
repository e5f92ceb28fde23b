"""Attention pooling: one vector of many tokens, by learned weights."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hjepa_models.initialization import initialize


class AttentionPool(nn.Module):
    r"""Averages tokens by what a learned query of each head finds in them.

    $$y_h = \sum_n a_{hn} x_{nh}, \qquad a_{hn} = \mathrm{softmax}_n(q_h \cdot (W x_n)_h)$$

    with $x_{nh}$ the channels of head h. Queries start at 0, where it is the mean over tokens.

    Args:
        dim: width of the tokens.
        num_heads: heads; must divide `dim`.

    Source: the pooling of Lee et al., "Set transformer", arXiv 1810.00825, section 3.2, without its maps of values.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_token = nn.Parameter(torch.empty(dim))
        self.key = nn.Linear(dim, dim, bias=False)

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill the keys from a CPU generator; the queries start at 0."""
        initialize(self.key, generator, fan_in=True)
        nn.init.zeros_(self.query_token)

    def weights(self, tokens: Float[Tensor, "*B N D"]) -> Float[Tensor, "*B N H"]:
        """Return the share of each token in each head; the shares of a head sum up to 1."""
        scores: Tensor = rearrange(self.key(tokens) * self.query_token, "... (h d) -> ... h d", h=self.num_heads)
        scores = scores.sum(-1)
        return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-2)

    def forward(self, tokens: Float[Tensor, "*B N D"]) -> Float[Tensor, "*B D"]:
        """Return the weighted mean of the tokens."""
        heads = rearrange(tokens, "... (h d) -> ... h d", h=self.num_heads)
        pooled = (heads * self.weights(tokens).unsqueeze(-1).to(tokens.dtype)).sum(-3)
        return pooled.flatten(-2)
