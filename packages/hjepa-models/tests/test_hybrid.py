"""Hybrid patch size: blocks see coarse patches, the loss scores fine ones."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hjepa_models import (
    EncoderConfig,
    Fpn,
    HJEPAConfig,
    LevelWeightsConfig,
    PatchScheduleConfig,
    PredictorConfig,
    PyramidConfig,
    dense_canvas,
    patch_discrimination,
    scatter_to_canvas,
    smooth_l1,
    upsample_canvas,
)
from hjepa_models.grid import gather_tokens
from hjepa_models.layers.norm import normalize
from hjepa_models.layers.upsampler import children_index


def encoder_config(**fields):
    size = {"image_size": (16, 24), "patch_size": (4, 4), "embed_dim": 32, "depth": 2, "num_heads": 2, "stem": "flexi"}
    return EncoderConfig(**(size | {"processing_patch_size": (8, 8), "output_patch_size": (1, 1)} | fields))


def small_config(targets="projection", *, encoder=None, levels=4, **fields):
    return HJEPAConfig(
        encoder=encoder_config(**(encoder or {})),
        predictor=PredictorConfig(depth=1, embed_dim=24, num_heads=2),
        pyramid=PyramidConfig(levels=levels, fpn="add", fpn_dim=16),
        level_weights=LevelWeightsConfig(weights=(1.0, 0.7, 0.5, 0.3)[:levels]),
        targets=targets,
        **fields,
    )


def batch(device, size=4, views=1):
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(6, generator=generator) for _ in range(size)]).to(device)
    images = [torch.randn(size, 3, 16, 24, generator=generator).to(device) for _ in range(views)]
    return images, order[:, :2], order[:, 2:6].view(-1, 2, 2)


@pytest.mark.parametrize("upsampling", ["bilinear", "learned"])
def test_the_encoder_takes_both_patch_sizes(device, upsampling):
    encoder = encoder_config(upsampling=upsampling).build(device=device)
    images = torch.randn(2, 3, 16, 24, device=device)
    coarse = encoder(images)
    assert coarse.shape == (2, 6, 32)
    fine = encoder(images, output_patch_size=(1, 1))
    assert fine.shape == (2, 384, 32)
    expected = upsample_canvas(dense_canvas(coarse, (2, 3)), (16, 24), 8).values
    torch.testing.assert_close(fine, expected, atol=1e-5, rtol=1e-5)  # the learned part starts at zero
    index = torch.tensor([[3, 383, 100], [0, 7, 7]], device=device)
    some = encoder(images, output_patch_size=(1, 1), output_index=index)
    torch.testing.assert_close(some, gather_tokens(fine, index))
    for patch, count in ((2, 96), (4, 24), (1, 384)):
        assert encoder(images, processing_patch_size=(patch, patch)).shape == (2, count, 32)
        assert encoder(images, output_patch_size=(patch, patch)).shape == (2, count, 32)
    visible = torch.tensor([[0, 4], [5, 2]], device=device)
    seen = encoder(images, visible, output_patch_size=(2, 2))
    known = scatter_to_canvas(encoder(images, visible), visible, (2, 3))
    torch.testing.assert_close(seen, upsample_canvas(known, (8, 12), 4).values, atol=1e-5, rtol=1e-5)


def test_a_flexible_stem_sees_a_finer_patch_of_a_resized_image_as_the_same_token(device):
    """The defining property of the resized weights: an image enlarged by 2 and patches enlarged by 2 are the same."""
    config = encoder_config(processing_patch_size=(), output_patch_size=(), depth=1)
    encoder = config.build(device=device).double()
    images = torch.randn(2, 3, 16, 24, device=device, dtype=torch.float64)
    patches = encoder.patchify(images).view(-1, 3, 4, 4)
    larger = torch.nn.functional.interpolate(patches, scale_factor=2, mode="bilinear", align_corners=False)
    tokens = encoder.stem(encoder.patchify(images))
    resized = encoder.stem(larger.flatten(1).view(2, 24, -1), (8, 8))
    torch.testing.assert_close(resized, tokens)


@pytest.mark.parametrize("targets", ["projection", "ema", "pooled"])
@pytest.mark.parametrize("output_tokens", [0, 3])
@pytest.mark.parametrize("upsampling", ["bilinear", "learned"])
def test_gradients_reach_all_that_trains(device, targets, output_tokens, upsampling):
    config = small_config(targets, encoder={"upsampling": upsampling}, output_tokens=output_tokens)
    model = config.build(device=device)
    views, context, target = batch(device)
    with torch.autocast(device.type, torch.bfloat16):
        output = model(views, context, target, step=0)
    output.loss.backward()
    assert set(output.level_losses) == {"0", "1", "2", "3"}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("output_tokens", [0, 3])
def test_the_loss_is_that_of_fine_tokens_inside_the_hidden_patches(device, output_tokens):
    model = small_config(levels=1, output_tokens=output_tokens).build(device=device)
    seen = []
    model.encoder.upsampler.register_forward_hook(lambda _m, args, out: seen.append((args[2], out)))
    views, context_index, target_index = batch(device)
    losses = model(views, context_index, target_index, step=0).level_losses
    ((index, predicted),) = seen
    everything = children_index(target_index.flatten(1), (2, 3), (16, 24))
    count = output_tokens or 64
    assert index.shape == (4, 4 * count)  # only tokens that the loss uses are upsampled
    for row, allowed in zip(index.tolist(), everything.tolist(), strict=True):
        assert len(set(row)) == len(row)
        assert set(row) <= set(allowed)
    pixels = views[0].flatten(2).transpose(1, 2)  # a patch of one pixel is its channels
    wanted = normalize(gather_tokens(pixels, index) @ model.projection.get_buffer("patch_1x1"))
    guess = model.pyramid(scatter_to_canvas(predicted, index, (16, 24)))[0].values
    aim = model.pyramid.pool(scatter_to_canvas(wanted, index, (16, 24)))[0].values
    expected = smooth_l1(gather_tokens(guess, index), gather_tokens(aim, index))
    torch.testing.assert_close(losses["0"], expected.detach(), atol=1e-5, rtol=1e-4)
    if output_tokens:
        model(views, context_index, target_index, step=1)
        assert not torch.equal(seen[0][0], seen[1][0])  # drawn anew each step
        model(views, context_index, target_index, step=0)
        assert torch.equal(seen[0][0], seen[2][0])


@pytest.mark.parametrize("targets", ["ema", "projection"])
def test_level_0_maps_run_on_the_scored_tokens_only(device, targets):
    """Where no level looks at neighbours, the output grid of 384 places is not projected for 12 tokens."""
    config = small_config(targets, output_tokens=3)
    config.pyramid.fpn = Fpn.none
    model = config.build(device=device)
    sizes = []
    for pyramid in (model.pyramid, model.target_pyramid):
        if pyramid is not None:
            pyramid.projection[0].register_forward_hook(lambda _m, args, _o: sizes.append(args[0].shape[1]))
    views, context, target = batch(device)
    assert model(views, context, target, step=0).loss.isfinite()
    assert sizes == [12] * (2 if targets == "ema" else 1)


@pytest.mark.parametrize(("target_patch", "count"), [((), 384), ((8, 8), 6), ((2, 2), 96)])
def test_the_target_encoder_sees_its_own_patch_size(device, target_patch, count):
    model = small_config("ema", target_patch_size=target_patch).build(device=device)
    sizes = []
    model.target_encoder.transformer.register_forward_hook(lambda _m, args, _o: sizes.append(args[0].shape[1]))
    views, context, target = batch(device)
    assert model(views, context, target, step=0).loss.isfinite()
    assert sizes == [count]


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_patches_are_told_apart_on_the_hidden_places_alone(device, scope):
    """What the whole output grid would give, blocks that overlap included, without comparing all its places."""
    fields = {"objective": "patch_discrimination", "contrast": scope, "output_tokens": 8}
    model = small_config(levels=1, **fields).build(device=device)
    index = torch.randint(384, (4, 40), device=device)
    index[:, :5] = index[:, 5:10]
    guess, wanted = (scatter_to_canvas(torch.randn(4, 40, 32, device=device), index, (16, 24)) for _ in range(2))
    loss = model.losses.level(guess, wanted, index)
    torch.testing.assert_close(loss, patch_discrimination(guess.values, wanted.values, 0.1, scope, wanted.weight))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        model(*batch(device), step=0)
    assert max(kept) < 384 * 384


@pytest.mark.parametrize("targets", ["projection", "pooled"])
def test_bins_of_a_model_in_half_precision(device, targets):
    """Tokens of an output grid come back as float32, the head is bfloat16 like all other weights."""
    config = small_config(targets, objective="two_hot", output_tokens=4)
    model = dataclasses.replace(config, pyramid=PyramidConfig(levels=4)).build(device=device).to(torch.bfloat16)
    views, context, target = batch(device)
    loss = model([view.to(torch.bfloat16) for view in views], context, target, step=0).loss
    loss.backward()
    assert loss.isfinite()


def test_levels_go_below_the_patch(device):
    model = small_config().build(device=device).eval()
    images = torch.randn(2, 3, 16, 24, device=device)
    counts = [model.features(images, level, "none").shape[1] for level in model.feature_levels]
    assert counts == [6, 384, 96, 24, 6]
    together = model.all_features(images, "none")
    for level in model.feature_levels:
        torch.testing.assert_close(together[level], model.features(images, level, "none"))


def test_the_schedule_refines_the_output(device):
    schedule = PatchScheduleConfig(sizes=(8, 4, 2, 1), total_steps=8)
    config = small_config(patch_schedule=schedule, encoder={"upsampling": "learned"}, levels=2, output_tokens=4)
    model = config.build(device=device)
    sizes = []
    model.encoder.upsampler.register_forward_hook(lambda _m, args, _o: sizes.append(args[1]))
    views, context, target = batch(device)
    for step in range(8):
        model.zero_grad()
        output = model(views, context, target, step)
        output.loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert sizes == [(2, 3)] * 2 + [(4, 6)] * 2 + [(8, 12)] * 2 + [(16, 24)] * 2


def test_tokens_that_were_not_encoded_are_zero(device):
    """Asked for by place, not by their number in the set."""
    encoder = encoder_config(processing_patch_size=(), output_patch_size=()).build(device=device)
    images = torch.randn(2, 3, 16, 24, device=device)
    visible = torch.tensor([[5, 9, 2], [7, 0, 20]], device=device)
    tokens = encoder(images, visible)
    asked = encoder(images, visible, output_index=torch.tensor([[9, 1], [20, 7]], device=device))
    torch.testing.assert_close(asked[0, 0], tokens[0, 1])
    torch.testing.assert_close(asked[1], tokens[1, [2, 0]])
    assert asked[0, 1].eq(0).all()


def test_processing_coarse_patches_saves_what_attention_costs(device):
    """64 times fewer tokens: attention needs 64 x 64 times fewer products, everything else 64 times fewer."""
    counted = {}
    for patch in (8, 1):
        config = encoder_config(image_size=(32, 32), processing_patch_size=(patch, patch), attention="explicit")
        encoder = config.build(device=device)
        with FlopCounterMode(display=False) as counter:
            encoder(torch.randn(1, 3, 32, 32, device=device))
        flops = counter.get_flop_counts()["Encoder.transformer"]
        attention = flops.pop(torch.ops.aten.bmm)
        counted[patch] = attention, sum(flops.values())
    assert counted[1][0] == 64 * 64 * counted[8][0]
    assert counted[1][1] == 64 * counted[8][1]


def test_a_hybrid_model_learns(device):
    model = small_config(output_tokens=4, encoder={"upsampling": "learned"}, levels=2).build(device=device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    _, context, target = batch(device)
    views = [torch.nn.functional.interpolate(torch.randn(4, 3, 2, 3, device=device), size=(16, 24), mode="bilinear")]
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        loss = model(views, context, target, step).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder": {"output_patch_size": (3, 3)}}, "output_patch_size=.3, 3.: does not divide the processing patch"),
        ({"encoder": {"stem": "linear"}}, "processing_patch_size=.8, 8.: stem=linear has weights for patch_size"),
        ({"encoder": {"processing_patch_size": (16, 16)}}, "image_size=.16, 24.: axis 1 has 24 pixels"),
        ({"targets": "detached"}, "targets=detached: the online encoder sees patches of .8, 8."),
        ({"patch_schedule": PatchScheduleConfig(sizes=(4, 2), total_steps=9)}, "end at output_patch_size=.1, 1."),
        ({"patch_schedule": PatchScheduleConfig(sizes=(16, 1), total_steps=9)}, "must divide the processing patch"),
        ({"targets": "ema", "target_patch_size": (3, 3)}, "encoder.image_size=.16, 24.: axis 0 has 16 pixels"),
        ({"targets": "ema", "target_patch_size": (4, 4), "encoder": {"output_patch_size": (8, 8)}}, "the output patch"),
        ({"target_patch_size": (8, 8)}, "target_patch_size=.8, 8.: targets=projection has no encoder"),
        ({"output_tokens": 65}, "output_tokens=65: a patch of .8, 8. holds 64 output tokens"),
        (
            {"encoder": {"output_patch_size": (), "upsampling": "learned"}},
            "upsampling=learned: without output_patch",
        ),
        (
            {"targets": "ema", "encoder": {"stem": "linear", "processing_patch_size": (), "output_patch_size": (2, 2)}},
            "target_patch_size=.*the target encoder would see patches of .2, 2.*target_patch_size=.4, 4.",
        ),
    ],
)
def test_bad_configs_say_why_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        small_config(**({"levels": 1} | fields))
    assert "\n" not in str(error.value)


def test_upsampling_without_an_upsampler_is_refused(device):
    encoder = encoder_config(output_patch_size=()).build(device=device)
    with pytest.raises(ValueError, match="output_patch_size: the encoder has no upsampler"):
        encoder(torch.randn(1, 3, 16, 24, device=device), output_patch_size=(2, 2))
