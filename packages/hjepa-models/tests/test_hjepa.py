import dataclasses
import itertools
import math
from copy import deepcopy

import numpy as np
import pytest
import torch

from hjepa_models import (
    Branch,
    EncoderConfig,
    Fpn,
    GlobalConfig,
    HJEPAConfig,
    LevelWeightsConfig,
    Pooling,
    PredictorConfig,
    PyramidConfig,
    Targets,
    dense_canvas,
    scatter_to_canvas,
)
from hjepa_models.layers.attention_pool import AttentionPool
from hjepa_models.layers.norm import normalize
from hjepa_models.objectives import DISTANCES
from hjepa_models.state import StateConfig
from hjepa_models.step import Step

GRID = (4, 6)


def small_config(targets="ema", *, with_global=False, encoder=None, pyramid=None, **fields):
    sizes = {"image_size": (16, 24), "patch_size": (4, 4), "embed_dim": 32, "depth": 2, "num_heads": 2}
    if targets == "online" and not with_global:
        fields.setdefault("sigreg_weight", 0.1)
    return HJEPAConfig(
        encoder=EncoderConfig(**(sizes | (encoder or {}))),
        predictor=PredictorConfig(depth=1, embed_dim=24, num_heads=2),
        pyramid=PyramidConfig(**({"levels": 3, "fpn_dim": 16} | (pyramid or {}))),
        targets=targets,
        global_level=GlobalConfig(hidden_dim=24, out_dim=8, num_directions=16) if with_global else None,
        **fields,
    )


def batch(device, views=1, size=6, rows=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(24, generator=generator) for _ in range(rows or size)]).to(device)
    images = [torch.randn(size, 3, 16, 24, generator=generator).to(device) for _ in range(views)]
    return images, order[:, :8], order[:, 8:20].view(-1, 3, 4)


def trained(model):
    return [(name, p) for name, p in model.named_parameters() if not name.startswith("target_")]


@pytest.mark.parametrize(
    ("targets", "fpn", "pooling", "with_global"),
    [
        *itertools.product(Targets, ["concat"], ["learned"], [False, True]),
        *itertools.product(["ema"], Fpn, Pooling, [False]),
    ],
)
def test_gradients_reach_all_that_trains_and_nothing_else(device, targets, fpn, pooling, with_global):
    model = small_config(targets, with_global=with_global, pyramid={"fpn": fpn, "pooling": pooling, "pad": True}).build(
        device=device
    )
    views, context, target = batch(device, 2 if with_global else 1)
    with torch.autocast(device.type, torch.bfloat16):
        output = model(views, context, target, step=0)
    output.loss.backward()
    assert output.loss.isfinite()
    for name, parameter in trained(model):
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for online, copy in model.ema_pairs():
        assert all(p.grad is None and not p.requires_grad for p in copy.parameters())
        assert [n for n, _ in online.named_parameters()] == [n for n, _ in copy.named_parameters()]
    expected = {"0", "1", "2"} | ({"global"} if with_global else set())
    kept = {"sigreg"} if model.config.sigreg_weight else set()
    assert set(output.level_losses) == expected | kept
    assert set(output.embeddings) == expected | {"encoder"}
    assert all(len(e) == 6 and not e.requires_grad for e in output.embeddings.values())


@pytest.mark.parametrize(("targets", "with_global"), list(itertools.product(Targets, [False, True])))
def test_autocast_hands_no_gradientless_weights_to_the_online_branch(device, targets, with_global):
    """Half-precision copies of weights made under no_grad must not be reused: gradients are near those of float32."""
    model = small_config(targets, with_global=with_global).build(device=device)
    views, context, target = batch(device, 2)
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            model(views, context, target, step=0).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for _, p in trained(model)]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


