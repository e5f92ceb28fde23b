"""Every objective and term is reached by configuration, trains, and is what its function says."""

import pytest
import torch

from hjepa_models import (
    AggregateConfig,
    EncoderConfig,
    GlobalConfig,
    HJEPAConfig,
    LevelWeightsConfig,
    Objective,
    PredictorConfig,
    PyramidConfig,
    StateConfig,
    cjepa_loss,
    dense_canvas,
    disentanglement,
    info_nce,
    patch_discrimination,
    sigreg,
    smooth_l1,
    symlog,
    vicreg_terms,
)
from hjepa_models.layers.norm import normalize

AGGREGATE = AggregateConfig(hidden_dim=16, out_dim=8)
ONE_LEVEL = {"pyramid": {"levels": 1}, "level_weights": LevelWeightsConfig(weights=(1,))}
STATE = StateConfig(recurrent_dim=16, hidden_dim=16, num_groups=4, num_classes=4, overshooting=2)


def small_config(*, pyramid=None, predictor=None, with_global=False, **fields):
    return HJEPAConfig(
        encoder=EncoderConfig(image_size=(16, 24), patch_size=(4, 4), embed_dim=32, depth=2, num_heads=2),
        predictor=PredictorConfig(**({"depth": 1, "embed_dim": 24, "num_heads": 2} | (predictor or {}))),
        pyramid=PyramidConfig(**({"levels": 3, "fpn_dim": 16, "fpn": "add"} | (pyramid or {}))),
        global_level=GlobalConfig(hidden_dim=24, out_dim=8, num_directions=16) if with_global else None,
        **fields,
    )


def batch(device, views=2, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(24, generator=generator) for _ in range(size)]).to(device)
    images = [torch.randn(size, 3, 16, 24, generator=generator).to(device) for _ in range(views)]
    return images, order[:, :8], order[:, 8:20].view(size, 3, 4)


