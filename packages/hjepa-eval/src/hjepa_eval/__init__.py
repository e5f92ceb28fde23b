"""What was learned: feature extraction, kNN, linear probe, RankMe and effective rank on any module."""

from hjepa_eval.extract import FeatureName, FeatureSet, extract
from hjepa_eval.knn import knn_accuracy, knn_predict
from hjepa_eval.linear import LinearProbe, LinearProbeConfig, fit_logistic
from hjepa_eval.scores import Scores, evaluate, format_table
from hjepa_eval.spectrum import Spread, effective_rank, rankme, spread

__all__ = [
    "FeatureName",
    "FeatureSet",
    "LinearProbe",
    "LinearProbeConfig",
    "Scores",
    "Spread",
    "effective_rank",
    "evaluate",
    "extract",
    "fit_logistic",
    "format_table",
    "knn_accuracy",
    "knn_predict",
    "rankme",
    "spread",
]
