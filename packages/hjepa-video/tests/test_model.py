import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from hjepa_data import Batch, ViewGroup
from hjepa_models import GlobalConfig, LevelWeightsConfig, load_pretrained, save_pretrained
from hjepa_video import (
    VideoHJEPAConfig,
    center_view,
    long_range,
    probe_clip,
    random_view,
    read_clip,
    short_range,
    video_config,
)
from hjepa_video.testing import moving_frames


def batch_of(clips, first=0):
    count = len(clips)
    return Batch(
        views=(clips,),
        labels=torch.full((count,), -1),
        sample=torch.arange(first, first + count),
        epoch=torch.zeros(count, dtype=torch.int64),
    )


def some_clips(count=4, frames=4, size=32):
    view = ViewGroup(size=(size, size))
    return torch.stack([random_view(moving_frames(frames, seed=seed), view, 0, 0, seed, 0) for seed in range(count)])


def small_config(**changes):
    return dataclasses.replace(video_config("vit_nano_patch8", frames=4, size=32), **changes)


def move_average(model, momentum):
    with torch.no_grad():
        for online, target in model.ema_pairs():
            for ours, theirs in zip(online.parameters(), target.parameters(), strict=True):
                theirs.lerp_(ours, 1 - momentum)


def test_names_describe_grids_levels_and_predictors():
    config = video_config("vit_large_patch16")
    assert config.model.encoder.grid == (8, 16, 16)
    assert (config.model.predictor.embed_dim, config.model.predictor.depth, config.model.predictor.num_heads) == (
        384,
        12,
        12,
    )
    assert config.model.level_weights.weights == (1.0, 0.7, 0.5)
    assert config.model.objective == "l1"
    assert video_config("vit_nano_patch14", frames=4, size=28, tubelet=1, levels=5).model.encoder.grid == (4, 2, 2)
    assert video_config("vit_nano_patch8", frames=2, size=16, levels=5).model.pyramid.levels == 2
    with pytest.raises(ValueError, match="divide"):
        video_config("vit_nano_patch16", frames=5)
    with pytest.raises(ValueError, match="divide"):
        video_config("vit_nano_patch16", size=100)
    with pytest.raises(ValueError, match="unknown encoder"):
        video_config("resnet50")


def test_a_step_gives_a_loss_for_each_level_and_gradients_to_everything(device):
    model = small_config().build(seed=0).to(device)
    output = model(batch_of(some_clips()).to(device), 0)
    assert set(output.metrics) == {"loss_level_0", "loss_level_1", "loss_level_2"}
    weighted = sum(w * output.level_losses[str(level)] for level, w in enumerate((1.0, 0.7, 0.5)))
    torch.testing.assert_close(output.loss.detach(), weighted)
    assert all(len(rows) == 4 for rows in output.embeddings.values())
    output.loss.backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.abs().sum() > 0)
    ]
    assert without == []
    assert all(p.grad is None for _, target in model.ema_pairs() for p in target.parameters())


def test_the_moving_average_follows_its_closed_form(device):
    model = small_config().build(seed=0).to(device)
    online, target = model.ema_pairs()[0]
    before = [p.clone() for p in target.parameters()]
    batch = batch_of(some_clips()).to(device)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(batch, 0).loss.backward()
    optimizer.step()
    move_average(model, 0.9)
    moved = 0
    for old, new, ours in zip(before, target.parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * ours)
        moved += int(not torch.equal(old, new))
    assert moved > len(before) // 2


def test_the_loss_falls_on_one_clip(device, clips):
    for path in clips[:1] + clips[3:4]:
        info = probe_clip(path)
        frames = read_clip(path, frames=4, fps=4.0, start=info.duration / 4, short_side=64)
        views = [center_view(frames, ViewGroup(size=(32, 32))), center_view(frames, ViewGroup(size=(32, 32)), 0.7)]
        batch = batch_of(torch.stack(views)).to(device)
        model = small_config().build(seed=0).to(device)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
        losses = []
        for step in range(24):
            output = model(batch, step)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            move_average(model, 0.999)
            losses.append(output.loss.item())
        assert sum(losses[-4:]) < 0.8 * sum(losses[:4]), losses


def test_every_clip_meets_every_kind_of_masks_and_shares_add_up(device):
    clips = some_clips(3)
    both = small_config().build(seed=0).to(device)
    kinds = [small_config(masks=(kind,)).build(seed=0).to(device) for kind in (short_range(), long_range())]
    kinds[1].masks[0] = both.masks[1]
    for step in (0, 1):
        found = both(batch_of(clips).to(device), step).loss
        # At step 0 clips 0 and 2 are masked by the first kind and clip 1 by the second; at step 1 the other way round.
        parts = []
        for clip in range(3):
            model = kinds[(clip + step) % 2]
            parts.append(model(batch_of(clips[clip : clip + 1], first=clip).to(device), step).loss)
        torch.testing.assert_close(found, torch.stack(parts).mean(), rtol=1e-4, atol=1e-5)