CASES = {
    **{f"objective={name}": {"objective": name} for name in Objective},
    "symlog": {"symlog": True},
    "patch_discrimination over the batch": {"objective": "patch_discrimination", "contrast": "batch"},
    "instance of one view": {"instance_weight": 0.1, "aggregate": AGGREGATE},
    "instance of two views": {"instance_weight": 0.1, "aggregate": AGGREGATE, "masked_views": 2},
    "instance beside projected pixels": {
        "instance_weight": 0.1,
        "aggregate": AGGREGATE,
        "masked_views": 2,
        "targets": "projection",
    },
    "vicreg": {"vicreg_weight": 0.1},
    "vicreg per level": {"vicreg_weight": 0.1, "vicreg_levels": True},
    "disentanglement": {"disentanglement_weight": 0.1},
    "online + sigreg": {"targets": "online", "sigreg_weight": 0.05},
    "projection": {"targets": "projection"},
    "adaptive": {"level_weights": LevelWeightsConfig(kind="adaptive")},
    "state": {"predictor": {"state": STATE}},
    "isolated": {"predictor": {"mode": "isolated"}},
    "bottlenecks and attention": {"pyramid": {"level_dims": (16, 12, 8), "attention_heads": 1}},
    "global with sigreg of views": {"with_global": True, "sigreg_weight": 0.05},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_every_choice_trains_whatever_has_weights(device, fields):
    model = small_config(**fields).build(device=device)
    views, context, target = batch(device)
    with torch.autocast(device.type, torch.bfloat16):
        output = model(views, context, target, step=0)
    output.loss.backward()
    assert output.loss.isfinite()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.slow
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_every_choice_lowers_its_loss(device, fields):
    model = small_config(**fields).build(device=device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    views, context, target = batch(device)
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        loss = model(views, context, target, step).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_the_loss_is_the_weighted_sum_of_what_is_reported(device, fields):
    model = small_config(**fields).build(device=device)
    views, context, target = batch(device)
    output = model(views, context, target, step=0)
    weights = {"0": 1.0, "1": 0.7, "2": 0.5, "global": 1.0, "state": 1.0} | {
        term: getattr(model.config, f"{term}_weight") for term in ("vicreg", "sigreg", "disentanglement", "instance")
    }
    expected = sum(weights[name] * loss for name, loss in output.level_losses.items())
    torch.testing.assert_close(output.loss.detach(), expected)


def parts(model, views, context_index, target_index):
    """What the branches of a model give, computed once more by hand."""
    index = target_index.flatten(1)
    context = model.encoder(views[0], context_index)
    predicted = model.predictor(context, context_index, target_index).flatten(1, 2)
    canvas = torch.zeros(len(predicted), 24, 32, device=predicted.device)
    weight = torch.zeros(len(predicted), 24, device=predicted.device)
    canvas = canvas.scatter(1, index.unsqueeze(-1).expand_as(predicted), predicted)
    from hjepa_models import Canvas

    levels = model.pyramid(Canvas(canvas, weight.scatter(1, index, 1.0), (4, 6)))
    return context, predicted, levels


def test_terms_are_what_their_functions_say(device):
    model = small_config(
        targets="online",
        sigreg_weight=0.1,
        vicreg_weight=0.1,
        disentanglement_weight=0.1,
        instance_weight=0.1,
        aggregate=AGGREGATE,
    ).build(device=device)
    views, context_index, target_index = batch(device)
    losses = model(views, context_index, target_index, step=7).level_losses
    context, predicted, levels = parts(model, views, context_index, target_index)
    whole = model.encoder(views[0])
    terms = vicreg_terms(predicted.mean(1))
    expected = {
        "sigreg": sigreg(whole.mean(1), 7),
        "vicreg": 25 * terms.variance + terms.covariance,
        "disentanglement": disentanglement(levels),
        "instance": info_nce(model.losses.aggregate(context), model.losses.aggregate(whole), 0.1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value.detach(), atol=1e-4, rtol=1e-4)


def test_c_jepa_is_what_its_function_says(device):
    """Prediction and VICReg with its invariance, on a level 0 without learned maps."""
    config = small_config(
        targets="pooled",
        objective="l2",
        pyramid={"levels": 1, "fpn": "none", "projection": False, "output_norm": False},
        level_weights=LevelWeightsConfig(weights=(1.0,)),
        vicreg_weight=0.001,
        vicreg_invariance=25.0,
    )
    model = config.build(device=device)
    views, context_index, target_index = batch(device)
    index = target_index.flatten(1)
    predicted = model.predictor(model.encoder(views[0], context_index), context_index, target_index).flatten(1, 2)
    wanted = normalize(model.target_encoder(views[0]).gather(1, index.unsqueeze(-1).expand_as(predicted)))
    loss = model(views, context_index, target_index, step=0).loss
    torch.testing.assert_close(loss, cjepa_loss(predicted, wanted))


def test_sigreg_takes_each_view_as_a_sample_of_its_own(device):
    model = small_config(targets="online", sigreg_weight=0.1, masked_views=2).build(device=device)
    views, context, target = batch(device)
    twice = model([views[0], views[0]], context, target, step=3).level_losses["sigreg"]
    torch.testing.assert_close(twice, sigreg(model.encoder(views[0]).mean(1), 3).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", [{"vicreg_weight": 0.1}, {"vicreg_weight": 0.1, "vicreg_levels": True}])
def test_one_image_is_no_reason_to_fail(device, fields):
    model = small_config(**fields).build(device=device)
    views, context, target = batch(device, size=1)
    assert model(views, context, target, step=0).loss.isfinite()


def test_the_state_foresees_in_evaluation_and_takes_one_block(device):
    model = small_config(predictor={"state": STATE}).build(device=device)
    views, context, target = batch(device)
    conditions = []
    model.predictor.register_forward_pre_hook(lambda _m, args: conditions.append(args[4]))
    one_block = target[:, :1]  # shorter than the overshooting
    assert model(views, context, one_block, step=0).loss.isfinite()
    model.eval()
    for scale in (1.0, 5.0):  # other targets, the same context: pixels of hidden patches
        hidden = torch.ones(8, 24, dtype=torch.bool, device=device).scatter(1, context, False).view(8, 1, 4, 6)
        changed = views[0] + scale * hidden.repeat_interleave(4, 2).repeat_interleave(4, 3)
        model([changed], context, target, step=0)
    torch.testing.assert_close(conditions[1], conditions[2])


def test_vicreg_per_level_follows_the_weights_of_the_levels(device):
    model = small_config(vicreg_weight=1.0, vicreg_levels=True).build(device=device)
    views, context_index, target_index = batch(device)
    losses = model(views, context_index, target_index, step=0).level_losses
    _, _, levels = parts(model, views, context_index, target_index)
    expected = 0.0
    for weight, canvas in zip((1.0, 0.7, 0.5), levels, strict=True):
        mean = (canvas.values * canvas.weight.unsqueeze(-1)).sum(1) / canvas.weight.sum(1, keepdim=True)
        terms = vicreg_terms(mean)
        expected += weight * (25 * terms.variance + terms.covariance)
    torch.testing.assert_close(losses["vicreg"], expected.detach(), atol=1e-4, rtol=1e-4)


def test_vicreg_per_level_follows_adaptive_weights_too(device):
    weights = LevelWeightsConfig(kind="adaptive", momentum=0.0)
    model = small_config(vicreg_weight=1.0, vicreg_levels=True, level_weights=weights).build(device=device)
    views, context_index, target_index = batch(device)
    first = model(views, context_index, target_index, step=0).level_losses["vicreg"]
    second = model(views, context_index, target_index, step=1).level_losses["vicreg"]
    assert not torch.equal(first, second)  # nothing was trained between them: the weights moved


def test_symlog_and_contrast_reach_the_levels(device):
    model = small_config(targets="pooled", symlog=True, pyramid={"fpn": "none", "projection": False}).build(
        device=device
    )
    one, other = (dense_canvas(3 * torch.randn(2, 24, 32, device=device), (4, 6)) for _ in range(2))
    expected = smooth_l1(symlog(one.values), symlog(other.values))
    torch.testing.assert_close(model.losses.level(one, other), expected)
    model.config.objective = Objective.patch_discrimination
    for scope in ("image", "batch"):
        model.config.contrast = scope
        expected = patch_discrimination(one.values, other.values, 0.1, scope)
        torch.testing.assert_close(model.losses.level(one, other), expected)


def test_a_level_of_one_token_is_told_from_those_of_other_images_alone(device):
    fields = {"objective": "patch_discrimination", "pyramid": {"levels": 4}}
    views, context, target = batch(device)
    for contrast in ("image", "batch"):
        config = small_config(**fields, level_weights=LevelWeightsConfig(weights=(1, 1, 1, 1)), contrast=contrast)
        losses = config.build(device=device)(views, context, target, step=0).level_losses
        assert (losses["3"] > 0.1) == (contrast == "batch")
        assert losses["2"] > 0.1


def test_adaptive_weights_follow_the_average_loss_and_are_saved(device):
    model = small_config(level_weights=LevelWeightsConfig(kind="adaptive", momentum=0.5)).build(device=device)
    views, context, target = batch(device)
    first = model(views, context, target, step=0)
    base = torch.tensor([1.0, 0.7, 0.5], device=device)
    losses = torch.stack([first.level_losses[str(level)] for level in range(3)])
    torch.testing.assert_close(first.loss.detach(), (base * losses).sum())
    assert "level_averages.average" in model.state_dict()
    torch.testing.assert_close(model.level_averages(torch.tensor(1, device=device)), losses)
    second = model(views, context, target, step=1)
    weights = base / losses * base.sum() / (base / losses).sum()
    again = torch.stack([second.level_losses[str(level)] for level in range(3)])
    torch.testing.assert_close(second.loss.detach(), (weights * again).sum())
    model.eval()
    before = {name: value.clone() for name, value in model.level_averages.state_dict().items()}
    model(views, context, target, step=2)
    for name, value in model.level_averages.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_online_targets_carry_gradients_and_detached_ones_do_not(device):
    """The gradient of online targets is that of the whole loss, which differences of the loss confirm."""
    for targets in ("online", "detached"):
        model = small_config(targets=targets, with_global=True).build(device=device)
        views, context, target = batch(device)
        seen = []
        model.encoder.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out) or out.retain_grad())
        model.global_level.config.weight = 0.0
        model(views, context, target, step=0).loss.backward()
        whole = seen[0].grad
        assert (whole is not None and bool(whole.abs().sum() > 0)) == (targets == "online")


@pytest.mark.slow
def test_sigreg_keeps_online_targets_from_collapsing(device):
    spread = {}
    for weight in (1e-9, 0.1):
        model = small_config(targets="online", sigreg_weight=weight).build(device=device)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for step in range(150):
            views, context, target = batch(device, views=1, size=32, seed=step)
            optimizer.zero_grad()
            model(views, context, target, step).loss.backward()
            optimizer.step()
        tokens = model.encoder(batch(device, size=64, seed=999)[0][0]).mean(1).detach()
        spread[weight] = float(tokens.std(0).mean())
    assert spread[0.1] > 3 * spread[1e-9]


def test_projected_pixels_are_frozen_and_layer_normed(device):
    model = small_config(targets="projection").build(device=device)
    assert model.target_encoder is None
    assert not model.ema_pairs()
    assert "projection.patch_4x4" in model.state_dict()
    assert not any(name.startswith("projection") for name, _ in model.named_parameters())
    views, context_index, target_index = batch(device)
    patches = views[0].view(8, 3, 4, 4, 6, 4).permute(0, 2, 4, 1, 3, 5).reshape(8, 24, 48)
    wanted = normalize(patches @ model.projection.get_buffer("patch_4x4"))
    index = target_index.flatten(1)
    _, _, levels = parts(model, views, context_index, target_index)
    guess, aim = (x.gather(1, index.unsqueeze(-1).expand(-1, -1, 32)) for x in (levels[0].values, normalize(wanted)))
    losses = model(views, context_index, target_index, step=0).level_losses
    torch.testing.assert_close(losses["0"], smooth_l1(guess, aim).detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": "online"}, "targets=online: with gradients through both branches everything would collapse"),
        ({"sigreg_weight": 0.1}, "sigreg_weight=0.1: with targets=ema and no global level"),
        ({"contrast": "images"}, "contrast='images'.*did you mean 'image'"),
        (
            {"instance_weight": 0.1, "targets": "projection"},
            "instance_weight=0.1: with one masked view it needs target",
        ),
        ({"symlog": True, "objective": "two_hot"}, "symlog=True: objective=two_hot is no distance"),
        (
            {"vicreg_weight": 0.1, "vicreg_variance": 0.0, "vicreg_covariance": 0.0},
            "vicreg_weight=0.1: the weights inside the term are all 0",
        ),
        ({"predictor": {"num_heads": 12}}, "predictor.embed_dim / num_heads=2: too narrow or odd for position=rope"),
        ({"predictor": {"mlp_ratio": 0.01}}, "predictor.mlp_ratio=0.01: leaves no hidden unit"),
        ({"vicreg_levels": True}, "vicreg_levels=True: vicreg_weight=0 switches the term off"),
        ({"vicreg_invariance": 1.0}, "vicreg_invariance=1.0: vicreg_weight=0 switches the term off"),
        ({"temperature": float("nan")}, "temperature=nan: must be above 0"),
        ({"predictor": {"drop_path": 1.5}}, "predictor.drop_path=1.5: no rate"),
        (
            {"with_global": True, "vicreg_weight": 0.1, "level_weights": LevelWeightsConfig(weights=(0.0, 0.0, 0.0))},
            "vicreg_weight=0.1: prediction, to which it belongs, is off",
        ),
        ({"temperature": 0.0}, "temperature=0.0: must be above 0"),
        ({"objective": "two_hots"}, "did you mean 'two_hot'"),
        ({"instance_weight": -1.0}, "instance_weight=-1.0: must not be negative"),
        ({"output_tokens": 2}, "output_tokens=2: the encoder upsamples nothing"),
        (
            {
                "disentanglement_weight": 1.0,
                "pyramid": {"levels": 1},
                "level_weights": LevelWeightsConfig(weights=(1,)),
            },
            "disentanglement_weight=1.0: one level has nothing to differ from",
        ),
    ],
)
def test_bad_configs_say_why_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        small_config(**fields)
    assert "\n" not in str(error.value)