@pytest.mark.parametrize(
    ("targets", "fpn", "pooling", "objective"),
    [
        *itertools.product(["ema"], Fpn, Pooling, ["smooth_l1"]),
        *itertools.product(["pooled"], ["none"], Pooling, ["smooth_l1"]),  # met by a pyramid without learned maps
        *itertools.product(["ema"], ["concat"], ["grid"], DISTANCES),
    ],
)
def test_predictions_equal_to_targets_give_zero_at_each_level(device, targets, fpn, pooling, objective):
    pyramid = {"fpn": fpn, "pooling": pooling, "pad": True, "projection": targets == "ema"}
    model = small_config(targets, pyramid=pyramid, objective=objective).build(device=device).requires_grad_(False)
    _, _, target_index = batch(device)
    index = target_index.flatten(1)
    tokens = normalize(torch.randn(6, 12, 32, device=device))
    canvas = scatter_to_canvas(tokens, index, GRID)
    targets_of_levels, predictions = model.target_levels(canvas), model.pyramid(canvas)
    for level, (prediction, target) in enumerate(zip(predictions, targets_of_levels, strict=True)):
        loss = model.losses.level(prediction, target, index if level == 0 else None)
        assert float(loss) == pytest.approx(0, abs=1e-6)
        moved = dataclasses.replace(prediction, values=prediction.values.roll(1, -1))
        assert float(model.losses.level(moved, target, index if level == 0 else None)) > 0.01


@pytest.mark.parametrize(
    "predictor", [{"mode": "per_block"}, {"mode": "isolated"}, {"state": StateConfig(num_groups=4)}]
)
def test_a_place_in_several_blocks_is_scored_in_each(device, predictor):
    config = small_config(
        encoder={"init_std": 0.4},  # with small weights all blocks predict much the same
        pyramid={"levels": 2, "level_dims": (16, 8)},
        objective="l2",
        level_weights=LevelWeightsConfig(weights=(1.0, 1.0)),
    )
    config.predictor = dataclasses.replace(config.predictor, **predictor)
    model = config.build(device=device)
    views, context, target = batch(device)
    target[:, 1:, :2] = target[:, :1, :2]  # two places are in every block
    seen = []
    model.predictor.register_forward_hook(lambda module, inputs, predicted: seen.append(predicted))
    loss = model(views, context, target, step=0).level_losses["0"]
    wanted = normalize(model.target_encoder(views[0]))
    blocks = []
    for predicted, index in zip(seen[0].unbind(1), target.unbind(1), strict=True):
        guess = model.pyramid(scatter_to_canvas(predicted, index, GRID))[0].values
        wish = model.target_pyramid(dense_canvas(wanted, GRID))[0].values
        blocks.append(torch.stack([(g[i] - w[i]).square() for g, w, i in zip(guess, wish, index, strict=True)]).mean())
    assert float(seen[0][:, :, :2].detach().std(1).mean()) > 0.1  # where blocks do differ
    torch.testing.assert_close(loss, torch.stack(blocks).mean().detach())


@pytest.mark.parametrize("targets", list(Targets))
def test_loss_is_the_weighted_sum_of_the_levels(device, targets):
    model = small_config(targets, with_global=True, vicreg_weight=0.01).build(device=device)
    views, context, target = batch(device, 2)
    output = model(views, context, target, step=3)
    losses = output.level_losses
    expected = losses["0"] + 0.7 * losses["1"] + 0.5 * losses["2"] + losses["global"] + 0.01 * losses["vicreg"]
    torch.testing.assert_close(output.loss.detach(), expected)


def test_level_0_equals_the_flat_loss_on_the_predicted_tokens(device):
    model = small_config("pooled", pyramid={"fpn": "none", "projection": False, "output_norm": False}).build(
        device=device
    )
    views, context_index, target_index = batch(device)
    output = model(views, context_index, target_index, step=0)
    predicted = model.predictor(model.encoder(views[0], context_index), context_index, target_index)
    tokens = normalize(model.target_encoder(views[0]))
    wanted = torch.stack([tokens[b][target_index[b]] for b in range(6)])
    torch.testing.assert_close(output.level_losses["0"], torch.nn.functional.smooth_l1_loss(predicted, wanted))


@pytest.mark.parametrize("targets", list(Targets))
def test_targets_do_not_depend_on_what_the_context_sees(device, targets):
    """The context branch must not see hidden patches: their pixels change targets only."""
    model = small_config(targets).build(device=device)
    views, context, _ = batch(device)
    changed = views[0].clone()
    hidden = torch.ones(6, 24, dtype=torch.bool, device=device).scatter(1, context, False).view(6, 1, 4, 6)
    changed += 9 * hidden.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(model.encoder(changed, context), model.encoder(views[0], context))


