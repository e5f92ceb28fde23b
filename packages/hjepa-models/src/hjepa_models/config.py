"""What a hierarchical JEPA is made of, checked part against part."""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import torch

from hjepa_models._validation import as_tuple, check_heads, check_not_negative, check_positive, coerce_choice
from hjepa_models.aggregate import AggregateConfig
from hjepa_models.encoder import EncoderConfig, check_image_size, check_position, tokens_per_axis
from hjepa_models.global_level import GlobalConfig
from hjepa_models.grid import Grid
from hjepa_models.initialization import construct
from hjepa_models.layers.block import check_mlp
from hjepa_models.layers.patch import Stem, StemNorm
from hjepa_models.layers.positions import check_continuous
from hjepa_models.objectives import DISTANCES, ContrastScope, LevelWeightsConfig, Objective, TwoHotConfig
from hjepa_models.patch_schedule import PatchScheduleConfig
from hjepa_models.predictor import PredictorConfig
from hjepa_models.pyramid import PyramidConfig

if TYPE_CHECKING:
    from hjepa_models.hjepa import HJEPA


class Targets(StrEnum):
    """Where the targets of the predicted levels come from.

    `ema`: moving averages of encoder and pyramid. `pooled`: moving average of the encoder, plain pooling. `detached`:
    the online encoder's own features without gradient, plain pooling. `online`: the same with gradient, so that
    something has to keep them from collapsing. `projection`: a frozen random linear map of the pixels, plain pooling;
    no second encoder.
    """

    ema = "ema"
    pooled = "pooled"
    detached = "detached"
    online = "online"
    projection = "projection"


ONLINE_TARGETS = (Targets.detached, Targets.online)
"""The kinds that take the online encoder's own features."""

WITHOUT_EMA = (*ONLINE_TARGETS, Targets.projection)
"""The kinds that keep no moving average of the encoder."""


class Prediction(StrEnum):
    """What is predicted from what.

    `hidden`: the tokens of hidden patches from those of the visible patches of the same view, which alone are encoded.
    `view`: all tokens of one view from all tokens of another, both ways between the first two views, knowing where both
    were cut; patches outside of the other view do not count. Beside a global level, which encodes every view whole, and
    with `detached` or `online` targets it costs a pass of the predictor and none of the encoder. After Siamese Image
    Modeling (arXiv 2206.01204), where the view that is seen is masked.
    """

    hidden = "hidden"
    view = "view"


class Branch(StrEnum):
    """Which branch features are taken from."""

    target = "target"
    online = "online"


class FeaturePool(StrEnum):
    """How the tokens of a level become a feature."""

    mean = "mean"
    none = "none"
    flatten = "flatten"


