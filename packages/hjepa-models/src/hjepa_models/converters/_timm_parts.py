"""What a vision transformer of timm is made of, and whether an encoder has the same parts."""

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from torch import nn

from hjepa_models.converters._mapping import exact_ratio
from hjepa_models.encoder import EncoderConfig
from hjepa_models.layers.block import DropPathSchedule, MlpKind, drop_path_rates
from hjepa_models.layers.positions import Position

DROPPABLE = ("attn_pool", "dropout")
"""Parts of a timm model that may be lost where the caller names them."""


class Widths(NamedTuple):
    """What all blocks of a model have in common."""

    num_heads: int
    mlp: MlpKind
    hidden: int
    qk_norm: bool
    layer_scale: float | None


def find_problems(model: nn.Module, drop: Collection[str]) -> Iterator[str]:
    """Name every part of a model that an encoder has not and the caller does not drop."""
    from timm.models.vision_transformer import VisionTransformer

    if type(model) is not VisionTransformer:
        for name in ("dist_token", "rope"):
            if getattr(model, name, None) is not None:
                yield name
        yield f"its class, which is not {VisionTransformer.__name__} itself"
        return
    yield from _embedding_problems(model)
    if isinstance(model.norm, nn.Identity):
        yield "norm: missing, only what is pooled from the tokens is normalised (fc_norm), or nothing"
    else:
        yield from _norm_problems("norm", model.norm)
    if model.attn_pool is not None and "attn_pool" not in drop:
        yield "attn_pool: attention pooling (name attn_pool in drop to lose it)"
    if "dropout" not in drop:
        yield from _dropout_problems(model)
    in_blocks: dict[str, int] = {}
    for layer, block in enumerate(model.blocks):
        for problem in _block_problems(block):
            in_blocks.setdefault(problem, layer)
    # What blocks have in common is named once, with the first of them.
    yield from (f"blocks.{layer}{problem}" for problem, layer in in_blocks.items())
    if not in_blocks:
        if len({widths_of(block) for block in model.blocks}) > 1:
            yield "blocks: not all alike"
        if drop_path_of(model) is None:
            yield "drop_path1, drop_path2: rates that neither rise linearly with depth nor are equal"


def _embedding_problems(model: Any) -> Iterator[str]:  # noqa: ANN401
    from timm.layers import PatchEmbed

    if type(model.patch_embed) is not PatchEmbed:
        yield f"patch_embed: {type(model.patch_embed).__name__}, not PatchEmbed"
    elif not isinstance(model.patch_embed.norm, nn.Identity):
        yield "patch_embed.norm: a norm of the patches"
    if model.pos_embed is None:
        yield "pos_embed: missing, the tokens have no positions"
    if not isinstance(model.norm_pre, nn.Identity):
        yield "norm_pre: a norm before the blocks"


def _dropout_problems(model: nn.Module) -> Iterator[str]:
    from timm.layers import PatchDropout

    found = [
        name
        for name, module in model.named_modules()
        if not name.startswith(("head_drop", "attn_pool"))
        and (isinstance(module, PatchDropout) or (isinstance(module, nn.Dropout) and module.p > 0))
    ]
    if found:
        more = f" and {len(found) - 1} more" if found[1:] else ""
        yield f"{found[0]}: dropout, here{more} (name dropout in drop to lose it)"


def _norm_problems(name: str, norm: nn.Module) -> Iterator[str]:
    if not isinstance(norm, nn.LayerNorm):
        yield f"{name}: {type(norm).__name__}, not LayerNorm"
    elif norm.eps != 1e-6:
        yield f"{name}: eps={norm.eps}, not 1e-06"


def _block_problems(block: Any) -> Iterator[str]:  # noqa: ANN401
    from timm.layers import Attention, LayerScale
    from timm.models.vision_transformer import Block

    if type(block) is not Block:
        yield f": {type(block).__name__}, not Block"
        return
    for name in ("norm1", "norm2"):
        yield from _norm_problems(f".{name}", getattr(block, name))
    if not (type(block.ls1) is type(block.ls2) and isinstance(block.ls1, nn.Identity | LayerScale)):
        yield f".ls1, ls2: {type(block.ls1).__name__} and {type(block.ls2).__name__}, not two LayerScale or none"
    if type(block.attn) is not Attention:
        yield f".attn: {type(block.attn).__name__}, not Attention"
    else:
        yield from _attention_problems(block.attn)
    yield from _mlp_problems(block.mlp)


