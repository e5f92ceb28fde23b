"""Plain vision transformers of timm, in and out."""

import copy
from collections.abc import Collection
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from hjepa_models._validation import suggestion
from hjepa_models.converters._mapping import Slot, check_names, exact_ratio, flatten_kernel, linear_slots, load_slots
from hjepa_models.converters._timm_parts import DROPPABLE, config_of, find_problems
from hjepa_models.encoder import Encoder, EncoderConfig
from hjepa_models.layers.block import MlpKind
from hjepa_models.layers.positions import Position

HEAD = ("head.", "fc_norm.")
"""Weights behind the tokens, which are always left out."""

EXPORTED = (
    *("image_size", "patch_size", "in_channels", "embed_dim", "depth", "num_heads", "mlp_ratio", "mlp", "position"),
    *("position_grid", "qk_norm", "layer_scale", "drop_path", "drop_path_schedule", "registers"),
    "activation_checkpointing",
)
"""Fields of an encoder that timm's plain transformer has as well."""

WITHOUT_EFFECT = (
    *("rope_theta", "stem_channels", "stem_blocks", "processing_patch_size", "upsampling", "upsampler_dim"),
    *("attention", "init_std"),
)
"""Fields that change nothing in what an encoder returns whose other fields are exported."""


def from_timm(model: nn.Module | str, *, pretrained: bool = True, drop: Collection[str] = ()) -> Encoder:
    """Return a plain vision transformer of timm as an encoder whose tokens are the same.

    `forward` gives the patch tokens of `forward_features`, `encode` the prefix tokens as well. The class token becomes
    the first register, with its position added to it; register tokens follow. The position table becomes
    `position=learned`, without gradient where it had none; at other image sizes it is interpolated linearly, where timm
    may do so bicubically. LayerScale, normalised queries and keys, DropPath, GELU and SwiGLU layers map as they are;
    maps without a bias get one of 0.

    The classifier (`head`, `fc_norm`) is always left out: take it from the timm model where it is wanted. Attention
    pooling and dropout are refused unless `drop` names them.

    Args:
        model: a `timm.models.VisionTransformer`, or the name of one.
        pretrained: where a name is given, take its published weights (timm fetches them) and not random ones.
        drop: parts that may be lost: `attn_pool`, `dropout`.

    Returns:
        The encoder, in the mode, dtype and on the device of the model.

    Raises:
        ValueError: for a model with anything else, each part listed by name, or a name that timm does not know.

    Source:
        Dosovitskiy et al. 2021 (arXiv 2010.11929), section 3.1.
    """
    unknown = [name for name in drop if name not in DROPPABLE]
    if unknown:
        raise ValueError(
            f"drop={tuple(drop)}: {unknown[0]!r} is no part; allowed: {', '.join(DROPPABLE)}"
            f"{suggestion(unknown[0], DROPPABLE)}"
        )
    if isinstance(model, str):
        model = _create(model, pretrained)
    source = type(model).__name__
    problems = list(find_problems(model, drop))
    if problems:
        raise ValueError(
            f"{source}: has what an encoder has not: {'; '.join(problems)}; allowed: timm's plain pre-norm "
            f"VisionTransformer with a position table and GELU or SwiGLU layers; use another model"
        )
    vit: Any = model
    config = config_of(vit)
    encoder = config.build(device="meta")
    state = _read(vit, encoder)
    left_out = (*HEAD, "attn_pool.") if "attn_pool" in drop else HEAD
    state = {name: value for name, value in state.items() if not name.startswith(left_out)}
    slots = _slots(config)
    check_names(source, state, slots, "use another model")
    load_slots(encoder, state, slots, source)
    encoder.positions.table.requires_grad_(vit.pos_embed.requires_grad)
    return encoder.train(vit.training)


