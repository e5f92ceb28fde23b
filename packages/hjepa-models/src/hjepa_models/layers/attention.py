"""Multi-head self-attention with positions, normalised queries and keys, and a choice of how it is computed."""

from enum import StrEnum
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hjepa_models.layers.positions import Place, rotate


class AttentionBackend(StrEnum):
    """How the softmax attention is computed; the results agree to 1e-5 in float32.

    `auto`: `explicit` where it is faster, which is in training in half precision on a CPU up to 1,024 tokens; elsewhere
    `sdpa`, on a GPU up to 64 tokens by its efficient kernel, which is the fastest there (a compiled step takes it
    whatever `sdpa_kernel` is around it: take `sdpa` to choose).
    `sdpa`: PyTorch's fused kernels; `torch.nn.attention.sdpa_kernel` around a call picks flash, cuDNN, efficient, math.
    `explicit`: plain products with a softmax between them.
    `flex`: FlexAttention, which adds biases and groups inside a fused kernel and never lays them out in memory; on a
    CPU, for which PyTorch has no backward of it, and for heads narrower than its kernels take (16 channels), `sdpa`
    computes the same.
    """

    auto = "auto"
    sdpa = "sdpa"
    explicit = "explicit"
    flex = "flex"


def group_mask(group: Int[Tensor, " K"]) -> Bool[Tensor, "K K"]:
    """Return which token (row) sees which (column): its own group, and group 0."""
    return (group.unsqueeze(0) == 0) | (group.unsqueeze(1) == group.unsqueeze(0))


def attention_logits(
    query: Float[Tensor, "B H Q d"], key: Float[Tensor, "B H K d"], place: Place
) -> Float[Tensor, "B H Q K"]:
    r"""Return $QK^T/\sqrt d$ plus the bias, minus infinity where a token is not seen."""
    logits: Tensor = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if place.bias is not None:
        logits = logits + place.bias.to(logits.dtype)
    if place.group is not None:
        logits = logits.masked_fill(~group_mask(place.group), -torch.inf)
    return logits


def attend(
    query: Float[Tensor, "B H K d"],
    key: Float[Tensor, "B H K d"],
    value: Float[Tensor, "B H K d"],
    place: Place,
    backend: AttentionBackend = AttentionBackend.auto,
) -> Float[Tensor, "B H K d"]:
    r"""Return $\mathrm{softmax}(QK^T/\sqrt d + \mathrm{bias})\,V$ over the tokens that each token sees.

    Args:
        query: rotated already, like the keys.
        key: one per token.
        value: one per token.
        place: bias and groups; its rotation is not used here.
        backend: how it is computed.

    Returns:
        The mixed values.
    """
    if backend is AttentionBackend.explicit or (backend is AttentionBackend.auto and _slow_when_fused(query)):
        mixed: Tensor = attention_logits(query, key, place).softmax(dim=-1).to(value.dtype) @ value
        return mixed
    if backend is AttentionBackend.flex and _flex_helps(query, place):
        return flex(query, key, value, place)
    mask: Tensor | None = None if place.group is None else group_mask(place.group)
    if place.bias is not None:
        bias = place.bias.to(query.dtype)
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    fused = torch.nn.functional.scaled_dot_product_attention
    if backend is AttentionBackend.auto and mask is None and _short_on_gpu(query):
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return fused(query, key, value)
    return fused(query, key, value, attn_mask=mask)


def _short_on_gpu(query: Tensor) -> bool:
    """Whether the efficient kernel is a GPU's fastest, for few tokens in half precision, and no one chose others."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    few = query.is_cuda and half and query.shape[-2] <= _LONGEST_EFFICIENT
    if not few or torch.compiler.is_compiling():
        return few
    cuda = torch.backends.cuda
    return bool(cuda.flash_sdp_enabled() and cuda.mem_efficient_sdp_enabled())  # type: ignore[no-untyped-call]


def _slow_when_fused(query: Tensor) -> bool:
    """Whether the CPU's fused kernel would be the slower one: its backward pass in half precision is."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cpu and half and query.requires_grad and query.shape[-2] <= _LONGEST_EXPLICIT


def _flex_helps(query: Tensor, place: Place) -> bool:
    """Whether there is something to fuse, and FlexAttention has kernels for it."""
    plain = place.bias is None and place.group is None
    return not plain and not query.is_cpu and query.shape[-1] >= _NARROWEST_FLEX


_LONGEST_EXPLICIT = 1024
_LONGEST_EFFICIENT = 64
_NARROWEST_FLEX = 16
_compiled_flex: Any = None


def flex(
    query: Float[Tensor, "B H K d"], key: Float[Tensor, "B H K d"], value: Float[Tensor, "B H K d"], place: Place
) -> Float[Tensor, "B H K d"]:
    """Return what `attend` does by FlexAttention, compiled on a GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    global _compiled_flex  # noqa: PLW0603 - compiled once for the process, where it is first used
    compiled: Any = flex_attention
    if not query.is_cpu and not torch.compiler.is_compiling():
        # Outside a compiled step the operator itself has to be compiled to be fused.
        _compiled_flex = compiled = _compiled_flex or torch.compile(flex_attention, dynamic=False)
    bias, group = place.bias, place.group

    def score(logit: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if bias is not None:
            logit = logit + bias[batch if bias.shape[0] > 1 else 0, head, row, column].to(logit.dtype)
        if group is not None:
            seen = (group[column] == 0) | (group[row] == group[column])
            logit = torch.where(seen, logit, -torch.inf)
        return logit

    mixed: Tensor = compiled(query, key, value, score_mod=score)
    return mixed


class Attention(nn.Module):
    """Self-attention over tokens."""

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool, backend: AttentionBackend) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.query_norm: nn.Module = nn.LayerNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.key_norm: nn.Module = nn.LayerNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "B K D"], place: Place = Place()) -> Float[Tensor, "B K D"]:  # noqa: B008
        """Return the attended tokens."""
        mixed = attend(*self._project(x, place), place, self.backend)
        out: Tensor = self.proj(rearrange(mixed, "b h k d -> b k (h d)"))
        return out

    def weights(self, x: Float[Tensor, "B K D"], place: Place = Place()) -> Float[Tensor, "B H K K"]:  # noqa: B008
        """Return how much each token (row) takes of each (column), to be looked at; every row sums up to 1."""
        query, key, _ = self._project(x, place)
        return attention_logits(query, key, place).softmax(dim=-1)

    def _project(self, x: Tensor, place: Place) -> tuple[Tensor, Tensor, Tensor]:
        parts = rearrange(self.qkv(x), "b k (three h d) -> b k three h d", three=3, h=self.num_heads).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in parts)
        query, key = self.query_norm(query).to(value.dtype), self.key_norm(key).to(value.dtype)
        if place.rotation is not None:
            query, key = rotate(query, place.rotation), rotate(key, place.rotation)
        return query, key, value
