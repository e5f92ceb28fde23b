"""A preset fits every recipe."""

import pytest
import torch

from hjepa_benchmark.throughput.step import synthetic_batch
from hjepa_models.canvas import dense_canvas
from hjepa_models.layers.patch import StemNorm
from hjepa_pretrain import settings
from hjepa_pretrain.task import build_task
from hjepa_train import parameter_groups

WHOLE = ("hjepa_global", "simclr", "lejepa", "supervised")
HIDDEN = ("ijepa", "hjepa", "hjepa_contrast", "mae")


@pytest.mark.parametrize("preset", ["demo", "small_images"])
@pytest.mark.parametrize("recipe", [*WHOLE, *HIDDEN])
def test_a_recipe_trains_with_a_preset(preset, recipe):
    words = [f"recipe={recipe}", f"preset={preset}", "data.train=synthetic", "data.batch_size=4", "run.device=cpu"]
    words += ["baseline.num_classes=3"] if recipe == "supervised" else []
    config, _ = settings.load(words)
    # Batch norm in the stem is for recipes that measure its statistics on whole images.
    assert (config.hjepa.encoder.stem_norm is StemNorm.batch) == (recipe in WHOLE)
    task = build_task(config).train()
    loss = task(synthetic_batch(config, torch.device("cpu")), 0).loss
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in task.model.encoder.parameters())


@pytest.mark.parametrize("preset", ["none", "demo", "small_images"])
def test_targets_of_hjepa_go_through_no_top_down_path_whose_collapse_would_please_the_loss(preset):
    words = ["recipe=hjepa", f"preset={preset}", "data.train=synthetic", "hjepa.encoder.depth=1"]
    config, _ = settings.load(words)
    model = build_task(config).model.eval()
    assert len(model.pyramid.top_down) == 2
    image = torch.rand(2, 3, *config.data.image_size)
    canvas = dense_canvas(model.target_encoder(image), model.encoder.grid_of(image))

    def targets():
        return [level.values for level in model.target_levels(canvas)]

    before = targets()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not name.startswith("target_encoder."):
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    for one, other in zip(before, targets(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("steps", [500, 5_000])
@pytest.mark.parametrize("preset", ["demo", "small_images"])
@pytest.mark.parametrize("recipe", ["hjepa", "ijepa"])
def test_the_moving_average_of_a_short_run_keeps_up_with_it(recipe, preset, steps):
    words = [f"recipe={recipe}", f"preset={preset}", "data.train=synthetic", f"run.steps={steps}"]
    trainer = settings.load(words)[0].trainer
    looks_back = 1 / (1 - trainer.ema_momentum.values(0, trainer.length))
    assert 0.01 * steps < looks_back < 0.05 * steps


def test_learned_pooling_is_not_pulled_to_the_mean_by_weight_decay():
    words = ["data.train=synthetic", "recipe=hjepa", "preset=demo", "hjepa.pyramid.pooling=learned", "run.device=cpu"]
    task = build_task(settings.load(words)[0])
    decay, _ = parameter_groups(task)
    pulled = {id(parameter) for parameter in decay["params"]}
    assert len(task.model.pyramid.cell_logits) == 2
    assert not any(id(logits) in pulled for logits in task.model.pyramid.cell_logits)


@pytest.mark.parametrize(("preset", "hue"), [("none", 0.2), ("demo", 0.5), ("small_images", 0.1)])
@pytest.mark.parametrize("recipe", ["hjepa_global", "simclr"])
def test_colours_are_those_of_the_images(preset, hue, recipe):
    words = [f"recipe={recipe}", f"preset={preset}", "data.train=synthetic"]
    assert settings.load(words)[0].color.hue == hue
    assert settings.load([*words, "color.hue=0.3"])[0].color.hue == 0.3
    assert settings.load([*words, "color=null"])[0].color is None


@pytest.mark.parametrize("recipe", ["hjepa_global", "simclr"])
def test_photos_have_small_views_too_whoever_learns_from_them(recipe):
    words = ["preset=small_images", "data.train=synthetic", "data.batch_size=4", "run.device=cpu", f"recipe={recipe}"]
    config, _ = settings.load(words)
    views = [tuple(view.shape) for view in synthetic_batch(config, torch.device("cpu")).views]
    assert views == [(4, 3, 32, 32)] * 2 + [(4, 3, 16, 16)] * 2
    assert settings.load([*words, "data.local_views=0"])[0].data.local_views == 0