def test_kinds_of_masks_are_dealt_over_all_processes(device, monkeypatch):
    # One clip a process: all had the same kind at a step.
    clips = some_clips(2)
    model = small_config().build(seed=0).to(device)
    whole = model(batch_of(clips).to(device), 0).loss
    parts = []
    for process in (0, 1):
        monkeypatch.setattr("hjepa_video.model.rank", lambda process=process: process)
        parts.append(model(batch_of(clips[process : process + 1], first=process).to(device), 0).loss)
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-4, atol=1e-5)


def test_features_name_the_levels_of_time_and_space(device):
    model = small_config().build(seed=0).to(device).eval()
    clips = some_clips(2).to(device)
    assert model.features(clips).shape == (2, 128)
    # The grid (2, 4, 4) pools to (1, 2, 2) and (1, 1, 1).
    shapes = [model.features(clips, level, "none").shape[1] for level in ("encoder", 0, 1, 2)]
    assert shapes == [32, 32, 4, 1]
    torch.testing.assert_close(model.features(clips), model.features(clips.float() / 255), rtol=1e-4, atol=1e-4)
    still = clips[:, :, :1].expand_as(clips).clone()
    assert not torch.allclose(model.features(clips), model.features(still))


def test_one_kind_of_masks_may_have_a_global_level_over_two_views(device):
    config = small_config(masks=(short_range(),))
    config.model.global_level = GlobalConfig(hidden_dim=32, out_dim=16)
    model = VideoHJEPAConfig(model=config.model, masks=config.masks).build(seed=0).to(device)
    batch = batch_of(some_clips(4))
    batch.views = (batch.views[0], batch.views[0].flip(-1))
    output = model(batch.to(device), 0)
    assert "loss_level_global" in output.metrics
    with pytest.raises(ValueError, match="whole batches"):
        VideoHJEPAConfig(model=config.model)


@pytest.mark.parametrize(
    "change",
    [
        {"vicreg_weight": 0.1},
        {"sigreg_weight": 0.1, "targets": "online"},
        {"disentanglement_weight": 0.1},
        {"instance_weight": 0.1},
        {"center_targets": True},
        {"objective": "patch_discrimination", "contrast": "batch"},
    ],
)
def test_terms_that_compare_the_clips_of_a_batch_take_one_kind_of_masks(change):
    model = dataclasses.replace(small_config().model, **change)
    with pytest.raises(ValueError, match=f"model.{list(change)[-1 if 'contrast' in change else 0]}.*whole batches"):
        VideoHJEPAConfig(model=model)
    assert VideoHJEPAConfig(model=model, masks=(short_range(),)).masks


def test_clips_of_another_size_than_the_masks_are_refused(device):
    model = small_config().build(seed=0).to(device)
    for clips in (some_clips(2, frames=8), some_clips(2, size=40)):
        with pytest.raises(ValueError, match=r"clips of \(4, 32, 32\)") as raised:
            model(batch_of(clips).to(device), 0)
        assert "\n" not in str(raised.value)
        assert model.features(clips.to(device)).shape == (2, 128)


def test_the_step_is_compiled_where_the_model_says_and_skips_what_the_model_skips(device):
    config = small_config()
    assert not config.build(seed=0).may_skip_parameters
    config.model.level_weights = LevelWeightsConfig(weights=(1.0, 0.0, 0.5))
    assert config.build(seed=0).may_skip_parameters
    tiny = video_config("vit_nano_patch8", frames=4, size=32, levels=1)
    tiny.model.encoder.depth = tiny.model.predictor.depth = 1
    tiny.masks = (short_range(),)
    model, plain = tiny.build(seed=0).to(device), tiny.build(seed=0).to(device)
    backend = CompileCounter()
    model.compile_step(backend=backend)
    batch = batch_of(some_clips(2)).to(device)
    torch.testing.assert_close(model(batch, 0).loss, plain(batch, 0).loss)
    assert backend.frame_count == 1


def test_weights_go_out_and_in_by_the_shared_code(device, tmp_path):
    model = small_config().build(seed=0).to(device).eval()
    save_pretrained(model.model, tmp_path)
    loaded = load_pretrained(tmp_path, device)
    clips = some_clips(2).to(device)
    torch.testing.assert_close(loaded.features(model.normalize(clips)), model.features(clips))


def test_configs_that_do_not_fit_clips_are_refused():
    config = small_config()
    with pytest.raises(ValueError, match="nothing would be hidden"):
        VideoHJEPAConfig(model=config.model, masks=())
    with pytest.raises(ValueError, match="channels"):
        VideoHJEPAConfig(model=config.model, mean=(0.5,))
    with pytest.raises(ValueError, match=r"std=\(0\.5,\)"):
        VideoHJEPAConfig(model=config.model, std=(0.5,))
    config.model.encoder.image_size, config.model.encoder.patch_size = (32, 32), (8, 8)
    with pytest.raises(ValueError, match="time, height and width"):
        VideoHJEPAConfig(model=config.model)
