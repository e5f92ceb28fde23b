"""The composed model: two branches, one path, a loss per level."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from hjepa_models._validation import coerce_choice
from hjepa_models.canvas import Canvas, dense_canvas, scatter_to_canvas
from hjepa_models.config import ONLINE_TARGETS, WITHOUT_EMA, Branch, FeaturePool, HJEPAConfig, Prediction, Targets
from hjepa_models.crops import relate_crops
from hjepa_models.distributed import all_reduce_mean, world_size
from hjepa_models.encoder import Encoder, tokens_per_axis
from hjepa_models.features import FeatureBranch, named_maps
from hjepa_models.global_level import GlobalLevel
from hjepa_models.grid import Grid, gather_tokens, num_tokens
from hjepa_models.inputs import check_masks, check_views, count_whole, pair_of_crops, spread_masks
from hjepa_models.layers.norm import normalize
from hjepa_models.layers.patch import PixelProjection
from hjepa_models.layers.upsampler import children_index, sample_children, upsampling_ratio
from hjepa_models.losses import PredictionLosses
from hjepa_models.objectives import LevelAverages, LevelWeighting, adaptive_weights, mean_token, sigreg
from hjepa_models.predictor import Predictor, PredictorMode
from hjepa_models.pretrained import PretrainedMixin
from hjepa_models.pyramid import Pyramid


@dataclass(slots=True)
class HJEPAOutput:
    """What a step returns.

    Attributes:
        loss: weighted sum of all terms.
        level_losses: the unweighted, detached loss of each level computed at this step: "0", "1", ..., "global",
            "map0", ... (of the stem's maps), and of each term that is on: "vicreg", "sigreg", "disentanglement",
            "instance", "state". A level whose weight is 0 at this step has no key.
        embeddings: detached mean features, one row per image: "encoder" (all tokens of the first view: of the online
            encoder where views are encoded whole, else of the target's; the visible tokens where whole images are not
            encoded), each predicted level ("0", ...: its wanted tokens on the target side, at steps that predict, one
            row for each image of each predicted view; 0 where crops do not overlap), "global" (the projected first
            view) and "map0", ... (pooled).
    """

    loss: Float[Tensor, ""]
    level_losses: dict[str, Float[Tensor, ""]]
    embeddings: dict[str, Float[Tensor, "B D"]]


class StepPlan(NamedTuple):
    """What of a step is decided before it runs; a compiled step has one graph for each plan.

    Attributes:
        predicts: whether the predicted term is computed.
        active: whether each level has weight.
        output_patch: pixels of an output token.
    """

    predicts: bool
    active: tuple[bool, ...]
    output_patch: Grid


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
        self._compiled_step = torch.compile(HJEPA._step, **({"fullgraph": True, "dynamic": False} | options))

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
        run = self._compiled_step or HJEPA._step
        return run(self, views, context_index, target_index, pair, torch.stack(weights), clock, plan)

    def _step(
        self,
        views: Sequence[Tensor],
        context_index: Tensor | None,
        target_index: Tensor | None,
        crops: Float[Tensor, "2 B 5"] | None,
        weights: Float[Tensor, " L"],
        step: Int[Tensor, ""],
        plan: StepPlan,
    ) -> HJEPAOutput:
        output = HJEPAOutput(torch.zeros((), device=views[0].device), {}, {})
        scales = None
        if self.config.encodes_views:
            scales = self.encode_views(views if self.global_level is not None else views[:2])
        full = None if scales is None else [tokens for tokens, *_ in scales]
        if full is not None:
            output.embeddings["encoder"] = full[0].detach().mean(1)
        if crops is not None:
            assert full is not None
            self._view_term(views, full, crops, weights, step, plan, output)
        elif plan.predicts:
            assert context_index is not None
            assert target_index is not None
            self._masked_term(views, full, context_index, target_index, weights, step, plan, output)
        if scales is not None and self.global_level is not None:
            self._global_term(scales, count_whole(views), step, output)
        elif not plan.predicts:
            output.loss = output.loss + 0.0 * self.predictor.mask_token.sum()
        return output

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

    def _masked_term(
        self,
        views: Sequence[Tensor],
        full: list[Tensor] | None,
        context_index: Tensor,
        target_index: Tensor,
        weights: Tensor,
        step: Tensor,
        plan: StepPlan,
        output: HJEPAOutput,
    ) -> None:
        config = self.config
        context_index, target_index, rows = spread_masks(
            context_index, target_index, config.masked_views, len(views[0])
        )
        images = torch.cat([view[:rows] for view in views[: config.masked_views]])
        grid = self.encoder.grid_of(images)
        index, output_grid = self._output_index(images, target_index.flatten(1), grid, step, plan)
        # The gradient branch runs first, so that the half-precision weights that autocast keeps are made with gradient.
        context = self.encoder(images, context_index)
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.targets is Targets.online):
            whole, wanted = self._target_tokens(images, full, rows, index, plan)
            canvas = scatter_to_canvas(wanted, index, output_grid)
            targets = self.target_levels(canvas, self._few_known(index))
        if full is None:
            seen = context if whole is None else whole
            output.embeddings["encoder"] = seen[:rows].detach().mean(1)
        predicted, terms = self._predict(context, context_index, target_index, grid, wanted, step)
        if config.encoder.output_patch_size:
            canvas = scatter_to_canvas(predicted, target_index.flatten(1), grid)
            predicted = self.encoder.upsample(canvas, output_grid, index)
        predictions = self.pyramid(scatter_to_canvas(predicted, index, output_grid), self._few_known(index))
        if self.level_averages is not None:
            weights = adaptive_weights(self.level_averages(step), weights)
        terms |= self.losses.regularizers(predicted, wanted, predictions, weights)
        terms |= self.losses.instance(context, whole)
        if config.sigreg_weight:
            seen = full if whole is None or full is not None else whole.chunk(config.masked_views)
            assert seen is not None
            terms["sigreg"] = (config.sigreg_weight, self._sigreg(seen, step))
        self._add_levels(predictions, targets, index, weights, step, plan, output, self._single_tokens(predicted))
        self._add_terms(terms, output)

    def _single_tokens(self, predicted: Float[Tensor, "B K D"]) -> Float[Tensor, "B K D"] | None:
        """Return the finest level of predictions that differ by block where a place is in several, else None.

        On a canvas such predictions are averaged, which spares them what they differ by. A level that looks at its
        neighbours, or is upsampled, needs the canvas.
        """
        config, pyramid = self.config, self.pyramid
        alike = config.predictor.mode is PredictorMode.joint and config.predictor.state is None
        if alike or config.encoder.output_patch_size or pyramid.looks_around:
            return None
        tokens: Tensor = pyramid.finest(predicted.to(torch.promote_types(predicted.dtype, torch.float32)))
        return tokens

    def _view_term(
        self,
        views: Sequence[Tensor],
        full: list[Tensor],
        crops: Float[Tensor, "2 B 5"],
        weights: Tensor,
        step: Tensor,
        plan: StepPlan,
        output: HJEPAOutput,
    ) -> None:
        """Predict the first view from the second, and the second from the first."""
        grid = self.encoder.grid_of(views[0])
        relation = relate_crops(crops.flatten(0, 1), crops.flip(0).flatten(0, 1), grid)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.targets is Targets.online):
            target = self.target_encoder
            whole = torch.cat(full[:2]) if target is None else target(torch.cat(list(views[:2])))
            wanted = self._wanted(whole)
            targets = self.target_levels(Canvas(wanted, relation.inside, grid))
        predicted = self.predictor.across(torch.cat(full[1::-1]), relation, grid)
        values = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
        predictions = self.pyramid(Canvas(values, relation.inside, grid))
        if self.level_averages is not None:
            weights = adaptive_weights(self.level_averages(step), weights)
        self._add_levels(predictions, targets, None, weights, step, plan, output)
        terms = self.losses.regularizers(predicted, wanted, predictions, weights, relation.inside)
        if self.config.sigreg_weight:
            terms["sigreg"] = (self.config.sigreg_weight, self._sigreg(full, step))
        self._add_terms(terms, output)

    @staticmethod
    def _sigreg(views: Sequence[Float[Tensor, "B N D"]], step: Tensor) -> Float[Tensor, ""]:
        return sigreg(torch.stack([tokens.mean(1) for tokens in views]), step)

    def _add_terms(self, terms: dict[str, tuple[float, Tensor]], output: HJEPAOutput) -> None:
        for name, (weight, term) in terms.items():
            output.level_losses[name] = term.detach()
            output.loss = output.loss + weight * term

    def _output_index(
        self, images: Tensor, target_index: Int[Tensor, "B K"], grid: Grid, step: Tensor, plan: StepPlan
    ) -> tuple[Int[Tensor, "B O"], Grid]:
        """Return the places that the loss scores, inside the hidden patches, and the grid that they are counted on."""
        config = self.config
        if not config.encoder.output_patch_size:
            return target_index, grid
        output_grid = tokens_per_axis(tuple(images.shape[2:]), plan.output_patch)
        if config.output_tokens:
            # A schedule may start at patches that hold fewer.
            count = min(config.output_tokens, num_tokens(upsampling_ratio(grid, output_grid)))
            return sample_children(target_index, grid, output_grid, count, step), output_grid
        return children_index(target_index, grid, output_grid), output_grid

    def _target_tokens(
        self, images: Tensor, full: list[Tensor] | None, rows: int, index: Tensor, plan: StepPlan
    ) -> tuple[Float[Tensor, "B N D"] | None, Float[Tensor, "B O D"]]:
        """Return the target branch's tokens of whole images, if there are any, and the layer-normed ones at `index`."""
        config = self.config
        if self.projection is not None:
            return None, normalize(self.projection(images, index, plan.output_patch))
        if config.targets in ONLINE_TARGETS:
            masked = None if full is None else torch.cat([view[:rows] for view in full[: config.masked_views]])
            whole: Tensor = self.encoder(images) if masked is None else masked
            return whole, self._wanted(whole, index)
        assert self.target_encoder is not None
        if not config.encoder.output_patch_size:
            whole = self.target_encoder(images)
            return whole, self._wanted(whole, index)
        patch = config.target_patch_size or plan.output_patch
        whole = self.target_encoder(images, processing_patch_size=patch)
        if patch == plan.output_patch:
            return whole, normalize(gather_tokens(whole, index))
        sizes = tuple(images.shape[2:])
        canvas = dense_canvas(whole, tokens_per_axis(sizes, patch))
        finer = self.target_encoder.upsample(canvas, tokens_per_axis(sizes, plan.output_patch), index)
        return whole, normalize(finer)

    def _wanted(self, whole: Float[Tensor, "B N D"], index: Int[Tensor, "B K"] | None = None) -> Float[Tensor, "B K D"]:
        """Return layer-normed tokens, all or those at `index`; centred by place if it is so set."""
        if self.config.center_targets:
            if len(whole) * world_size() < 2:
                raise ValueError(
                    "center_targets=True: one image less its own mean is 0 everywhere; "
                    "allowed: two or more, over all processes; give more images, or leave center_targets out"
                )
            whole = whole - all_reduce_mean(whole.detach().mean(0, keepdim=True))
        return normalize(whole if index is None else gather_tokens(whole, index))

    def _predict(
        self,
        context: Tensor,
        context_index: Tensor,
        target_index: Tensor,
        grid: Grid,
        wanted: Tensor,
        step: Tensor,
    ) -> tuple[Float[Tensor, "B K D"], dict[str, tuple[float, Tensor]]]:
        """Return the predicted tokens of all blocks, and the term of a hybrid state."""
        condition, terms = None, {}
        if self.predictor.state is not None:
            blocks = rearrange(wanted.detach(), "b (m k) d -> b m k d", m=target_index.shape[1]).mean(2)
            condition, divergence = self.predictor.rollout(context, target_index, grid, step, blocks)
            assert divergence is not None
            terms["state"] = (1.0, divergence.loss)
            if not self.training:
                condition, _ = self.predictor.rollout(context, target_index, grid, step)
        return self.predictor(context, context_index, target_index, grid, condition).flatten(1, 2), terms

    def _add_levels(
        self,
        predictions: list[Canvas],
        targets: list[Canvas],
        index: Tensor | None,
        weights: Tensor,
        step: Tensor,
        plan: StepPlan,
        output: HJEPAOutput,
        tokens: Tensor | None = None,
    ) -> None:
        losses = torch.zeros_like(weights)
        for level, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
            output.embeddings[str(level)] = mean_token(target.values, target.weight).detach()
            if plan.active[level]:
                single = (index, tokens) if level == 0 else ()
                loss = self.losses.level(prediction, target, *single)
                output.level_losses[str(level)] = losses[level] = loss.detach()
                output.loss = output.loss + weights[level] * loss
        if self.level_averages is not None and self.training:
            self.level_averages.observe(step, losses)

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

    def _few_known(self, index: Int[Tensor, "B K"]) -> Int[Tensor, "B K"] | None:
        """Return the places of tokens where they are few among many: on an output grid finer than the patches."""
        return index if self.config.encoder.output_patch_size else None

    def _global_term(self, scales: list[tuple[Tensor, ...]], whole: int, step: Tensor, output: HJEPAOutput) -> None:
        assert self.global_level is not None
        losses = []
        levels = {"global": self.global_level} | dict(named_maps(self.map_levels))
        for (name, level), views in zip(levels.items(), zip(*scales, strict=True), strict=True):
            pooled = torch.stack([level.pooled(view) for view in views])
            z = level(pooled)
            losses.append(level.loss(z, step, whole))
            output.level_losses[name] = losses[-1].detach()
            output.embeddings[name] = (z if level is self.global_level else pooled)[0].detach()
        output.loss = output.loss + self.global_level.config.weight * torch.stack(losses).mean()

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
