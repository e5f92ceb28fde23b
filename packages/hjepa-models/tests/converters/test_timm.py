from functools import partial

import pytest
import timm
import torch
from timm.layers import DropPath, GluMlp, LayerNorm, PatchEmbed, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn

from hjepa_models import EncoderConfig
from hjepa_models.converters import from_timm, to_timm

TINY = {
    "img_size": (12, 20),
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "num_classes": 5,
    "init_values": 0.1,
}


@torch.no_grad()
def scatter(model, seed=0):
    """Move every weight away from its first value, so that none can be forgotten."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma") or (parameter.ndim == 1 and name.endswith("weight")):
            parameter.copy_(1 + 0.3 * drawn)
        elif parameter.ndim == 1:
            parameter.copy_(0.2 * drawn)
        elif name in ("pos_embed", "cls_token", "reg_token"):
            parameter.copy_(0.5 * drawn)
        else:
            parameter.copy_(drawn * parameter[0].numel() ** -0.5)
    return model.eval()


def tokens_of(model, images):
    with torch.no_grad():
        tokens = model.forward_features(images)
    return tokens[:, : model.num_prefix_tokens], tokens[:, model.num_prefix_tokens :]


def assert_same_tokens(encoder, model, images, tolerance=1e-5):
    prefix, patches = tokens_of(model, images)
    with torch.no_grad():
        registers, tokens = encoder.encode(images)
        torch.testing.assert_close(encoder(images), tokens, atol=0, rtol=0)
    torch.testing.assert_close(tokens, patches, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(registers, prefix, atol=tolerance, rtol=tolerance)


def assert_round_trip(encoder, class_token):
    again = from_timm(to_timm(encoder, class_token=class_token))
    assert again.config == encoder.config
    assert again.state_dict().keys() == encoder.state_dict().keys()
    for name, value in encoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


SIZES = [
    ("vit_tiny_patch16_224", None),
    ("vit_small_patch32_224", None),
    ("vit_small_patch16_224", None),
    ("vit_base_patch32_224", None),
    ("vit_base_patch16_224", None),
    ("vit_base_patch8_224", 2),
    ("vit_medium_patch16_gap_240", None),
    ("vit_base_patch14_dinov2", 2),
    ("vit_small_patch14_reg4_dinov2", None),
    ("vit_large_patch16_224", 2),
    ("vit_large_patch14_reg4_dinov2", 2),
    ("vit_huge_patch14_224", 2),
    ("vit_giant_patch14_224", 2),
    ("vit_giant_patch14_dinov2", 2),
    ("vit_gigantic_patch14_224", 2),
]
"""Every size; the depth is cut where the width alone is the point."""


@pytest.mark.parametrize(("name", "depth"), SIZES, ids=[name for name, _ in SIZES])
def test_every_size_gives_timms_tokens(device, name, depth):
    patch = int(name.split("patch")[1].split("_")[0])
    fields = {"img_size": (2 * patch, 3 * patch), "num_classes": 0, "weight_init": "skip"}
    fields |= {} if depth is None else {"depth": depth}
    model = scatter(timm.create_model(name, **fields)).to(device)
    encoder = from_timm(model)
    assert encoder.config.grid == (2, 3)
    assert not encoder.training
    assert_same_tokens(encoder, model, torch.randn(2, 3, 2 * patch, 3 * patch, device=device))


VARIANTS = {
    "class token with a position": {},
    "class token without a position": {"no_embed_class": True},
    "registers": {"reg_tokens": 3},
    "registers without positions": {"reg_tokens": 3, "no_embed_class": True},
    "registers only": {"reg_tokens": 2, "class_token": False, "global_pool": "avg", "fc_norm": False},
    "no prefix": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "no layer scale": {"init_values": None},
    "normalised queries and keys": {"qk_norm": True},
    "no biases of queries": {"qkv_bias": False},
    "swiglu": {"mlp_layer": SwiGLU, "act_layer": nn.SiLU, "mlp_ratio": 2.0},
    "packed swiglu": {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 3.0},
    "patches of two lengths": {"patch_size": (4, 2)},
    "one channel": {"in_chans": 1},
    "any image size": {"dynamic_img_size": True},
    "residuals dropped": {"drop_path_rate": 0.3},
    "odd mlp": {"mlp_ratio": 48 / 11},
    "norms without affine": {"norm_layer": partial(LayerNorm, affine=False)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_give_timms_tokens_there_and_back(device, name):
    model = scatter(VisionTransformer(**(TINY | VARIANTS[name]))).to(device)
    encoder = from_timm(model)
    images = torch.randn(2, model.in_chans, 12, 20, device=device)
    assert_same_tokens(encoder, model, images)
    assert_same_tokens(encoder, to_timm(encoder, class_token=model.has_class_token), images)
    assert_round_trip(encoder, model.has_class_token)


def test_the_other_eps_of_normalised_queries_is_made_up_for():
    model = scatter(VisionTransformer(**(TINY | {"qk_norm": True}))).double()
    for block in model.blocks:
        block.attn.q_norm.eps, block.attn.k_norm.eps = 0.5, 2.0  # coarse, so that it shows
    assert_same_tokens(from_timm(model), model, torch.randn(2, 3, 12, 20, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("mlp", ["mlp", "swiglu"])
@pytest.mark.parametrize("position", ["learned", "sincos"])
def test_our_encoders_leave_with_their_tokens(device, class_token, mlp, position):
    config = EncoderConfig(
        image_size=(12, 20),
        patch_size=(4, 4),
        embed_dim=24,
        depth=2,
        num_heads=3,
        mlp=mlp,
        position=position,
        qk_norm=True,
        layer_scale=0.1,
        drop_path=0.2,
        drop_path_schedule="constant",
        registers=3,
        attention="explicit",
        activation_checkpointing=True,
    )
    encoder = scatter(config.build()).to(device)
    if position == "learned":
        encoder.positions.table.requires_grad_(not class_token)  # a table that is fixed leaves, and comes back, fixed
    model = to_timm(encoder, class_token=class_token)
    assert model.has_class_token is class_token
    assert model.num_prefix_tokens == 3
    assert model.blocks[0].drop_path1.drop_prob == pytest.approx(0.2)
    assert model.pos_embed.requires_grad is (position == "learned" and not class_token)
    assert from_timm(model).positions.table.requires_grad is model.pos_embed.requires_grad
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if name != "pos_embed")
    images = torch.randn(2, 3, 12, 20, device=device)
    assert_same_tokens(encoder, model, images)
    pooled = model(images)
    prefix, patches = tokens_of(model, images)
    torch.testing.assert_close(pooled, prefix[:, 0] if class_token else patches.mean(1))
    again = from_timm(model)
    assert again.config.drop_path == pytest.approx(0.2)
    assert again.config.drop_path_schedule == "constant"
    assert again.config.activation_checkpointing
    for name, value in encoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert_same_tokens(again, model, images)


def test_copies_share_nothing_and_keep_dtype_and_mode():
    model = scatter(VisionTransformer(**TINY)).to(torch.bfloat16).train()
    encoder = from_timm(model)
    assert encoder.training
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    back = to_timm(encoder, class_token=True)
    assert back.training
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    for parameter in (*model.parameters(), *back.parameters()):
        parameter.data.fill_(7)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_a_name_gives_the_model_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    encoder = from_timm("test_vit", pretrained=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert (encoder.config.embed_dim, encoder.config.registers) == (64, 1)
    with pytest.raises(ValueError, match=r"unknown to timm.*did you mean 'vit_tiny_patch16_224'"):
        from_timm("vit_tiny_patch16_22")


def gapless_rates(model):
    model.blocks[1].drop_path1 = DropPath(0.9)


def unlike_blocks(model):
    model.blocks[1].attn.num_heads = 2


def lost_scale(model):
    model.blocks[2].ls2 = nn.Identity()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pos_embed": "none"}, "pos_embed: missing"),
        ({"pre_norm": True}, "norm_pre: a norm before the blocks"),
        ({"global_pool": "avg"}, r"norm: missing.*fc_norm"),
        ({"final_norm": False}, "norm: missing"),
        ({"global_pool": "map"}, "attn_pool: attention pooling"),
        ({"act_layer": "gelu_tanh"}, r"blocks\.0\.mlp\.act: GELUTanh"),
        ({"act_layer": nn.ReLU}, r"blocks\.0\.mlp\.act: ReLU"),
        ({"mlp_layer": SwiGLU}, r"blocks\.0\.mlp\.act: GELU.*not the SiLU"),
        ({"mlp_layer": GluMlp, "act_layer": nn.SiLU}, "gate_last"),
        ({"mlp_layer": SwiGLU, "act_layer": nn.SiLU, "mlp_ratio": 3.1}, "99 hidden units"),
        ({"scale_mlp_norm": True}, r"blocks\.0\.mlp\.norm"),
        ({"scale_attn_norm": True}, r"blocks\.0\.attn\.norm"),
        ({"attn_layer": "diff"}, r"blocks\.0\.attn: DiffAttention"),
        ({"block_fn": ParallelScalingBlock}, r"blocks\.0: ParallelScalingBlock"),
        ({"norm_layer": partial(LayerNorm, eps=1e-5)}, r"blocks\.0\.norm1: eps=1e-05"),
        ({"norm_layer": "rmsnorm"}, r"norm: RmsNorm"),
        ({"embed_norm_layer": "layernorm"}, r"patch_embed\.norm"),
        ({"embed_layer": type("Other", (PatchEmbed,), {})}, "patch_embed: Other"),
        ({"pos_drop_rate": 0.1}, "pos_drop: dropout"),
        ({"proj_drop_rate": 0.1}, r"blocks\.0\.attn\.proj_drop: dropout"),
        ({"attn_drop_rate": 0.1}, r"blocks\.0\.attn\.attn_drop: dropout"),
        ({"patch_drop_rate": 0.1}, "patch_drop: dropout"),
        (gapless_rates, "drop_path1, drop_path2: rates"),
        (unlike_blocks, "blocks: not all alike"),
        (lost_scale, r"blocks\.2\.ls1, ls2: LayerScale and Identity"),
    ],
)
def test_what_does_not_map_is_refused_by_name_in_one_line(fields, message):
    if callable(fields):
        model = VisionTransformer(**TINY)
        fields(model)
    else:
        model = VisionTransformer(**(TINY | fields))
    with pytest.raises(ValueError, match=message) as error:
        from_timm(model)
    assert "\n" not in str(error.value)
    assert "blocks.1.mlp" not in str(error.value)  # what is alike in all blocks is named once


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deit_tiny_distilled_patch16_224", "dist_token; its class"),
        ("eva02_tiny_patch14_224", "rope; its class"),
        ("resnet18", "its class, which is not VisionTransformer"),
    ],
)
def test_other_models_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        from_timm(name, pretrained=False)


def test_a_whole_model_is_told_to_give_its_encoder():
    with pytest.raises(ValueError, match=r"a Linear; allowed: .*to_timm\(model\.encoder\)"):
        to_timm(nn.Linear(2, 2))


def test_parts_are_lost_only_where_they_are_named(device):
    fields = {"global_pool": "map", "class_token": False, "attn_drop_rate": 0.1, "patch_drop_rate": 0.2}
    model = scatter(VisionTransformer(**(TINY | fields))).to(device)
    with pytest.raises(ValueError, match="attn_pool"):
        from_timm(model, drop=("dropout",))
    with pytest.raises(ValueError, match="dropout"):
        from_timm(model, drop=("attn_pool",))
    encoder = from_timm(model, drop=("attn_pool", "dropout"))
    assert_same_tokens(encoder, model, torch.randn(2, 3, 12, 20, device=device))
    with pytest.raises(ValueError, match=r"'attn_pol' is no part.*did you mean 'attn_pool'"):
        from_timm(model, drop=("attn_pol",))


def test_weights_without_a_place_are_listed():
    model = VisionTransformer(**TINY)
    model.extra = nn.Linear(2, 2)
    del model.blocks[1].norm2
    model.blocks[1].norm2 = nn.LayerNorm(16, eps=1e-6)
    with pytest.raises(ValueError, match=r"missing: none; unexpected: extra\.weight, extra\.bias"):
        from_timm(model)
    del model.extra
    with pytest.raises(ValueError, match=r"other shapes: blocks\.1\.norm2\.weight \(16,\) for \(32,\)"):
        from_timm(model)


@pytest.mark.parametrize(
    ("fields", "class_token", "message"),
    [
        ({"position": "rope"}, False, "no position=rope"),
        ({"position": "rope_mixed"}, False, "no position=rope_mixed"),
        ({"position": "relative"}, False, "no position=relative"),
        ({"position": "rope", "rope_legacy": True}, False, "no rope_legacy=True"),
        ({"stem": "conv"}, False, "no stem=conv"),
        ({"stem": "overlap", "stem_norm": "batch"}, False, "no stem=overlap, no stem_norm=batch"),
        ({"stem": "flexi"}, False, "no stem=flexi"),
        ({"output_patch_size": (2, 2)}, False, r"no output_patch_size=\(2, 2\)"),
        ({"image_size": (4, 8, 8), "patch_size": (2, 4, 4)}, False, r"no patch_size=\(2, 4, 4\)"),
        ({}, True, "no registers=0 with class_token=True"),
    ],
)
def test_encoders_with_other_parts_do_not_leave(fields, class_token, message):
    base = {"image_size": (8, 8), "patch_size": (4, 4), "embed_dim": 48, "depth": 1, "num_heads": 2}
    config = EncoderConfig(**(base | {"position": "learned"} | fields))
    with pytest.raises(ValueError, match=message) as error:
        to_timm(config.build(), class_token=class_token)
    assert "\n" not in str(error.value)
