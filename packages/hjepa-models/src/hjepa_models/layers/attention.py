"""Multi-head self-attention with optional rotary positions and normalised queries and keys."""

from enum import StrEnum

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hjepa_models.layers.positions import Rotation, rotate


class AttentionBackend(StrEnum):
    """How the softmax attention is computed; the results agree to 1e-5 in float32."""

    sdpa = "sdpa"
    explicit = "explicit"


def explicit_attention(
    query: Float[Tensor, "B H Q d"], key: Float[Tensor, "B H K d"], value: Float[Tensor, "B H K d"]
) -> Float[Tensor, "B H Q d"]:
    r"""Return $\mathrm{softmax}(QK^T/\sqrt d)\,V$ by plain products: a faster backward for short sequences on a CPU."""
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    mixed: Tensor = logits.softmax(dim=-1).to(value.dtype) @ value
    return mixed


class Attention(nn.Module):
    """Self-attention over tokens."""

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool, backend: AttentionBackend) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.query_norm: nn.Module = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.key_norm: nn.Module = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "B K D"], rotation: Rotation | None = None) -> Float[Tensor, "B K D"]:
        """Return the attended tokens; queries and keys are rotated where a rotation is given."""
        query, key, value = rearrange(self.qkv(x), "b k (three h d) -> three b h k d", three=3, h=self.num_heads)
        query, key = self.query_norm(query).to(value.dtype), self.key_norm(key).to(value.dtype)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if self.backend is AttentionBackend.sdpa:
            mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        else:
            mixed = explicit_attention(query, key, value)
        out: Tensor = self.proj(rearrange(mixed, "b h k d -> b k (h d)"))
        return out
