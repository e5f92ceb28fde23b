"""Objectives: pure functions of predictions, targets and weights."""

from hjepa_models.objectives.cjepa import cjepa_loss
from hjepa_models.objectives.contrastive import ContrastScope, info_nce, nt_xent, patch_discrimination
from hjepa_models.objectives.disentanglement import disentanglement
from hjepa_models.objectives.kl import KLBalance, categorical_kl, dynamics_kl, kl_balance
from hjepa_models.objectives.level_weights import (
    LevelAverages,
    LevelWeighting,
    LevelWeightsConfig,
    adaptive_weights,
    update_average,
)
from hjepa_models.objectives.overshooting import overshooting_loss
from hjepa_models.objectives.prediction import (
    DISTANCES,
    Objective,
    cosine,
    l1,
    l2,
    mean_token,
    prediction_loss,
    smooth_l1,
    weighted_mean,
)
from hjepa_models.objectives.sigreg import random_directions, sigreg
from hjepa_models.objectives.symlog import symexp, symlog
from hjepa_models.objectives.two_hot import (
    TwoHotConfig,
    TwoHotHead,
    symlog_bins,
    two_hot,
    two_hot_loss,
    two_hot_mean,
)
from hjepa_models.objectives.vicreg import VICRegForm, VICRegTerms, vicreg_loss, vicreg_terms

__all__ = [
    "DISTANCES",
    "ContrastScope",
    "KLBalance",
    "LevelAverages",
    "LevelWeighting",
    "LevelWeightsConfig",
    "Objective",
    "TwoHotConfig",
    "TwoHotHead",
    "VICRegForm",
    "VICRegTerms",
    "adaptive_weights",
    "categorical_kl",
    "cjepa_loss",
    "cosine",
    "disentanglement",
    "dynamics_kl",
    "info_nce",
    "kl_balance",
    "l1",
    "l2",
    "mean_token",
    "nt_xent",
    "overshooting_loss",
    "patch_discrimination",
    "prediction_loss",
    "random_directions",
    "sigreg",
    "smooth_l1",
    "symexp",
    "symlog",
    "symlog_bins",
    "two_hot",
    "two_hot_loss",
    "two_hot_mean",
    "update_average",
    "vicreg_loss",
    "vicreg_terms",
    "weighted_mean",
]
