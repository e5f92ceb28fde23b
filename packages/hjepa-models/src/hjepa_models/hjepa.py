"""The composed model: two branches, one path, a loss per level."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hjepa_models._validation import coerce_choice
from hjepa_models.canvas import Canvas
from hjepa_models.config import WITHOUT_EMA, Branch, FeaturePool, HJEPAConfig, Prediction, Targets
from hjepa_models.encoder import Encoder
from hjepa_models.features import FeatureBranch
from hjepa_models.global_level import GlobalLevel
from hjepa_models.inputs import check_masks, check_views, pair_of_crops
from hjepa_models.layers.patch import PixelProjection
from hjepa_models.losses import PredictionLosses
from hjepa_models.objectives import LevelAverages, LevelWeighting
from hjepa_models.predictor import Predictor
from hjepa_models.pretrained import PretrainedMixin
from hjepa_models.pyramid import Pyramid
from hjepa_models.step import HJEPAOutput, StepInputs, StepPlan, run_step


class HJEPA(nn.Module, PretrainedMixin):
    """Predicts features of hidden patches or of another view at every level, and of whole views at the top."""

    def __init__(self, config: HJEPAConfig) -> None:
        super().__init__()
        self.config = config
        width = config.encoder.embed_dim
        self.encoder = Encoder(config.encoder)
        across = config.prediction is Prediction.view
        self.predictor = Predictor(config.predictor, config.encoder, views=across)
        self.pyramid = Pyramid(config.pyramid, config.encoder.output_grid, width)
        self.global_level, maps = None, []
        if config.global_level is not None:
            self.global_level = GlobalLevel(config.global_level, width)
            maps = [GlobalLevel(config.global_level, each, norm=True) for each in config.map_widths]
        self.map_levels = nn.ModuleList(maps)
        self.losses = PredictionLosses(config)
        self.projection = None
        if config.targets is Targets.projection:
            self.projection = PixelProjection(config.encoder.in_channels, config.output_patches, width)
        self.level_averages = None
        if config.level_weights.kind is LevelWeighting.adaptive:
            self.level_averages = LevelAverages(config.pyramid.levels, config.level_weights.momentum)
        has_target = config.targets not in WITHOUT_EMA
        self.target_encoder = copy.deepcopy(self.encoder) if has_target else None
        self.target_pyramid = copy.deepcopy(self.pyramid) if config.targets is Targets.ema else None
        self.target_global_level = copy.deepcopy(self.global_level) if has_target else None
        self.target_map_levels = copy.deepcopy(self.map_levels) if has_target and maps else None
        for _, target in self.ema_pairs():
            target.requires_grad_(False)
        # A function of any model, so that a copy of this one runs itself.
        self._compiled_step: Callable[..., HJEPAOutput] | None = None
        self.train(self.training)

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every parameter and buffer from a CPU generator; the target branch starts equal to the online one."""
        parts: tuple[Any, ...] = (self.encoder, self.predictor, self.pyramid, self.global_level, self.losses)
        parts += (self.projection, *self.map_levels)
        for part in parts:
            if part is not None:
                part.init_weights(generator)
        if self.level_averages is not None:
            self.level_averages.init_weights()
        for online, target in self.ema_pairs():
            target.load_state_dict(online.state_dict())

    def train(self, mode: bool = True) -> "HJEPA":
        """Set the mode of the online branch; the target branch never drops anything and stays in evaluation mode."""
        super().train(mode)
        for _, target in self.ema_pairs():
            target.eval()
        return self

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (online, target) modules of equal layout; the trainer moves the second towards the first."""
        pairs = (
            (self.encoder, self.target_encoder),
            (self.pyramid, self.target_pyramid),
            (self.global_level, self.target_global_level),
            (self.map_levels, self.target_map_levels),
        )
        return [(online, target) for online, target in pairs if online is not None and target is not None]

    @property
    def feature_levels(self) -> tuple[str | int, ...]:
        """What `features` accepts as a level."""
        return self._branch(Branch.online).levels

    @property
    def may_skip_parameters(self) -> bool:
        """Whether some steps leave trained parameters without a gradient (DDP then needs `find_unused_parameters`)."""
        config = self.config
        return (
            config.predict_every > 1
            or config.level_weights.kind is LevelWeighting.curriculum
            or not all(config.level_weights.weights)
        )

    def plan(self, step: int) -> StepPlan:
        """Return what is decided before a step runs."""
        config = self.config
        active = tuple(weight > 0 for weight in config.level_weights.level_weights(step))
        predicts = any(active) and (step + 1) % config.predict_every == 0
        return StepPlan(predicts, active, config.output_patch(step))

    def needs_masks(self, step: int) -> bool:
        """Return whether a step hides patches."""
        return self.config.predicts is Prediction.hidden and self.plan(step).predicts

    def compile_step(self, **options: Any) -> None:  # noqa: ANN401
        """Compile the forward pass in place; its backward follows.

        There is one graph for each different `plan`: one for the whole run with fixed or adaptive level weights,
        `predict_every=1` and no schedule of patch sizes. The step enters as a tensor, so it causes no recompiles.

        Args:
            options: of `torch.compile`; `fullgraph=True` and `dynamic=False` unless given.
        """
        self._compiled_step = torch.compile(run_step, **({"fullgraph": True, "dynamic": False} | options))

    def forward(
        self,
        views: Sequence[Float[Tensor, "B C *S"]],
        context_index: Int[Tensor, "R Kc"] | None,
        target_index: Int[Tensor, "R M Kt"] | None,
        step: int,
        crops: Sequence[Float[Tensor, "B 5"]] | None = None,
    ) -> HJEPAOutput:
        """Return the loss of one batch.

        The full views are encoded once, in one batch; prediction costs nothing at steps where no level has weight.

        Args:
            views: normalised pixels of each view of the same images; one is enough without a global level. Those of
                another shape than the first, which come last, need not agree with one another there.
            context_index: flat positions of the visible patches, on the grid that the blocks see. R rows:
                masked_views * B (view-major), or at most B: then the first R images of each masked view share them, and
                only those images carry the masked term. None where the step `needs_masks` not.
            target_index: flat positions of the hidden patches, M blocks; likewise.
            step: the step of the run; decides level weights, output patch size and everything that is drawn.
            crops: where the views were cut: left, top, width and height as parts of the image, and 1 where the view is
                mirrored, else 0. For `prediction=view`.

        Returns:
            Loss, unweighted losses and embeddings.

        Raises:
            ValueError: for too few views, views that do not fit one another, and masks or crops that do not fit them.
        """
        check_views(self.config, views)
        plan, device = self.plan(step), views[0].device
        if context_index is not None and target_index is not None:
            check_masks(self.encoder.grid_of(views[0]), context_index, target_index)
        elif self.needs_masks(step):
            raise ValueError(f"masks: None at step {step}, which hides patches; draw them where needs_masks(step)")
        pair = None
        if plan.predicts and self.config.prediction is Prediction.view:
            pair = pair_of_crops(views, crops)
        for grid in {self.encoder.grid_of(view) for view in views}:
            for part in (self.encoder, self.target_encoder, self.predictor):
                if part is not None:
                    part.positions.prepare(grid, device)
        # Filled on the device: a tensor made of a list would be copied there.
        weights = [torch.full((), weight, device=device) for weight in self.config.level_weights.level_weights(step)]
        clock = torch.full((), step, dtype=torch.int64, device=device)
        inputs = StepInputs(views, context_index, target_index, pair)
        return (self._compiled_step or run_step)(self, inputs, torch.stack(weights), clock, plan)

    def encode_views(self, views: Sequence[Tensor]) -> list[tuple[Float[Tensor, "B N _"], ...]]:
        """Encode all views with gradient, those of one shape in one batch.

        Returns:
            Of each view its tokens, and the maps of the stem that have a level.
        """
        found: dict[int, tuple[Tensor, ...]] = {}
        for shape in dict.fromkeys(view.shape for view in views):
            same = [number for number, view in enumerate(views) if view.shape == shape]
            together = self.encoder.scales(torch.cat([views[number] for number in same]), len(self.map_levels))
            found |= zip(same, zip(*(scale.chunk(len(same)) for scale in together), strict=True), strict=True)
        return [found[number] for number in range(len(views))]

    def target_levels(self, canvas: Canvas, few: Int[Tensor, "B K"] | None = None) -> list[Canvas]:
        """Return the target side of every level, by the path of predictions.

        Args:
            canvas: layer-normed tokens of the finest level.
            few: the places that are known, where they are few (`Pyramid.forward`).
        """
        if self.target_pyramid is None:
            return self.pyramid.pool(canvas)
        levels: list[Canvas] = self.target_pyramid(canvas, few)
        return levels

    @torch.no_grad()
    def features(
        self,
        images: Float[Tensor, "B C *S"],
        level: int | str = "encoder",
        pool: FeaturePool | str = FeaturePool.mean,
        branch: Branch | str = Branch.target,
    ) -> Tensor:
        """Return features of whole images, without gradient, in the current mode (call `eval()` first).

        Args:
            images: normalised pixels.
            level: "encoder" (tokens after the final norm), a pyramid level l or "l" (all tokens known, layer-normed as
                in training, level 0 at the output patch size), "map0", "map1", ... (maps of the stem that have a level,
                from coarse to fine, pooled by it), "pooled" (what the global level pools, and these beside it), "all"
                (the mean token and "pooled", side by side, where the global level pools by attention) or "global" (what
                it projects what it pools to).
            pool: `mean` [B, D], `none` [B, N_l, D] or `flatten` [B, N_l * D]; those from "map0" on are one vector an
                image whatever the pool.
            branch: `target` (the moving average of each part that has one, else the part itself) or `online`.

        Returns:
            Features.

        Raises:
            ValueError: for a level that the model does not have.
        """
        pool, branch = coerce_choice(FeaturePool, "pool", pool), coerce_choice(Branch, "branch", branch)
        if isinstance(level, str) and level.isdecimal():
            level = int(level)
        if isinstance(level, bool | float) or level not in self.feature_levels:
            allowed = ", ".join(map(str, self.feature_levels))
            raise ValueError(f"level={level!r}: the model has no such level; allowed: {allowed}; choose one of them")
        # Integers of other libraries are equal to ours and no `int`.
        level = self.feature_levels[self.feature_levels.index(level)]
        return self._branch(branch).at(images, level, pool)

    @torch.no_grad()
    def all_features(
        self,
        images: Float[Tensor, "B C *S"],
        pool: FeaturePool | str = FeaturePool.mean,
        branch: Branch | str = Branch.target,
    ) -> dict[str | int, Tensor]:
        """Return what `features` returns, for every level of `feature_levels`; the images are encoded once."""
        pool, branch = coerce_choice(FeaturePool, "pool", pool), coerce_choice(Branch, "branch", branch)
        return self._branch(branch).everywhere(images, pool)

    def _branch(self, branch: Branch) -> FeatureBranch:
        """Return the parts of a branch; a part without a moving average serves both."""
        if branch is Branch.online:
            return FeatureBranch(self.encoder, self.pyramid, self.global_level, self.map_levels)
        return FeatureBranch(
            self.encoder if self.target_encoder is None else self.target_encoder,
            self.pyramid if self.target_pyramid is None else self.target_pyramid,
            self.global_level if self.target_global_level is None else self.target_global_level,
            self.map_levels if self.target_map_levels is None else self.target_map_levels,
        )