def to_timm(encoder: Encoder, *, class_token: bool = False) -> nn.Module:
    """Return an encoder as a `timm.models.VisionTransformer` whose tokens are the same, without a classifier.

    Register tokens come before the patches in both; they have no positions, which timm calls `no_embed_class`. Fixed
    positions, sin-cos ones or a table without gradient, leave as a table without gradient.

    Args:
        encoder: with a linear stem, and learned or sin-cos positions, on images of two axes.
        class_token: make the first register the class token, which timm then pools by; without it all registers are
            register tokens, and the patch tokens are averaged.

    Returns:
        The model with copies of the weights, in the mode, dtype and on the device of the encoder; its
        `reset_classifier` gives it a head.

    Raises:
        ValueError: for an encoder with a part that timm's plain transformer has not, each field named; for what is no
            encoder.
    """
    from timm.layers import LayerNorm, Mlp, SwiGLU
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(encoder, Encoder):
        kind = type(encoder).__name__  # type: ignore[unreachable]
        raise ValueError(f"encoder: this is a {kind}; allowed: an Encoder, of an HJEPA to_timm(model.encoder)")
    config = encoder.config
    _check_export(config, class_token)
    blocks: list[Any] = list(encoder.transformer.blocks)
    swiglu = config.mlp is MlpKind.swiglu
    image_size, patch_size = ((axes[0], axes[1]) for axes in (config.image_size, config.patch_size))
    with torch.device("meta"):
        model: Any = VisionTransformer(
            img_size=image_size,
            patch_size=patch_size,
            in_chans=config.in_channels,
            num_classes=0,
            global_pool="token" if class_token else "avg",
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=exact_ratio(blocks[0].mlp.fc2.in_features, config.embed_dim),
            qk_norm=config.qk_norm,
            # timm leaves LayerScale out for a first value of 0.
            init_values=None if config.layer_scale is None else config.layer_scale or 1e-5,
            class_token=class_token,
            no_embed_class=True,
            reg_tokens=config.registers - class_token,
            fc_norm=False,
            weight_init="skip",
            norm_layer=LayerNorm,
            mlp_layer=SwiGLU if swiglu else Mlp,
            act_layer=nn.SiLU if swiglu else nn.GELU,
        )
    for block, own in zip(model.blocks, blocks, strict=True):
        block.drop_path1, block.drop_path2 = copy.deepcopy(own.drop1), copy.deepcopy(own.drop2)
        if config.qk_norm:
            block.attn.q_norm.eps, block.attn.k_norm.eps = own.attn.query_norm.eps, own.attn.key_norm.eps
    model.set_grad_checkpointing(config.activation_checkpointing)
    model.load_state_dict(_write(encoder, class_token), assign=True)
    model.pos_embed.requires_grad_(config.position is Position.learned and encoder.positions.table.requires_grad)
    exported: nn.Module = model.train(encoder.training)
    return exported


def _create(name: str, pretrained: bool) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise ValueError(
            f"model={name!r}: unknown to timm {timm.__version__}; allowed: the names of timm.list_models()"
            f"{suggestion(name, timm.list_models())}"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = timm.create_model(name, pretrained=pretrained)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"model={name!r}: timm could not make it ({reason}); allowed: a model whose weights can be fetched; "
            f"give the model itself, or pretrained=False"
        ) from None
    return model


def _check_export(config: EncoderConfig, class_token: bool) -> None:
    problems = [
        f"{field.name}={getattr(config, field.name)}"
        for field in fields(config)
        if field.name not in (*EXPORTED, *WITHOUT_EFFECT) and getattr(config, field.name) != field.default
    ]
    if config.position not in (Position.learned, Position.sincos):
        problems.append(f"position={config.position}")
    if len(config.patch_size) != 2:
        problems.append(f"patch_size={config.patch_size}")
    if class_token and not config.registers:
        problems.append("registers=0 with class_token=True")
    if problems:
        raise ValueError(
            f"encoder: timm's plain transformer has no {', no '.join(problems)}; allowed: two axes, stem=linear, "
            f"position=learned or sincos, a register to be the class token; keep the encoder in this package"
        )


MODULES = {
    "norm1": "norm1",
    "attn.qkv": "attn.qkv",
    "attn.q_norm": "attn.query_norm",
    "attn.k_norm": "attn.key_norm",
    "attn.proj": "attn.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc1_g": "mlp.fc1_g",
    "mlp.fc1_x": "mlp.fc1_x",
    "mlp.fc2": "mlp.fc2",
}
"""Modules of a block: timm's name and ours."""