def test_every_view_is_encoded_once_when_targets_are_shared(device):
    model = small_config("detached", with_global=True).build(device=device)
    sizes = []
    model.encoder.register_forward_pre_hook(lambda _, args: sizes.append((len(args[0]), len(args) > 1)))
    views, context, target = batch(device, 3)
    model(views, context, target, step=0)
    assert sizes == [(18, False), (6, True)]


def test_the_curriculum_skips_the_masked_term_until_it_counts(device):
    weights = LevelWeightsConfig(kind="curriculum", ramp_start=(20, 15, 10), ramp_end=(30, 25, 20))
    model = small_config("detached", with_global=True, level_weights=weights).build(device=device)
    calls = []
    model.predictor.register_forward_hook(lambda *_: calls.append(1))
    views, context, target = batch(device, 2)
    early = model(views, context, target, step=5)
    assert not calls
    assert set(early.level_losses) == {"global"}
    early.loss.backward()
    assert set(model(views, context, target, step=12).level_losses) == {"2", "global"}
    assert set(model(views, context, target, step=40).level_losses) == {"0", "1", "2", "global"}
    assert model.may_skip_parameters
    assert not small_config().build(device=device).may_skip_parameters


def test_predict_every_computes_the_term_at_every_kth_step(device):
    model = small_config("detached", with_global=True, predict_every=3).build(device=device)
    views, context, target = batch(device, 2)
    assert ["0" in model(views, context, target, step=s).level_losses for s in range(5)] == [
        False,
        False,
        True,
        False,
        False,
    ]
    with pytest.raises(ValueError, match="predict_every=2: without a global level nothing is learned"):
        small_config(predict_every=2)


def test_a_step_without_a_masked_term_needs_no_masks(device):
    model = small_config("detached", with_global=True, predict_every=3).build(device=device)
    views, *masks = batch(device, views=2)
    assert [step for step in range(6) if model.needs_masks(step)] == [2, 5]
    assert torch.equal(model(views, None, None, 0).loss, model(views, *masks, 0).loss)
    with pytest.raises(ValueError, match="masks: None at step 2, which hides patches"):
        model(views, None, None, 2)


def test_a_step_at_which_no_level_counts_yet_has_a_loss_of_zero_and_a_backward_pass(device):
    weights = LevelWeightsConfig(kind="curriculum", ramp_start=(20, 15, 10), ramp_end=(30, 25, 20))
    output = small_config(level_weights=weights).build(device=device)(*batch(device), step=0)
    output.loss.backward()
    assert float(output.loss.detach()) == 0
    assert not output.level_losses


def test_masks_for_fewer_or_more_rows(device):
    model = small_config("detached", with_global=True, masked_views=2).build(device=device)
    views, context, target = batch(device, 2)
    shared = model(views, context, target, step=0)
    spelled = model(views, context.repeat(2, 1), target.repeat(2, 1, 1), step=0)
    torch.testing.assert_close(shared.loss, spelled.loss)
    some = model(views, context[:4], target[:4], step=0)
    assert len(some.embeddings["0"]) == 8
    for rows in (0, 7, 11):
        _, wrong, targets = batch(device, rows=max(rows, 1))
        with pytest.raises(ValueError, match="allowed: equal counts, 12 or 1 to 6"):
            model(views, wrong[:rows], targets[:rows], step=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda views, context, target: (views, context, target.flatten(1)), r"masks of shapes \(6, 8\) and \(6, 12\)"),
        (lambda views, context, target: (views, context[0], target), r"masks of shapes \(8,\)"),
        (lambda views, context, target: (views, context, target[:, :, :0]), "no places to predict"),
        (lambda views, context, target: (views, context, target[:, :0]), "no places to predict"),
        (lambda views, context, target: ([views[0], views[1][:5]], context, target), "as many images in each"),
        (lambda views, context, target: ([views[0], views[1][..., :16]], context, target), "first masked_views=2"),
        (
            lambda views, context, target: ([*views, views[0][..., :8], views[0]], context, target),
            "than the first last",
        ),
    ],
)
def test_views_and_masks_that_do_not_fit_are_one_clear_line(device, change, message):
    model = small_config("detached", with_global=True, masked_views=2).build(device=device)
    views, context, target = batch(device, 2)
    last = torch.arange(16, 24, device=device).expand(6, -1)
    with pytest.raises(ValueError, match=message) as error:
        model(*change(views, last - 16, torch.stack([last, last - 8], 1)[..., : 6 if "12" in message else 8]), step=0)
    assert "\n" not in str(error.value)
    small = [view[..., :8, :16] for view in views]  # views beyond the masked ones may have another size
    one = small_config("detached", with_global=True).build(device=device)
    assert one([*views, *small], context, target, step=0).loss.isfinite()