def _attention_problems(attention: Any) -> Iterator[str]:  # noqa: ANN401
    if attention.qkv.out_features != 3 * attention.qkv.in_features:
        yield ".attn.qkv: heads wider or narrower than their share"
    if not isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity):
        yield ".attn.norm: a norm of the attended values"
    if getattr(attention, "gate", None) is not None:
        yield ".attn.gate: a gate of the attended values"
    query, key = attention.q_norm, attention.k_norm
    if not (type(query) is type(key) and isinstance(query, nn.Identity | nn.LayerNorm)):
        yield f".attn.q_norm, k_norm: {type(query).__name__} and {type(key).__name__}, not two LayerNorm or none"


def _mlp_problems(mlp: Any) -> Iterator[str]:  # noqa: ANN401
    from timm.layers import GluMlp, Mlp, SwiGLU
    from timm.layers.activations import GELU

    if type(mlp) not in (Mlp, SwiGLU, GluMlp):
        yield f".mlp: {type(mlp).__name__}, neither Mlp nor SwiGLU"
        return
    if not isinstance(mlp.norm, nn.Identity):
        yield ".mlp.norm: a norm of the hidden units"
    if type(mlp) is Mlp:
        if not isinstance(mlp.act, nn.GELU | GELU) or getattr(mlp.act, "approximate", "none") != "none":
            yield f".mlp.act: {mlp.act}, not the exact GELU"
        return
    if not isinstance(mlp.act, nn.SiLU):
        yield f".mlp.act: {mlp.act}, not the SiLU of SwiGLU"
    if type(mlp) is GluMlp and mlp.gate_last:
        yield ".mlp.gate_last: the second half of fc1 is the gate, not the first as in SwiGLUPacked"
    if mlp.fc2.in_features % 8:
        yield f".mlp.fc2: {mlp.fc2.in_features} hidden units of SwiGLU, not a multiple of 8"


def widths_of(block: Any) -> Widths:  # noqa: ANN401
    """Return the widths and kinds of a block without problems."""
    from timm.layers import Mlp

    return Widths(
        num_heads=block.attn.num_heads,
        mlp=MlpKind.mlp if isinstance(block.mlp, Mlp) else MlpKind.swiglu,
        hidden=block.mlp.fc2.in_features,
        qk_norm=not isinstance(block.attn.q_norm, nn.Identity),
        layer_scale=None if isinstance(block.ls1, nn.Identity) else getattr(block.ls1, "init_values", 1e-5),
    )


def drop_path_of(model: Any) -> tuple[float, DropPathSchedule] | None:  # noqa: ANN401
    """Return the rate and the schedule at which residuals are dropped, or nothing where the schedule is another."""
    rates = [getattr(drop, "drop_prob", 0.0) for block in model.blocks for drop in (block.drop_path1, block.drop_path2)]
    for schedule in DropPathSchedule:
        wanted = [rate for rate in drop_path_rates(rates[-1], len(model.blocks), schedule) for _ in range(2)]
        if max(abs(rate - other) for rate, other in zip(rates, wanted, strict=True)) < 1e-6:
            return rates[-1], schedule
    return None


def config_of(model: Any) -> EncoderConfig:  # noqa: ANN401
    """Return the config of an encoder with the parts of a model without problems."""
    widths, drop_path = widths_of(model.blocks[0]), drop_path_of(model)
    assert drop_path is not None
    # Our SwiGLU takes 2/3 of the hidden width that the ratio gives.
    hidden = widths.hidden if widths.mlp is MlpKind.mlp else widths.hidden * 3 // 2
    return EncoderConfig(
        image_size=tuple(model.patch_embed.img_size),
        patch_size=tuple(model.patch_embed.patch_size),
        in_channels=model.patch_embed.proj.in_channels,
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=widths.num_heads,
        mlp_ratio=exact_ratio(hidden, model.embed_dim),
        mlp=widths.mlp,
        position=Position.learned,
        qk_norm=widths.qk_norm,
        layer_scale=widths.layer_scale,
        drop_path=drop_path[0],
        drop_path_schedule=drop_path[1],
        registers=model.num_prefix_tokens,
        activation_checkpointing=model.grad_checkpointing,
    )
