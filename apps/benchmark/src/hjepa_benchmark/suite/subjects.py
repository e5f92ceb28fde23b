"""What is measured beside one another: the trained model, the same model untrained, raw pixels."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hjepa_benchmark.runs import Run
from hjepa_data import normalize
from hjepa_eval import FeatureName, FeatureSet, extract
from hjepa_models import Pooling, coarsen
from hjepa_pretrain.evaluation import Images, feature_function
from hjepa_pretrain.model import Model, build_model, feature_branch, load_run
from hjepa_pretrain.results import PIXELS, TRAINED, UNTRAINED, branch_of
from hjepa_train.precision import autocast

_BATCH = 256
_SIDE = 32
SUBJECTS = (TRAINED, UNTRAINED, PIXELS)


@dataclass(kw_only=True, slots=True)
class Subject:
    """Something that turns images into features.

    Attributes:
        name: trained, untrained or pixels.
        branch: of the encoder, as results call it.
        model: the model; None for pixels.
        features: maps uint8 images to features by name, on the device of the images.
    """

    name: str
    branch: str
    model: Model | None
    features: Callable[[Tensor], dict[FeatureName, Tensor]]

    def names(self, images: Images, device: torch.device) -> dict[str, FeatureName]:
        """Names of the features of such images by level."""
        return {name.level: name for name in self.features(images.pixels[:1].to(device))}

    def extract(self, images: Images, device: torch.device) -> dict[str, FeatureSet]:
        """Features of all images by level, in one pass."""
        if self.model is not None:
            self.model.eval()
        found = extract(self.features, _batches(images), device=device)
        return {one.name.level: one for one in found.values()}


def subjects(run: Run) -> list[Subject]:
    """The three subjects of a run; models are on its device, ready for evaluation."""
    models = {TRAINED: load_run(run.folder, run.config), UNTRAINED: build_model(run.config)}
    found = []
    for name, model in models.items():
        branch = branch_of(name, feature_branch(model))
        features = _features_of(model, run, name)
        found.append(Subject(name=name, branch=branch, model=model.to(run.device).eval(), features=features))
    return [*found, Subject(name=PIXELS, branch="-", model=None, features=_pixels_of(run))]


def level_grids(run: Run, model: Model) -> dict[str, tuple[int, int]]:
    """Rows and columns of the tokens of each level that lies on a grid."""
    config, found = run.config.hjepa, {"encoder": run.config.hjepa.encoder.grid}
    on_grid = config.pyramid.pooling is not Pooling.sequence
    for level in range(config.pyramid.levels if on_grid else 0):
        if level in model.feature_levels:
            found[str(level)] = coarsen(config.encoder.output_grid, level)
    return {name: (grid[-2], grid[-1]) for name, grid in found.items()}


@torch.no_grad()
def tokens_of(run: Run, model: Model, images: Images, levels: list[str]) -> dict[str, Tensor]:
    """Tokens [n, N, D] of all images at some levels, on the CPU."""
    model.eval()
    parts: dict[str, list[Tensor]] = {level: [] for level in levels}
    for pixels, _ in _batches(images):
        with autocast(run.config.eval.precision, run.device):
            every = model.all_features(normalized(run, pixels.to(run.device)), pool="none")
        for level, tokens in every.items():
            if str(level) in parts:
                parts[str(level)].append(tokens.float().cpu())
    return {level: torch.cat(found) for level, found in parts.items()}


def normalized(run: Run, pixels: Tensor) -> Tensor:
    """Pixels as the run's model takes them."""
    return normalize(pixels, run.config.data.mean, run.config.data.std)


def _features_of(model: Model, run: Run, name: str) -> Callable[[Tensor], dict[FeatureName, Tensor]]:
    features = feature_function(model, subject=name, precision=run.config.eval.precision)
    return lambda pixels: features(normalized(run, pixels))


def _pixels_of(run: Run) -> Callable[[Tensor], dict[FeatureName, Tensor]]:
    def features(pixels: Tensor) -> dict[FeatureName, Tensor]:
        small = F.interpolate(normalized(run, pixels), size=(_SIDE, _SIDE), mode="area")
        return {FeatureName(branch="-", level="pixels", pooling="flatten"): small.flatten(1)}

    return features


def _batches(images: Images) -> Iterator[tuple[Tensor, Tensor]]:
    for part in torch.split(torch.arange(len(images.labels)), _BATCH):
        yield images.pixels[part], images.labels[part]
