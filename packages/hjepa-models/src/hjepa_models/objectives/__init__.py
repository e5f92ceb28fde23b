"""Objectives: pure functions of predictions, targets and weights."""

from hjepa_models.objectives.level_weights import LevelWeighting, LevelWeightsConfig
from hjepa_models.objectives.prediction import Objective, cosine, l1, l2, prediction_loss, smooth_l1, weighted_mean
from hjepa_models.objectives.sigreg import random_directions, sigreg
from hjepa_models.objectives.vicreg import VICRegTerms, vicreg_loss, vicreg_terms

__all__ = [
    "LevelWeighting",
    "LevelWeightsConfig",
    "Objective",
    "VICRegTerms",
    "cosine",
    "l1",
    "l2",
    "prediction_loss",
    "random_directions",
    "sigreg",
    "smooth_l1",
    "vicreg_loss",
    "vicreg_terms",
    "weighted_mean",
]