def _slots(config: EncoderConfig) -> dict[str, Slot]:
    """Return where each tensor goes: names of timm, but for all prefix tokens in one, and the gate of SwiGLU apart."""
    slots = linear_slots("patch_embed.proj", "stem.proj") | linear_slots("norm", "transformer.norm")
    slots["patch_embed.proj.weight"] = Slot("stem.proj.weight", flatten_kernel)
    slots["pos_embed"] = Slot("positions.table")
    if config.registers:
        slots["prefix"] = Slot("registers")
    absent = {"mlp.fc1"} if config.mlp is MlpKind.swiglu else {"mlp.fc1_g", "mlp.fc1_x"}
    absent |= set() if config.qk_norm else {"attn.q_norm", "attn.k_norm"}
    for layer in range(config.depth):
        there, here = f"blocks.{layer}", f"transformer.blocks.{layer}"
        for name, own in MODULES.items():
            slots |= {} if name in absent else linear_slots(f"{there}.{name}", f"{here}.{own}")
        if config.layer_scale is not None:
            slots |= {f"{there}.ls{number}.gamma": Slot(f"{here}.scale{number}.gamma") for number in (1, 2)}
    return slots


@torch.no_grad()
def _read(model: Any, encoder: Encoder) -> dict[str, Tensor]:  # noqa: ANN401
    """Return the weights of a timm model under the names of `_slots`, the head included."""
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is None:
            state[f"{name}.bias"] = module.weight.new_zeros(len(module.weight))
        elif isinstance(module, nn.LayerNorm):
            for part, fill in (("weight", torch.ones), ("bias", torch.zeros)):
                if getattr(module, part) is None:
                    like = model.pos_embed
                    state[f"{name}.{part}"] = fill(module.normalized_shape, dtype=like.dtype, device=like.device)
    prefix = [state.pop(name) for name in ("cls_token", "reg_token") if name in state]
    table = state["pos_embed"][0]
    if prefix:
        state["prefix"] = torch.cat(prefix, dim=1)
        if not model.no_embed_class:
            state["prefix"] = state["prefix"] + table[: model.num_prefix_tokens]
            table = table[model.num_prefix_tokens :]
    state["pos_embed"] = table
    for layer, (block, own) in enumerate(zip(model.blocks, encoder.transformer.blocks, strict=True)):
        _match_eps(state, f"blocks.{layer}.attn", block.attn, own)
        if f"blocks.{layer}.mlp.fc1.weight" in state and encoder.config.mlp is MlpKind.swiglu:
            for part in ("weight", "bias"):
                packed = state.pop(f"blocks.{layer}.mlp.fc1.{part}").chunk(2)
                state[f"blocks.{layer}.mlp.fc1_g.{part}"], state[f"blocks.{layer}.mlp.fc1_x.{part}"] = packed
    return state


def _match_eps(state: dict[str, Tensor], name: str, attention: Any, block: Any) -> None:  # noqa: ANN401
    """Scale queries and keys so that our norm of them gives what timm's gives: its eps is another one.

    The norm divides by the root of the variance plus eps; both grow alike where the channels grow with the root of eps.
    """
    dim = attention.qkv.in_features
    own = block.attn.query_norm, block.attn.key_norm
    for start, norm, ours in zip((0, dim), (attention.q_norm, attention.k_norm), own, strict=True):
        if isinstance(norm, nn.LayerNorm) and norm.eps != ours.eps:
            for part in ("weight", "bias"):
                scaled = state[f"{name}.qkv.{part}"].clone()
                scaled[start : start + dim] *= (ours.eps / norm.eps) ** 0.5
                state[f"{name}.qkv.{part}"] = scaled


@torch.no_grad()
def _write(encoder: Encoder, class_token: bool) -> dict[str, Tensor]:
    """Return copies of the weights of an encoder under timm's names."""
    config = encoder.config
    own = dict(encoder.state_dict())
    kernel = own["stem.proj.weight"]
    table = encoder.positions.embedding(config.grid, None, kernel.device)
    assert table is not None
    own["positions.table"] = table.to(kernel.dtype)
    own["stem.proj.weight"] = kernel.unflatten(1, (config.in_channels, *config.patch_size))
    state = {name: own[slot.key].detach().clone() for name, slot in _slots(config).items()}
    if config.registers:
        prefix = state.pop("prefix")
        names = {"cls_token": prefix[:, :class_token], "reg_token": prefix[:, class_token:]}
        state |= {name: tokens.clone() for name, tokens in names.items() if tokens.shape[1]}
    return state