@dataclass(kw_only=True, slots=True)
class HJEPAConfig:
    """Describes a hierarchical JEPA.

    Attributes:
        encoder: the encoder.
        predictor: the predictor.
        pyramid: the levels.
        prediction: `hidden` (hidden patches from visible ones) or `view` (one view from another), see `Prediction`.
        targets: `ema`, `pooled`, `detached`, `online` or `projection`, see `Targets`.
        target_patch_size: pixels of a patch for which the moving average of the encoder sees one token; empty means the
            output patch, so that targets are exact at its resolution, for as many tokens. Needs an encoder with
            `output_patch_size`; another size than `patch_size` needs `stem=flexi`.
        output_tokens: how many output tokens of each hidden patch the loss scores, drawn anew each step; 0 means all.
        patch_schedule: output patch size by the step; None means `encoder.output_patch_size` throughout.
        center_targets: take away from target tokens what those of a place have in common over the batch, of all
            processes: it says where they are in their view, not what is there. Without it features that
            say their place and nothing else solve `patch_discrimination`. Not with `projection` or an output patch.
        objective: what a level's loss is: a distance of predicted and target tokens (`smooth_l1`, `l1`, `l2`,
            `cosine`), the cross entropy of bins (`two_hot`), or telling a token's target from other targets
            (`patch_discrimination`).
        beta: where the quadratic part of `smooth_l1` ends.
        symlog: compare symlog of predictions and targets, where the objective is a distance.
        two_hot: the bins of `objective=two_hot`.
        temperature: of `objective=patch_discrimination` and of the instance term.
        contrast: which other targets `patch_discrimination` tells apart: those of the `image` or of the `batch`, which
            spans all processes. A level of one token has no other in its image: its loss is 0 then.
        level_weights: weight of each level over the steps; one weight per level.
        global_level: the level above all grids, over several views; None leaves it out.
        masked_views: how many of the views carry masked prediction, the first ones.
        predict_every: prediction is part of every k-th step only: of step k - 1 (counted from 0), 2k - 1, ...
        instance_weight: weight of the instance contrast: projected and pooled context tokens of the first masked view
            against those of the second, or against the target tokens of the whole image where one view is masked; 0 is
            off.
        aggregate: how tokens become the instance embeddings of that term.
        vicreg_weight: weight of VICReg on the mean predicted token of each image (C-JEPA); 0 is off.
        vicreg_levels: put variance and covariance on the mean prediction of every level, weighted as the levels are.
        vicreg_invariance: weight of the invariance inside that term: the squared difference of the mean predicted and
            the mean target token. `cjepa_loss` has the weights of the paper: 0.001 (25, 25, 1).
        vicreg_variance: weight of the variance inside that term.
        vicreg_covariance: weight of the covariance inside that term.
        sigreg_weight: weight of SIGReg on the mean token of whole images, which keeps `targets=online` from collapsing;
            0 is off.
        disentanglement_weight: weight of the squared correlation between the predictions of different levels; 0 is off.
    """

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    pyramid: PyramidConfig = field(default_factory=PyramidConfig)
    prediction: Prediction = Prediction.hidden
    targets: Targets = Targets.ema
    target_patch_size: tuple[int, ...] = ()
    output_tokens: int = 0
    patch_schedule: PatchScheduleConfig | None = None
    center_targets: bool = False
    objective: Objective = Objective.smooth_l1
    beta: float = 1.0
    symlog: bool = False
    two_hot: TwoHotConfig = field(default_factory=TwoHotConfig)
    temperature: float = 0.1
    contrast: ContrastScope = ContrastScope.image
    level_weights: LevelWeightsConfig = field(default_factory=LevelWeightsConfig)
    global_level: GlobalConfig | None = None
    masked_views: int = 1
    predict_every: int = 1
    instance_weight: float = 0.0
    aggregate: AggregateConfig = field(default_factory=AggregateConfig)
    vicreg_weight: float = 0.0
    vicreg_levels: bool = False
    vicreg_invariance: float = 0.0
    vicreg_variance: float = 25.0
    vicreg_covariance: float = 1.0
    sigreg_weight: float = 0.0
    disentanglement_weight: float = 0.0

    def __post_init__(self) -> None:
        """Coerce names and refuse parts that do not fit one another."""
        self.prediction = coerce_choice(Prediction, "prediction", self.prediction)
        self.targets = coerce_choice(Targets, "targets", self.targets)
        self.objective = coerce_choice(Objective, "objective", self.objective)
        self.contrast = coerce_choice(ContrastScope, "contrast", self.contrast)
        check_positive(
            beta=self.beta,
            masked_views=self.masked_views,
            predict_every=self.predict_every,
            temperature=self.temperature,
        )
        check_not_negative(
            output_tokens=self.output_tokens,
            instance_weight=self.instance_weight,
            sigreg_weight=self.sigreg_weight,
            disentanglement_weight=self.disentanglement_weight,
            vicreg_weight=self.vicreg_weight,
            vicreg_invariance=self.vicreg_invariance,
            vicreg_variance=self.vicreg_variance,
            vicreg_covariance=self.vicreg_covariance,
        )
        check_position(
            "predictor",
            self.encoder.position,
            self.predictor.embed_dim,
            self.predictor.num_heads,
            len(self.encoder.patch_size),
        )
        check_mlp("predictor", self.encoder.mlp, self.predictor.embed_dim, self.predictor.mlp_ratio)
        self._check_global_level()
        self._check_levels()
        self._check_patch_sizes()
        self._check_collapse()
        self._check_instance()
        self._check_effect()
        self._check_views()
        whole = self.targets in ONLINE_TARGETS or self.encodes_views
        if self.encoder.stem is Stem.overlap and self.encoder.stem_norm is StemNorm.batch and not whole:
            raise ValueError(
                f"encoder.stem_norm=batch: with targets={self.targets} and no global level the encoder sees no whole "
                "image in training, so the statistics for evaluation would never be measured; allowed: "
                "stem_norm=none, targets=detached, prediction=view or a global level; change one of them"
            )

    @property
    def encodes_views(self) -> bool:
        """Whether all views are encoded whole, with gradient."""
        return self.global_level is not None or self.prediction is Prediction.view

    @property
    def predicts(self) -> Prediction | None:
        """What is predicted from what; None where no level has weight."""
        return self.prediction if any(self.level_weights.weights) else None

    @property
    def map_widths(self) -> tuple[int, ...]:
        """Channels of the maps of the stem that are levels of the global kind, from coarse to fine."""
        count = 0 if self.global_level is None else self.global_level.stem_maps
        return self.encoder.stem_channels[::-1][:count]

    def _check_global_level(self) -> None:
        if self.global_level is None:
            return
        count, stages = self.global_level.stem_maps, len(self.encoder.stem_channels)
        if count and (self.encoder.stem is not Stem.overlap or count > stages):
            raise ValueError(
                f"global_level.stem_maps={count}: more than stem={self.encoder.stem} with {stages} stem_channels "
                f"has; allowed: 0, or up to their number with stem=overlap; change one of them"
            )
        if self.global_level.pool_heads:
            for width in (self.encoder.embed_dim, *self.map_widths):
                check_heads("global_level", width, self.global_level.pool_heads, "pool_heads")

    def _check_levels(self) -> None:
        levels, weights = self.pyramid.levels, self.level_weights.weights
        for patch in self.output_patches:
            self.pyramid.check(tokens_per_axis(self.encoder.image_size, patch), self.encoder.embed_dim)
        if len(weights) != levels:
            raise ValueError(
                f"level_weights.weights={weights}: has {len(weights)} entries for pyramid.levels={levels}; "
                f"allowed: one per level; change one of them"
            )
        if not any(weights) and (self.global_level is None or self.global_level.weight == 0):
            raise ValueError(
                f"level_weights.weights={weights}: nothing would be learned without a global level; "
                f"allowed: a weight above 0; raise one or add global_level"
            )
        if self.disentanglement_weight and levels == 1:
            raise ValueError(
                f"disentanglement_weight={self.disentanglement_weight}: one level has nothing to differ from; "
                "allowed: 0 with pyramid.levels=1; change one of them"
            )

    def _check_patch_sizes(self) -> None:
        encoder = self.encoder
        self.target_patch_size = as_tuple("target_patch_size", self.target_patch_size)
        if not encoder.output_patch_size:
            sizes = None if self.patch_schedule is None else self.patch_schedule.sizes
            given = {
                "target_patch_size": self.target_patch_size,
                "output_tokens": self.output_tokens,
                "patch_schedule.sizes": sizes,
            }
            for name, value in given.items():
                if value:
                    raise ValueError(
                        f"{name}={value}: the encoder upsamples nothing; allowed: with "
                        "encoder.output_patch_size only; set that, or leave this out"
                    )
            return
        if self.targets in ONLINE_TARGETS:
            raise ValueError(
                f"targets={self.targets}: the online encoder sees patches of {encoder.processing_patch}, not of "
                f"output_patch_size={encoder.output_patch}; allowed: projection, ema, pooled; change one of them"
            )
        self._check_schedule()
        self._check_target_patches()

    def _check_schedule(self) -> None:
        encoder, schedule = self.encoder, self.patch_schedule
        cells = math.prod(p // o for p, o in zip(encoder.processing_patch, encoder.output_patch, strict=True))
        if self.output_tokens > cells:
            raise ValueError(
                f"output_tokens={self.output_tokens}: a patch of {encoder.processing_patch} holds {cells} output "
                f"tokens of {encoder.output_patch}; allowed: 0 (all) to {cells}; change one of them"
            )
        if schedule is not None:
            scheduled = [(size,) * len(encoder.patch_size) for size in schedule.sizes]
            fits = all(p % o == 0 for size in scheduled for p, o in zip(encoder.processing_patch, size, strict=True))
            if not fits or scheduled[-1] != encoder.output_patch:
                raise ValueError(
                    f"patch_schedule.sizes={schedule.sizes}: must divide the processing patch "
                    f"{encoder.processing_patch} and end at output_patch_size={encoder.output_patch}; "
                    "allowed: e.g. 8, 4, 2, 1; change one of them"
                )

    def _check_target_patches(self) -> None:
        encoder = self.encoder
        if self.target_patch_size and self.targets is Targets.projection:
            raise ValueError(
                f"target_patch_size={self.target_patch_size}: targets=projection has no encoder to apply it to; "
                "allowed: with ema or pooled; change one of them"
            )
        if self.target_patch_size:
            check_image_size("encoder.image_size", encoder.image_size, self.target_patch_size)
        if self.targets is not Targets.projection and encoder.stem is not Stem.flexi:
            wanted = {self.target_patch_size or patch for patch in self.output_patches}
            if wanted != {encoder.patch_size}:
                raise ValueError(
                    f"target_patch_size={self.target_patch_size}: the target encoder would see patches of "
                    f"{sorted(wanted)[0]}, and stem={encoder.stem} has weights for {encoder.patch_size} only; allowed: "
                    f"stem=flexi, targets=projection or target_patch_size={encoder.patch_size}; change one of them"
                )
        for patch in self.output_patches:
            if any(t % o for t, o in zip(self.target_patch_size or patch, patch, strict=False)):
                raise ValueError(
                    f"target_patch_size={self.target_patch_size}: the output patch {patch} does not divide it; "
                    "allowed: multiples of every output patch, or empty; change one of them"
                )

    def _check_collapse(self) -> None:
        whole = self.targets is Targets.online or self.encodes_views
        if self.sigreg_weight and not whole:
            raise ValueError(
                f"sigreg_weight={self.sigreg_weight}: with targets={self.targets} and no global level no whole image "
                "is encoded with gradient; allowed: 0, targets=online or a global level; change one of them"
            )
        kept = (
            self.sigreg_weight
            or self.vicreg_weight
            or self.instance_weight
            or self.objective is Objective.patch_discrimination
            or (self.global_level is not None and self.global_level.weight)
        )
        if self.targets is Targets.online and not kept:
            raise ValueError(
                "targets=online: with gradients through both branches everything would collapse to one point; allowed: "
                "with sigreg_weight, vicreg_weight, instance_weight, a global level or objective=patch_discrimination; "
                "set e.g. sigreg_weight=0.05"
            )

    def _check_effect(self) -> None:
        """Refuse settings that would do nothing."""
        masked = any(self.level_weights.weights)
        needs_masks = {
            name: value
            for name in ("vicreg_weight", "sigreg_weight", "instance_weight", "disentanglement_weight")
            if (value := getattr(self, name))
        }
        if needs_masks and not masked:
            name, value = next(iter(needs_masks.items()))
            raise ValueError(
                f"{name}={value}: prediction, to which it belongs, is off with level_weights.weights="
                f"{self.level_weights.weights}; allowed: with a level weight above 0; raise one or leave it out"
            )
        if self.center_targets and (self.targets is Targets.projection or self.encoder.output_patch_size):
            raise ValueError(
                f"center_targets=True: with targets={self.targets} and encoder.output_patch_size="
                f"{self.encoder.output_patch_size} there are no target tokens of whole images to average; allowed: "
                "with ema, pooled, detached, online and no output patch; leave it out"
            )
        if self.predict_every > 1 and not (self.global_level is not None and self.global_level.weight):
            raise ValueError(
                f"predict_every={self.predict_every}: without a global level nothing is learned at the steps between; "
                "allowed: 1, or with a global level of weight above 0; change one of them"
            )
        if self.vicreg_weight and not (self.vicreg_invariance or self.vicreg_variance or self.vicreg_covariance):
            raise ValueError(
                f"vicreg_weight={self.vicreg_weight}: the weights inside the term are all 0; "
                "allowed: with vicreg_invariance, vicreg_variance or vicreg_covariance above 0; raise one"
            )
        if self.symlog and self.objective not in DISTANCES:
            raise ValueError(
                f"symlog=True: objective={self.objective} is no distance that it could apply to; "
                f"allowed: with {', '.join(DISTANCES)}; change one of them"
            )
        if (self.vicreg_levels or self.vicreg_invariance) and not self.vicreg_weight:
            name = "vicreg_levels" if self.vicreg_levels else "vicreg_invariance"
            raise ValueError(
                f"{name}={getattr(self, name)}: vicreg_weight=0 switches the term off; allowed: with vicreg_weight "
                "above 0; set it"
            )
        if self.vicreg_levels and self.vicreg_invariance:
            raise ValueError(
                f"vicreg_invariance={self.vicreg_invariance}: the levels have their own losses for that; "
                "allowed: 0 with vicreg_levels; change one of them"
            )

    def _check_views(self) -> None:
        """Refuse what goes with hidden patches alone."""
        if self.prediction is Prediction.hidden:
            return
        check_continuous(self.encoder.position)
        others = {
            "masked_views": (self.masked_views, 1),
            "encoder.output_patch_size": (self.encoder.output_patch_size, ()),
            "encoder.rope_legacy": (self.encoder.rope_legacy, False),
            "predictor.state": (self.predictor.state, None),
            "instance_weight": (self.instance_weight, 0.0),
            # In a batch a place has its own other view among the others.
            "contrast": (self.contrast, ContrastScope.image),
        }
        for name, (value, only) in others.items():
            if value != only:
                raise ValueError(
                    f"{name}={value}: has no meaning with prediction=view; allowed: {only}; change one of them"
                )
        if self.targets is Targets.projection or len(self.encoder.patch_size) != 2:
            raise ValueError(
                f"prediction=view: with targets={self.targets} and patches of {len(self.encoder.patch_size)} axes; "
                "allowed: targets other than projection, on images; change one of them"
            )

    def _check_instance(self) -> None:
        if self.instance_weight and self.masked_views == 1 and self.targets is Targets.projection:
            raise ValueError(
                f"instance_weight={self.instance_weight}: with one masked view it needs target tokens of whole images, "
                "which targets=projection has not; allowed: masked_views=2 or other targets; change one of them"
            )

    @property
    def output_patches(self) -> tuple[Grid, ...]:
        """Every output patch size that a run uses, in its order."""
        if self.patch_schedule is None:
            return (self.encoder.output_patch,)
        return tuple((size,) * len(self.encoder.patch_size) for size in self.patch_schedule.sizes)

    def output_patch(self, step: int) -> Grid:
        """Return the output patch size at a step."""
        if self.patch_schedule is None:
            return self.encoder.output_patch
        return (self.patch_schedule.patch_size(step),) * len(self.encoder.patch_size)

    def build(self, *, seed: int = 0, device: torch.device | str | None = None) -> "HJEPA":
        """Return the model, its weights drawn from `seed`; on the device "meta" it has no storage yet."""
        from hjepa_models.hjepa import HJEPA

        return construct(lambda: HJEPA(self), seed, device)