@pytest.mark.parametrize(
    ("seen", "hidden", "message"),
    [(0, 1, r"target masks name places .* to 24: not all on"), (-1, 0, "context .* -1 to")],
)
def test_places_off_the_grid_are_one_clear_line_on_a_cpu(seen, hidden, message):
    """Elsewhere the device's own assertion meets them, which ends the process."""
    model = small_config("detached", with_global=True, masked_views=2).build()
    views, _, _ = batch(torch.device("cpu"), 2)
    last = torch.arange(16, 24).expand(6, -1)
    with pytest.raises(ValueError, match=message):
        model(views, last - 16 + seen, torch.stack([last, last - 8], 1) + hidden, step=0)


def test_nothing_visible_and_one_hidden_token_are_a_step_like_any_other(device):
    model = small_config("ema", pyramid={"fpn": "concat"}).build(device=device)
    views, context, target = batch(device)
    for seen, hidden in ((context[:, :0], target), (context, target[:, :1, :1])):
        output = model(views, seen, hidden, step=0)
        output.loss.backward()
        assert output.loss.isfinite()


def test_too_few_views_are_refused(device):
    model = small_config(with_global=True).build(device=device)
    views, context, target = batch(device)
    with pytest.raises(ValueError, match="views: 1 given; allowed: 2"):
        model(views, context, target, step=0)


@pytest.mark.parametrize("targets", [Targets.ema, Targets.pooled])
def test_target_branch_follows_the_closed_form_of_an_average(device, targets):
    model = small_config(targets, with_global=True).build(device=device)
    pairs = model.ema_pairs()
    assert len(pairs) == (3 if targets is Targets.ema else 2)
    start = [[p.clone() for p in target.parameters()] for _, target in pairs]
    with torch.no_grad():
        for online, _ in pairs:
            for parameter in online.parameters():
                parameter.add_(1.0)
        for _ in range(5):
            for online, target in pairs:
                for p, t in zip(online.parameters(), target.parameters(), strict=True):
                    t.lerp_(p, 0.1)
    for (_, target), first in zip(pairs, start, strict=True):
        for t, s in zip(target.parameters(), first, strict=True):
            torch.testing.assert_close(t, s + (1 - 0.9**5))


