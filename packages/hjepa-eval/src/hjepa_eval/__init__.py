"""What was learned: extraction, probes, label-free measures, factors and results, for any module."""

from hjepa_eval.extraction.blocks import BlockFeatures, TokenPooling, patch_tokens, pool_tokens
from hjepa_eval.extraction.cache import CacheKey, FeatureCache, files_hash, weights_hash
from hjepa_eval.extraction.extract import extract
from hjepa_eval.extraction.features import FeatureName, FeatureSet, concatenate
from hjepa_eval.extraction.sources import level_features, open_encoder
from hjepa_eval.factors.bottleneck import BottleneckScore, bottleneck_sweep
from hjepa_eval.factors.dci import DCI, dci
from hjepa_eval.factors.probes import FactorScore, factor_probe
from hjepa_eval.measures.cka import cka_interval, cka_matrix, linear_cka
from hjepa_eval.measures.collapse import CollapseConfig, CollapseReport, Verdict, judge_collapse, judge_levels
from hjepa_eval.measures.lidar import lidar
from hjepa_eval.measures.report import measure_unlabelled
from hjepa_eval.measures.spectrum import Spread, alpha_req, effective_rank, isotropy, rankme, spread
from hjepa_eval.measures.sphere import alignment, mean_cosine, uniformity
from hjepa_eval.probes.attentive import AttentiveProbe, AttentiveProbeConfig
from hjepa_eval.probes.correspondence import correspondence_accuracy, crop_matches
from hjepa_eval.probes.few_shot import FewShotConfig, FewShotScore, few_shot
from hjepa_eval.probes.finetune import Classifier, FineTuneConfig, classify, finetune, layer_groups
from hjepa_eval.probes.heads import Candidate, HeadOptimizer, HeadTraining
from hjepa_eval.probes.knn import knn_accuracy, knn_predict, nearest
from hjepa_eval.probes.linear import LinearProbe, as_sets
from hjepa_eval.probes.logistic import LogisticProbe, LogisticProbeConfig, fit_logistic
from hjepa_eval.probes.retrieval import average_precision
from hjepa_eval.probes.segmentation import SegmentationProbe, mean_iou
from hjepa_eval.probes.whitening import Whitening, knn_by_metric
from hjepa_eval.results.interval import Interval, bootstrap, interval_of_mean, jackknife
from hjepa_eval.results.measurement import Measurement, Results, read_results, write_results
from hjepa_eval.results.table import merge, plus_minus
from hjepa_eval.scores import Scores, evaluate, format_table

__all__ = [
    "DCI",
    "AttentiveProbe",
    "AttentiveProbeConfig",
    "BlockFeatures",
    "BottleneckScore",
    "CacheKey",
    "Candidate",
    "Classifier",
    "CollapseConfig",
    "CollapseReport",
    "FactorScore",
    "FeatureCache",
    "FeatureName",
    "FeatureSet",
    "FewShotConfig",
    "FewShotScore",
    "FineTuneConfig",
    "HeadOptimizer",
    "HeadTraining",
    "Interval",
    "LinearProbe",
    "LogisticProbe",
    "LogisticProbeConfig",
    "Measurement",
    "Results",
    "Scores",
    "SegmentationProbe",
    "Spread",
    "TokenPooling",
    "Verdict",
    "Whitening",
    "alignment",
    "alpha_req",
    "as_sets",
    "average_precision",
    "bootstrap",
    "bottleneck_sweep",
    "cka_interval",
    "cka_matrix",
    "classify",
    "concatenate",
    "correspondence_accuracy",
    "crop_matches",
    "dci",
    "effective_rank",
    "evaluate",
    "extract",
    "factor_probe",
    "few_shot",
    "files_hash",
    "finetune",
    "fit_logistic",
    "format_table",
    "interval_of_mean",
    "isotropy",
    "jackknife",
    "judge_collapse",
    "judge_levels",
    "knn_accuracy",
    "knn_by_metric",
    "knn_predict",
    "layer_groups",
    "level_features",
    "lidar",
    "linear_cka",
    "mean_cosine",
    "mean_iou",
    "measure_unlabelled",
    "merge",
    "nearest",
    "open_encoder",
    "patch_tokens",
    "plus_minus",
    "pool_tokens",
    "rankme",
    "read_results",
    "spread",
    "uniformity",
    "weights_hash",
    "write_results",
]
