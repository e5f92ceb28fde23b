"""The transformer block and the stack of blocks that encoder and predictor share."""

from collections.abc import Sequence
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hjepa_models.layers.attention import Attention, AttentionBackend
from hjepa_models.layers.positions import Place


class MlpKind(StrEnum):
    """The feed-forward part of a block."""

    mlp = "mlp"
    swiglu = "swiglu"


class DropPathSchedule(StrEnum):
    """How the rate at which residuals are dropped goes with depth."""

    linear = "linear"
    constant = "constant"


def drop_path_rates(rate: float, depth: int, schedule: DropPathSchedule) -> list[float]:
    """Return the rate of each block: rising linearly from 0 to `rate`, the last block's, or `rate` throughout.

    >>> drop_path_rates(0.2, 3, DropPathSchedule.linear)
    [0.0, 0.1, 0.2]

    Source: Huang et al., "Deep networks with stochastic depth", arXiv 1603.09382, section 3.
    """
    if schedule is DropPathSchedule.constant or depth == 1:
        return [rate] * depth
    return [rate * layer / (depth - 1) for layer in range(depth)]


def hidden_width(kind: MlpKind, dim: int, ratio: float) -> int:
    """Return the hidden units of a feed-forward layer; SwiGLU has 2/3 of them, so that both have as many parameters."""
    hidden = int(dim * ratio)
    return hidden * 2 // 3 if kind is MlpKind.swiglu else hidden


def check_mlp(owner: str, kind: MlpKind, dim: int, ratio: float) -> None:
    """Refuse a ratio that leaves a feed-forward layer without a hidden unit."""
    if hidden_width(kind, dim, ratio) < 1:
        raise ValueError(
            f"{owner}.mlp_ratio={ratio}: leaves no hidden unit of {kind} at embed_dim={dim}; allowed: e.g. 4; raise it"
        )


def build_mlp(kind: MlpKind, dim: int, ratio: float) -> nn.Module:
    """Return a feed-forward layer; hidden units of SwiGLU are rounded up to a multiple of 8."""
    from timm.layers import Mlp, SwiGLU  # takes seconds to import, and only a model that is built needs it

    hidden = hidden_width(kind, dim, ratio)
    if kind is MlpKind.swiglu:
        swiglu: nn.Module = SwiGLU(dim, hidden, align_to=8)
        return swiglu
    mlp: nn.Module = Mlp(dim, hidden)
    return mlp


def feed_forward(mlp: nn.Module, x: Float[Tensor, "B K D"]) -> Float[Tensor, "B K D"]:
    """Return what a feed-forward layer makes of tokens.

    Where a GPU computes in half precision without gradient (the target branch, features), GELU is applied as the first
    product ends, and no kernel reads and writes the hidden units for it. cuBLAS does it by the tanh approximation
    (Hendrycks and Gimpel, arXiv 1606.08415, section 2): the tokens of a ViT-S move by 2e-4 of their norm, where
    bfloat16 alone moves them by 9e-3.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    out: Tensor
    if not _ends_in_gelu(mlp, x, dtype):
        out = mlp(x)
        return out
    first, second = mlp.fc1, mlp.fc2
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    rows, weight, bias = (one.to(dtype) for one in (x.flatten(0, -2), first.weight, first.bias))
    hidden = torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)
    out = second(hidden.view(*x.shape[:-1], first.out_features))
    return out


def _ends_in_gelu(mlp: nn.Module, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the fused product computes this layer: a plain map with GELU, whose weights are not packed otherwise."""
    if torch.is_grad_enabled() or not x.is_cuda or dtype not in (torch.bfloat16, torch.float16):
        return False
    first = getattr(mlp, "fc1", None)
    if type(first) is not nn.Linear or type(first.weight) is not nn.Parameter or first.bias is None:
        return False
    return type(getattr(mlp, "act", None)) is nn.GELU


class Block(nn.Module):
    """Pre-norm block: attention, then feed-forward, each scaled (LayerScale) and dropped at random (DropPath)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp: MlpKind,
        mlp_ratio: float,
        qk_norm: bool,
        layer_scale: float | None,
        drop_path: float,
        attention: AttentionBackend,
    ) -> None:
        from timm.layers import DropPath, LayerScale

        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qk_norm=qk_norm, backend=attention)
        self.scale1: nn.Module = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop1: nn.Module = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = build_mlp(mlp, dim, mlp_ratio)
        self.scale2: nn.Module = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop2: nn.Module = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Float[Tensor, "B K D"], place: Place = Place()) -> Float[Tensor, "B K D"]:  # noqa: B008
        """Return the tokens after one block."""
        x = x + self.drop1(self.scale1(self.attn(self.norm1(x), place)))
        out: Tensor = x + self.drop2(self.scale2(feed_forward(self.mlp, self.norm2(x))))
        return out


class Transformer(nn.Module):
    """A stack of blocks and a final norm."""

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        *,
        mlp: MlpKind,
        mlp_ratio: float,
        qk_norm: bool,
        layer_scale: float | None,
        drop_path: float,
        drop_path_schedule: DropPathSchedule,
        attention: AttentionBackend,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.blocks = nn.ModuleList(
            Block(
                dim,
                num_heads,
                mlp=mlp,
                mlp_ratio=mlp_ratio,
                qk_norm=qk_norm,
                layer_scale=layer_scale,
                drop_path=rate,
                attention=attention,
            )
            for rate in drop_path_rates(drop_path, depth, drop_path_schedule)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Float[Tensor, "B K D"], places: Sequence[Place]) -> Float[Tensor, "B K D"]:
        """Return the normalised tokens after all blocks, each of which gets its place."""
        for block, place in zip(self.blocks, places, strict=True):
            if self.activation_checkpointing and self.training and x.requires_grad:
                x = checkpoint(block, x, place, use_reentrant=False)
            else:
                x = block(x, place)
        out: Tensor = self.norm(x)
        return out

    def attention_maps(self, x: Float[Tensor, "B K D"], places: Sequence[Place]) -> list[Float[Tensor, "B H K K"]]:
        """Return the attention weights of each block."""
        maps = []
        for block, place in zip(self.blocks, places, strict=True):
            assert isinstance(block, Block)
            maps.append(block.attn.weights(block.norm1(x), place))
            x = block(x, place)
        return maps