def test_target_branch_starts_equal_and_stays_in_evaluation_mode(device):
    model = small_config(with_global=True, encoder={"drop_path": 0.5}).build(device=device)
    model.train()
    assert model.encoder.training
    assert not any(m.training for _, target in model.ema_pairs() for m in target.modules())
    for online, target in model.ema_pairs():
        assert all(torch.equal(a, b) for a, b in zip(online.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize("targets", list(Targets))
def test_features_of_every_level_and_pool(device, targets):
    model = small_config(targets, with_global=True, pyramid={"fpn": "add"}).build(device=device).eval()
    images = torch.randn(5, 3, 16, 24, device=device)
    assert model.feature_levels == ("encoder", 0, 1, 2, "global")
    counts = {"encoder": 24, 0: 24, 1: 6, 2: 2}
    for level, count in counts.items():
        for branch in ("target", "online"):
            tokens = model.features(images, level, "none", branch)
            assert tokens.shape == (5, count, 32)
            assert not tokens.requires_grad
            torch.testing.assert_close(model.features(images, level, "mean", branch), tokens.mean(1))
            assert torch.equal(model.features(images, level, "flatten", branch), tokens.flatten(1))
    assert model.features(images, "global").shape == (5, 8)
    expected = model.pyramid(dense_canvas(normalize(model.encoder(images)), GRID))[1].values
    torch.testing.assert_close(model.features(images, 1, "none", "online"), expected)


@pytest.mark.parametrize("position", ["rope", "rope_mixed", "sincos", "learned", "relative"])
@pytest.mark.parametrize("pyramid", [{"fpn": "concat", "attention_heads": 2}, {"pooling": "learned"}])
def test_a_model_in_half_precision_has_nearly_the_same_features(device, position, pyramid):
    config = small_config(with_global=True, encoder={"position": position, "registers": 1}, pyramid=pyramid)
    model = config.build(device=device).eval()
    images = torch.randn(4, 3, 16, 24, device=device)
    expected = model.all_features(images, "none")
    half = deepcopy(model).to(torch.bfloat16).all_features(images.to(torch.bfloat16), "none")
    for level, tokens in expected.items():
        alike = torch.cosine_similarity(tokens.flatten(1), half[level].float().flatten(1))
        assert alike.min() > 0.99, level


def test_branches_differ_once_the_online_one_has_moved(device):
    model = small_config("ema").build(device=device).eval()
    images = torch.randn(2, 3, 16, 24, device=device)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert not torch.allclose(model.features(images, branch="target"), model.features(images, branch="online"))


def test_levels_are_found_by_integers_of_other_libraries(device):
    model = small_config().build(device=device).eval()
    images = torch.randn(2, 3, 16, 24, device=device)
    for level in range(3):
        assert torch.equal(model.features(images, np.int64(level), "none"), model.features(images, level, "none"))


@pytest.mark.parametrize("level", [3, -1, True, 1.0, np.int64(3), np.float64(1.0), "globall", "global"])
def test_unknown_levels_are_refused(device, level):
    model = small_config().build(device=device)
    with pytest.raises(ValueError, match="allowed: encoder, 0, 1, 2"):
        model.features(torch.zeros(1, 3, 16, 24, device=device), level)


def test_clips_use_the_same_code(device):
    config = small_config(
        encoder={"image_size": (4, 8, 8), "patch_size": (2, 4, 4), "embed_dim": 32, "num_heads": 2},
        pyramid={"levels": 2, "fpn": "concat"},
        level_weights=LevelWeightsConfig(weights=(1.0, 0.5)),
    )
    model = config.build(device=device)
    clips = torch.randn(2, 3, 4, 8, 8, device=device)
    order = torch.arange(8, device=device).expand(2, -1)
    output = model([clips], order[:, :3], order[:, 3:].unsqueeze(1), step=0)
    output.loss.backward()
    assert model.features(clips, 1, "none").shape == (2, 1, 32)


@pytest.mark.slow
def test_a_step_is_one_graph_without_host_synchronisation(device):
    model = small_config("detached", with_global=True, pyramid={"fpn": "concat"}).build(device=device)
    traced = torch.compile(model, backend="eager", fullgraph=True)
    views, context, target = batch(device, 2)
    for step in range(3):
        whole, plain = traced(views, context, target, step), model(views, context, target, step)
        torch.testing.assert_close(whole.loss, plain.loss)


def test_a_few_steps_lower_the_loss(device):
    model = small_config("pooled", encoder={"stem": "conv"}).build(device=device)
    optimizer = torch.optim.AdamW([p for _, p in trained(model)], lr=2e-3)
    views, context, target = batch(device)
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        loss = model(views, context, target, step).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pyramid": {"levels": 5}}, "levels=5: more than the grid .4, 6. admits"),
        ({"pyramid": {"levels": 2}}, "3 entries for pyramid.levels=2"),
        ({"level_weights": LevelWeightsConfig(weights=(0.0, 0.0, 0.0))}, "nothing would be learned"),
        ({"targets": "emma"}, "did you mean 'ema'"),
        ({"predict_every": 0}, "predict_every=0"),
        ({"pyramid": {"fpn": "add", "projection": False}}, "projection=False: leaves widths .16, 16, 16. inside"),
        ({"pyramid": {"attention_heads": 3}}, "attention_heads=3: does not divide the width 32"),
        ({"target_patch_size": 4}, "target_patch_size=4: no sequence"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        small_config(**fields)


@pytest.mark.parametrize("targets", ["ema", "pooled", "detached"])
def test_centred_targets_hold_nothing_that_all_images_have_at_a_place(device, targets):
    """Copies of an image differ in nothing but their masks: a place is all that a target could tell, and does not."""
    (images,), context, target = batch(device, size=2)  # of two copies the mean has no rounding
    same = [images[:1].expand_as(images).contiguous()]
    fields = {"objective": "patch_discrimination", "pyramid": {"levels": 1, "fpn": "none"}}
    fields["level_weights"] = LevelWeightsConfig(weights=(1.0,))
    losses = {}
    for center in (False, True):
        model = small_config(targets, center_targets=center, **fields).build(device=device)
        losses[center] = float(model(same, context, target, step=0).level_losses["0"])
    assert losses[True] == pytest.approx(math.log(12), rel=1e-4)
    assert abs(losses[False] - math.log(12)) > 1e-2


def test_centred_targets_are_the_tokens_less_their_mean_over_the_batch(device):
    model = small_config("detached", center_targets=True, with_global=True).build(device=device)
    images, context, target = batch(device, views=2)
    full = [model.encoder(view) for view in images]
    step = Step(model, torch.ones(model.config.pyramid.levels, device=device), torch.tensor(0), model.plan(0))
    _, wanted = step.target_tokens(images[0], full, len(context), target.flatten(1))
    tokens = full[0].double()
    for image, places in enumerate(target.flatten(1).tolist()):
        for number, place in enumerate(places):
            token = tokens[image, place] - tokens[:, place].mean(0)
            expected = (token - token.mean()) / (token.var(unbiased=False) + 1e-5).sqrt()
            torch.testing.assert_close(wanted[image, number].double(), expected, atol=1e-4, rtol=1e-4)


def test_centred_targets_need_two_images(device):
    """The mean of one is itself: what is left would be 0 everywhere, a target that says nothing."""
    model = small_config("ema", center_targets=True).build(device=device)
    views, context, target = batch(device)
    assert model(views, context[:2], target[:2], step=0).loss.isfinite()
    with pytest.raises(ValueError, match="center_targets=True: one image less its own mean is 0"):
        model(views, context[:1], target[:1], step=0)


def test_centred_targets_need_tokens_of_whole_images():
    with pytest.raises(ValueError, match="center_targets=True"):
        small_config("projection", center_targets=True)


STEM = {"stem": "overlap", "stem_channels": (12, 24), "stem_norm": "batch", "stem_blocks": (1, 1)}


@pytest.mark.parametrize("targets", ["ema", "detached"])
@pytest.mark.parametrize("maps", [0, 1, 2])
@pytest.mark.parametrize("heads", [0, 4])
def test_the_global_level_pools_tokens_and_maps_of_the_stem(device, targets, maps, heads):
    config = small_config(targets, with_global=True, encoder=STEM)
    config.global_level.pool_heads, config.global_level.stem_maps = heads, maps
    model = config.build(seed=1, device=device)
    views, context, target = batch(device, views=2)
    names = [f"map{number}" for number in range(maps)]
    own = [*names, *(["pooled"] if maps or heads else []), *(["all"] if heads else [])]
    assert model.feature_levels == ("encoder", 0, 1, 2, *own, "global")
    output = model(views, context, target, 3)
    assert {"global", *names} <= output.level_losses.keys()
    output.loss.backward()
    levels = [model.global_level, *model.map_levels]
    assert all(p.grad is not None for level in levels for p in level.parameters())
    plain = small_config(targets, with_global=True, encoder=STEM).build(seed=1, device=device)
    masked = plain(views, context, target, 3)
    tops = [output.level_losses[name] for name in ("global", *names)]
    wanted = masked.loss - masked.level_losses["global"] + torch.stack(tops).mean()
    torch.testing.assert_close(output.loss, wanted)
    for module in model.modules():
        if isinstance(module, AttentionPool):
            torch.nn.init.normal_(module.query_token)

    model.eval()
    for branch in Branch:
        encoder, _, head, _ = model._branch(branch)
        targeted = branch is Branch.target and targets == "ema"
        heads_of = [head, *(model.target_map_levels or [] if targeted else model.map_levels)]
        found = model.all_features(views[0], branch=branch)
        assert tuple(found) == model.feature_levels
        stages = list(encoder.stem.stages)
        fine = stages[1](stages[0](views[0], False), False)  # 8x12, its residual block included
        coarse = stages[3](stages[2](fine, False), False)
        scales = [encoder(views[0]), coarse.flatten(2).mT, fine.flatten(2).mT][: maps + 1]
        assert [scale.shape[1:] for scale in scales] == [(24, 32), (24, 24), (96, 12)][: maps + 1]
        normed = [level.norm(scale) for level, scale in zip(heads_of, scales, strict=True)]
        pooled = [
            each.mean(1) if level.pool is None else level.pool(each)
            for level, each in zip(heads_of, normed, strict=True)
        ]
        torch.testing.assert_close(found["global"], head.projector(pooled[0]))
        for name, each in zip(names, pooled[1:], strict=True):
            torch.testing.assert_close(found[name], each)
        if own:
            torch.testing.assert_close(found["pooled"], torch.cat(pooled, 1))
        if heads:
            torch.testing.assert_close(found["all"], torch.cat([scales[0].mean(1), *pooled], 1))
        for level in model.feature_levels[4:]:
            torch.testing.assert_close(model.features(views[0], level, branch=branch), found[level])


def test_views_of_one_shape_are_encoded_together_and_keep_their_order(device, monkeypatch):
    config = small_config("detached", with_global=True, encoder=STEM)
    config.global_level.stem_maps = 1
    model = config.build(seed=1, device=device).eval()
    whole, (small, *_) = batch(device, views=2)[0], batch(device, views=1, seed=1)[0]
    views = [whole[0], small[..., :8, :8], whole[1], small[..., 8:, 8:16]]
    shapes, encode = [], model.encoder.scales
    monkeypatch.setattr(model.encoder, "scales", lambda x, maps: shapes.append(tuple(x.shape)) or encode(x, maps))
    found = model.encode_views(views)
    assert shapes == [(12, 3, 16, 24), (12, 3, 8, 8)]
    for view, scales in zip(views, found, strict=True):
        for scale, alone in zip(scales, encode(view, 1), strict=True):
            torch.testing.assert_close(scale, alone)


@pytest.mark.parametrize("objective", ["vicreg", "nt_xent", "sigreg"])
def test_two_small_views_need_not_agree(device, objective):
    config = small_config("detached", with_global=True)
    config.global_level.objective = objective
    model = config.build(seed=1, device=device).eval()
    views, context, target = batch(device, views=4)
    views = [*views[:2], views[2][..., :8, :8], views[3][..., 8:, 8:16]]
    z = model.global_level(torch.stack([model.encoder(view).mean(1) for view in views]))
    found = model(views, context, target, step=3).level_losses["global"]
    torch.testing.assert_close(found, model.global_level.loss(z, 3, 2))
    assert (found - model.global_level.loss(z, 3)).abs() > 1e-3


def test_heads_start_as_the_mean(device):
    losses = []
    for heads in (0, 4):
        config = small_config("detached", with_global=True)
        config.global_level.pool_heads = heads
        losses.append(config.build(seed=1, device=device)(*batch(device, views=2), 3).level_losses["global"])
    torch.testing.assert_close(*losses)


def test_the_number_of_a_level_may_be_text(device):
    model = small_config().build(device=device)
    images = batch(device)[0][0]
    assert torch.equal(model.features(images, "1"), model.features(images, 1))


def test_a_mean_has_no_level_of_its_own():
    with pytest.raises(ValueError, match="level='pooled': the model has no such level; allowed: encoder, 0, 1, 2"):
        small_config(with_global=True).build().features(torch.zeros(1, 3, 16, 24), "pooled")


@pytest.mark.parametrize(
    ("encoder", "top", "message"),
    [
        ({}, {"pool_heads": 5}, "global_level.pool_heads=5: does not divide embed_dim=32; allowed: 1, 2, 4"),
        (STEM, {"pool_heads": 8, "stem_maps": 2}, "global_level.pool_heads=8: does not divide embed_dim=12"),
        (STEM, {"stem_maps": 3}, "global_level.stem_maps=3: more than stem=overlap with 2 stem_channels has"),
        ({}, {"stem_maps": 1}, "global_level.stem_maps=1: more than stem=linear"),
    ],
)
def test_a_top_that_the_encoder_cannot_feed_is_refused(encoder, top, message):
    sizes = {"image_size": (16, 24), "patch_size": (4, 4), "embed_dim": 32, "num_heads": 2}
    with pytest.raises(ValueError, match=message):
        HJEPAConfig(encoder=EncoderConfig(**(sizes | encoder)), global_level=GlobalConfig(**top))
