"""Hierarchical JEPA architectures and objectives: encoder, predictor, pyramid, heads."""

from hjepa_models.canvas import Canvas, dense_canvas, scatter_to_canvas
from hjepa_models.encoder import Encoder, EncoderConfig
from hjepa_models.global_level import GlobalConfig, GlobalLevel, GlobalObjective, ProjectorNorm
from hjepa_models.grid import Grid, coarsen, gather_tokens, grid_coordinates, num_tokens, sincos_positions
from hjepa_models.hjepa import HJEPA, Branch, FeaturePool, HJEPAConfig, HJEPAOutput, Targets
from hjepa_models.layers.attention import AttentionBackend
from hjepa_models.layers.block import Block, MlpKind
from hjepa_models.layers.patch import Stem, StemNorm, patchify
from hjepa_models.layers.positions import Position
from hjepa_models.objectives import (
    LevelWeighting,
    LevelWeightsConfig,
    Objective,
    cosine,
    l1,
    l2,
    sigreg,
    smooth_l1,
    vicreg_loss,
    vicreg_terms,
)
from hjepa_models.pooling import Pooling, max_levels, pool_canvas, upsample_canvas
from hjepa_models.predictor import Predictor, PredictorConfig, PredictorMode
from hjepa_models.pretrained import load_pretrained, save_pretrained
from hjepa_models.pyramid import Fpn, Pyramid, PyramidConfig
from hjepa_models.registry import encoder_config, list_models

__version__ = "0.1.0"

__all__ = [
    "HJEPA",
    "AttentionBackend",
    "Block",
    "Branch",
    "Canvas",
    "Encoder",
    "EncoderConfig",
    "FeaturePool",
    "Fpn",
    "GlobalConfig",
    "GlobalLevel",
    "GlobalObjective",
    "Grid",
    "HJEPAConfig",
    "HJEPAOutput",
    "LevelWeighting",
    "LevelWeightsConfig",
    "MlpKind",
    "Objective",
    "Pooling",
    "Position",
    "Predictor",
    "PredictorConfig",
    "PredictorMode",
    "ProjectorNorm",
    "Pyramid",
    "PyramidConfig",
    "Stem",
    "StemNorm",
    "Targets",
    "coarsen",
    "cosine",
    "dense_canvas",
    "encoder_config",
    "gather_tokens",
    "grid_coordinates",
    "l1",
    "l2",
    "list_models",
    "load_pretrained",
    "max_levels",
    "num_tokens",
    "patchify",
    "pool_canvas",
    "save_pretrained",
    "scatter_to_canvas",
    "sigreg",
    "sincos_positions",
    "smooth_l1",
    "upsample_canvas",
    "vicreg_loss",
    "vicreg_terms",
]
