"""What the quick suite measures, and what the full one does."""

from dataclasses import dataclass

from hjepa_eval import AttentiveProbeConfig, FewShotConfig
from hjepa_eval.robustness.severity import SEVERITIES, Corruption


@dataclass(kw_only=True, slots=True, frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        ks: numbers of neighbours beside the run's own.
        few_shot: numbers of labels and draws.
        corruptions: which of the 15.
        severities: how strong.
        corruption_images: held-out images that are changed.
        shifts: rotations, occlusion and lower resolution.
        attentive: attentive probes, on the tokens of the encoder.
        retrieval: mean average precision.
        composites: pictures that are learned from and tested, of which all is known: factors, segmentation,
            disentanglement and bottlenecks; None leaves them out.
        views: LiDAR, alignment and corresponding patches, on crops of the same images.
    """

    ks: tuple[int, ...]
    few_shot: FewShotConfig
    corruptions: tuple[Corruption, ...]
    severities: tuple[int, ...]
    corruption_images: int
    shifts: bool
    attentive: tuple[AttentiveProbeConfig, ...]
    retrieval: bool
    composites: tuple[int, int] | None
    views: bool


QUICK = Plan(
    ks=(),
    few_shot=FewShotConfig(shots=(1, 5, 10), shares=()),
    corruptions=(
        Corruption.gaussian_noise, Corruption.defocus_blur, Corruption.fog, Corruption.contrast,
        Corruption.jpeg_compression,
    ),
    severities=(1, 3, 5),
    corruption_images=1_000,
    shifts=False,
    attentive=(),
    retrieval=False,
    composites=None,
    views=False,
)  # fmt: skip
FULL = Plan(
    ks=(10, 20, 100, 200),
    few_shot=FewShotConfig(),
    corruptions=tuple(Corruption),
    severities=SEVERITIES,
    corruption_images=2_000,
    shifts=True,
    attentive=(AttentiveProbeConfig(blocks=1), AttentiveProbeConfig(blocks=4)),
    retrieval=True,
    composites=(4_000, 2_000),
    views=True,
)
PLANS = {"quick": QUICK, "full": FULL}
