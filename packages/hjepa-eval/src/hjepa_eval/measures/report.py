"""All label-free numbers of one set of features, each with its interval and its n."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hjepa_eval.extraction.features import FeatureSet
from hjepa_eval.measures.collapse import CollapseConfig, judge_collapse
from hjepa_eval.measures.spectrum import alpha_req, effective_rank, isotropy, rankme
from hjepa_eval.measures.sphere import mean_cosine, uniformity
from hjepa_eval.results.interval import ANYWHERE, jackknife
from hjepa_eval.results.measurement import Measurement, Plain

MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "rankme": rankme,
    "effective_rank": effective_rank,
    "alpha_req": alpha_req,
    "isotropy": isotropy,
    "spread": lambda z: z.double().std(dim=0).mean(),
    "mean_cosine": mean_cosine,
    "uniformity": uniformity,
}
# The least and the largest number of each.
RANGES: dict[str, tuple[float, float]] = {
    "rankme": (1.0, math.inf),
    "effective_rank": (1.0, math.inf),
    "alpha_req": ANYWHERE,
    "isotropy": (0.0, 1.0),
    "spread": (0.0, math.inf),
    "mean_cosine": (-1.0, 1.0),
    "uniformity": (-math.inf, 0.0),
}


def measure_unlabelled(
    features: FeatureSet,
    *,
    samples: int = 25_600,
    groups: int = 10,
    collapse: CollapseConfig | None = None,
    device: torch.device | str = "cpu",
) -> list[Measurement]:
    """RankMe, effective rank, α-ReQ, isotropy, spread, mean cosine and uniformity, with jackknife intervals.

    Args:
        features: Features of images; labels are not used.
        samples: How many of them are taken, at most, drawn by a fixed seed. 25,600 is what the RankMe paper takes.
        groups: Groups of the jackknife; every number is computed once more for each.
        collapse: Bounds of the verdict, which stands in the details of `effective_rank`.
        device: Where the numbers are computed.

    Returns:
        The measurements.
    """
    z = features.some(samples).values.to(device)
    report = judge_collapse(z, collapse)
    verdict: dict[str, Plain] = {"verdict": str(report.verdict), "reasons": "; ".join(report.reasons)}
    return [
        Measurement.of(
            metric,
            features.name,
            jackknife(z, function, groups=groups, within=RANGES[metric]),
            details=verdict if metric == "effective_rank" else {},
        )
        for metric, function in MEASURES.items()
    ]
