"""The transformer block and the stack of blocks that encoder and predictor share."""

from enum import StrEnum

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hjepa_models.layers.attention import Attention, AttentionBackend
from hjepa_models.layers.positions import Rotation


class MlpKind(StrEnum):
    """The feed-forward part of a block."""

    mlp = "mlp"
    swiglu = "swiglu"


def build_mlp(kind: MlpKind, dim: int, ratio: float) -> nn.Module:
    """Return a feed-forward layer; SwiGLU takes 2/3 of the hidden width, so that both have as many parameters."""
    from timm.layers import Mlp, SwiGLU  # takes seconds to import, and only a model that is built needs it

    hidden = int(dim * ratio)
    if kind is MlpKind.swiglu:
        swiglu: nn.Module = SwiGLU(dim, hidden * 2 // 3, align_to=8)
        return swiglu
    mlp: nn.Module = Mlp(dim, hidden)
    return mlp


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

    def forward(self, x: Float[Tensor, "B K D"], rotation: Rotation | None = None) -> Float[Tensor, "B K D"]:
        """Return the tokens after one block."""
        x = x + self.drop1(self.scale1(self.attn(self.norm1(x), rotation)))
        out: Tensor = x + self.drop2(self.scale2(self.mlp(self.norm2(x))))
        return out


class Transformer(nn.Module):
    """A stack of blocks and a final norm; DropPath grows linearly with depth."""

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
                drop_path=drop_path * layer / max(depth - 1, 1),
                attention=attention,
            )
            for layer in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Float[Tensor, "B K D"], rotation: Rotation | None = None) -> Float[Tensor, "B K D"]:
        """Return the normalised tokens after all blocks."""
        for block in self.blocks:
            if self.activation_checkpointing and self.training and x.requires_grad:
                x = checkpoint(block, x, rotation, use_reentrant=False)
            else:
                x = block(x, rotation)
        out: Tensor = self.norm(x)
        return out
