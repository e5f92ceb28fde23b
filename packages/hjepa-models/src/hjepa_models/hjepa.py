"""The composed model: two branches, one path, a loss per level."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hjepa_models._validation import check_not_negative, check_positive, coerce_choice
from hjepa_models.canvas import Canvas, dense_canvas, scatter_to_canvas
from hjepa_models.encoder import Encoder, EncoderConfig
from hjepa_models.global_level import GlobalConfig, GlobalLevel
from hjepa_models.grid import Grid, gather_tokens
from hjepa_models.initialization import construct
from hjepa_models.layers.patch import Stem, StemNorm
from hjepa_models.objectives import LevelWeighting, LevelWeightsConfig, Objective, prediction_loss, vicreg_terms
from hjepa_models.pooling import check_levels
from hjepa_models.predictor import Predictor, PredictorConfig
from hjepa_models.pyramid import Pyramid, PyramidConfig


class Targets(StrEnum):
    """Where the targets of the masked levels come from."""

    ema = "ema"
    pooled = "pooled"
    detached = "detached"


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
        targets: `ema` (moving averages of encoder and pyramid), `pooled` (moving average of the encoder, plain pooling)
            or `detached` (the online encoder's own features without gradient, plain pooling).
        objective: distance between predicted and target tokens.
        beta: where the quadratic part of `smooth_l1` ends.
        level_weights: weight of each level over the steps; one weight per level.
        global_level: the level above all grids, over several views; None leaves it out.
        masked_views: how many of the views carry masked prediction, the first ones.
        masked_every: the masked term is computed at every k-th step only: at step k - 1 (counted from 0), 2k - 1, ...
        vicreg_weight: weight of VICReg's variance and covariance terms on the mean predicted token (C-JEPA); 0 is off.
        vicreg_variance: weight of the variance inside that term.
        vicreg_covariance: weight of the covariance inside that term.
    """

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    pyramid: PyramidConfig = field(default_factory=PyramidConfig)
    targets: Targets = Targets.ema
    objective: Objective = Objective.smooth_l1
    beta: float = 1.0
    level_weights: LevelWeightsConfig = field(default_factory=LevelWeightsConfig)
    global_level: GlobalConfig | None = None
    masked_views: int = 1
    masked_every: int = 1
    vicreg_weight: float = 0.0
    vicreg_variance: float = 25.0
    vicreg_covariance: float = 1.0

    def __post_init__(self) -> None:
        """Coerce names and refuse parts that do not fit one another."""
        self.targets = coerce_choice(Targets, "targets", self.targets)
        self.objective = coerce_choice(Objective, "objective", self.objective)
        check_positive(beta=self.beta, masked_views=self.masked_views, masked_every=self.masked_every)
        check_not_negative(
            vicreg_weight=self.vicreg_weight,
            vicreg_variance=self.vicreg_variance,
            vicreg_covariance=self.vicreg_covariance,
        )
        levels = self.pyramid.levels
        check_levels(self.encoder.grid, levels, self.pyramid.pooling, self.pyramid.pad)
        weights = self.level_weights.weights
        if len(weights) != levels:
            raise ValueError(
                f"level_weights.weights={weights}: has {len(weights)} entries for pyramid.levels={levels}; "
                f"allowed: one per level; change one of them"
            )
        whole = self.targets is Targets.detached or self.global_level is not None
        if self.encoder.stem is Stem.overlap and self.encoder.stem_norm is StemNorm.batch and not whole:
            raise ValueError(
                f"encoder.stem_norm=batch: with targets={self.targets} and no global level the encoder sees no whole "
                "image in training, so the statistics for evaluation would never be measured; allowed: "
                "stem_norm=none, targets=detached or a global level; change one of them"
            )
        if not any(weights) and (self.global_level is None or self.global_level.weight == 0):
            raise ValueError(
                f"level_weights.weights={weights}: nothing would be learned without a global level; "
                f"allowed: a weight above 0; raise one or add global_level"
            )

    def build(self, *, seed: int = 0, device: torch.device | str | None = None) -> "HJEPA":
        """Return the model, its weights drawn from `seed`; on the device "meta" it has no storage yet."""
        return construct(lambda: HJEPA(self), seed, device)


@dataclass(slots=True)
class HJEPAOutput:
    """What a step returns.

    Attributes:
        loss: weighted sum of all terms.
        level_losses: the unweighted, detached loss of each level computed at this step: "0", "1", ..., "global", and
            "vicreg" where that term is on. A level whose weight is 0 at this step has no key.
        embeddings: detached mean features, one row per image: "encoder" (all tokens of the first view: of the online
            encoder where there is a global level, else of the target's), each masked level ("0", ...: its hidden
            tokens on the target side, at steps with a masked term) and "global" (the projected first view).
    """

    loss: Float[Tensor, ""]
    level_losses: dict[str, Float[Tensor, ""]]
    embeddings: dict[str, Float[Tensor, "B D"]]


class HJEPA(nn.Module):
    """Predicts the features of hidden patches at every level of a pyramid, and of whole views at the top."""

    def __init__(self, config: HJEPAConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder)
        self.predictor = Predictor(config.predictor, config.encoder)
        self.pyramid = Pyramid(config.pyramid, config.encoder.grid, config.encoder.embed_dim)
        width = config.encoder.embed_dim
        self.global_level = GlobalLevel(config.global_level, width) if config.global_level is not None else None
        has_target = config.targets is not Targets.detached
        self.target_encoder = copy.deepcopy(self.encoder) if has_target else None
        self.target_pyramid = copy.deepcopy(self.pyramid) if config.targets is Targets.ema else None
        self.target_global_level = copy.deepcopy(self.global_level) if has_target else None
        for _, target in self.ema_pairs():
            target.requires_grad_(False)
        self.train(self.training)

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every parameter and buffer from a CPU generator; the target branch starts equal to the online one."""
        for part in (self.encoder, self.predictor, self.pyramid, self.global_level):
            if part is not None:
                part.init_weights(generator)
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
        )
        return [(online, target) for online, target in pairs if online is not None and target is not None]

    @property
    def feature_levels(self) -> tuple[str | int, ...]:
        """What `features` accepts as a level."""
        top: tuple[str, ...] = ("global",) if self.global_level is not None else ()
        return ("encoder", *range(self.config.pyramid.levels), *top)

    @property
    def may_skip_parameters(self) -> bool:
        """Whether some steps leave trained parameters without a gradient (DDP then needs `find_unused_parameters`)."""
        config = self.config
        return (
            config.masked_every > 1
            or config.level_weights.kind is LevelWeighting.curriculum
            or not all(config.level_weights.weights)
        )

    def forward(
        self,
        views: Sequence[Float[Tensor, "B C *S"]],
        context_index: Int[Tensor, "R Kc"],
        target_index: Int[Tensor, "R M Kt"],
        step: int,
    ) -> HJEPAOutput:
        """Return the loss of one batch.

        The full views are encoded once, in one batch; the masked term costs nothing at steps where no level has weight.

        Args:
            views: normalised pixels of each view of the same images; one is enough without a global level.
            context_index: flat positions of the visible patches. R rows: masked_views * B (view-major), or at most B:
                then the first R images of each masked view share them, and only those images carry the masked term.
            target_index: flat positions of the hidden patches, M blocks.
            step: the step of the run; decides level weights and SIGReg's directions.

        Returns:
            Loss, unweighted losses and embeddings.

        Raises:
            ValueError: for too few views, or masks that do not fit the batch.
        """
        self._check_views(views)
        config = self.config
        weights = config.level_weights.level_weights(step)
        masked = any(weights) and (step + 1) % config.masked_every == 0
        loss = torch.zeros((), device=views[0].device)
        output = HJEPAOutput(loss, {}, {})
        full = self._encode_full(views) if self.global_level is not None else None
        if full is not None:
            output.embeddings["encoder"] = full[0].detach().mean(1)
        if masked:
            self._masked_term(views, full, context_index, target_index, weights, output)
        if full is not None:
            self._global_term(full, step, output)
        elif not masked:
            output.loss = output.loss + 0.0 * self.predictor.mask_token.sum()
        return output

    def _check_views(self, views: Sequence[Tensor]) -> None:
        needed = max(self.config.masked_views, 1 if self.global_level is None else 2)
        if len(views) < needed:
            raise ValueError(
                f"views: {len(views)} given; allowed: {needed} or more with masked_views={self.config.masked_views} "
                f"and {'a' if self.global_level is not None else 'no'} global level; give more or change the model"
            )

    def _encode_full(self, views: Sequence[Tensor]) -> list[Float[Tensor, "B N D"]]:
        """Encode all views with gradient: in one batch where they have one shape, else one by one."""
        if all(view.shape == views[0].shape for view in views):
            return list(self.encoder(torch.cat(list(views))).chunk(len(views)))
        return [self.encoder(view) for view in views]

    def _masked_term(
        self,
        views: Sequence[Tensor],
        full: list[Tensor] | None,
        context_index: Tensor,
        target_index: Tensor,
        weights: tuple[float, ...],
        output: HJEPAOutput,
    ) -> None:
        config = self.config
        context_index, target_index, rows = self._spread_masks(context_index, target_index, len(views[0]))
        images = torch.cat([view[:rows] for view in views[: config.masked_views]])
        grid = self.encoder.grid_of(images)
        # The gradient branch runs first, so that the half-precision weights that autocast keeps are made with gradient.
        context = self.encoder(images, context_index)
        predicted = self.predictor(context, context_index, target_index, grid).flatten(1, 2)
        with torch.no_grad():
            if full is not None and config.targets is Targets.detached:
                tokens = torch.cat([view[:rows] for view in full[: config.masked_views]])
            else:
                tokens = (self.target_encoder or self.encoder)(images)
            index = target_index.flatten(1)
            targets = self.target_levels(gather_tokens(normalize(tokens), index), index, grid)
            output.embeddings["encoder"] = tokens[:rows].mean(1) if full is None else output.embeddings["encoder"]
        predictions = self.pyramid(scatter_to_canvas(predicted, index, grid))
        for level, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
            output.embeddings[str(level)] = weighted_pool(target)
            if weights[level]:
                loss = self.level_loss(prediction, target, index if level == 0 else None)
                output.level_losses[str(level)] = loss.detach()
                output.loss = output.loss + weights[level] * loss
        if config.vicreg_weight:
            terms = vicreg_terms(predicted.mean(1))
            loss = config.vicreg_variance * terms.variance + config.vicreg_covariance * terms.covariance
            output.level_losses["vicreg"] = loss.detach()
            output.loss = output.loss + config.vicreg_weight * loss

    def _spread_masks(self, context_index: Tensor, target_index: Tensor, batch: int) -> tuple[Tensor, Tensor, int]:
        """Return masks with one row for each masked image, and how many images of each view those are."""
        views, given = self.config.masked_views, len(context_index)
        if len(target_index) == given and given == views * batch:
            return context_index, target_index, batch
        if len(target_index) != given or not 0 < given <= batch:
            raise ValueError(
                f"masks: {given} context and {len(target_index)} target rows for a batch of {batch}; "
                f"allowed: equal counts, {views * batch} or 1 to {batch}; draw masks for this batch"
            )
        return context_index.repeat(views, 1), target_index.repeat(views, 1, 1), given

    def target_levels(self, tokens: Float[Tensor, "B K D"], index: Int[Tensor, "B K"], grid: Grid) -> list[Canvas]:
        """Return the target side of every level from layer-normed tokens at `index`, by the path of predictions."""
        canvas = scatter_to_canvas(tokens, index, grid)
        levels: list[Canvas] = self.pyramid.pool(canvas) if self.target_pyramid is None else self.target_pyramid(canvas)
        return levels

    def level_loss(
        self, prediction: Canvas, target: Canvas, index: Int[Tensor, "B K"] | None = None
    ) -> Float[Tensor, ""]:
        """Return the loss of one level: on the weighted canvas, or on the tokens at `index` where one is given."""
        objective, beta = self.config.objective, self.config.beta
        if index is None:
            return prediction_loss(objective, prediction.values, target.values, target.weight, beta)
        wanted = gather_tokens(target.values, index)
        return prediction_loss(objective, gather_tokens(prediction.values, index), wanted, None, beta)

    def _global_term(self, full: list[Tensor], step: int, output: HJEPAOutput) -> None:
        assert self.global_level is not None
        z = self.global_level(torch.stack([tokens.mean(1) for tokens in full]))
        loss = self.global_level.loss(z, step)
        output.level_losses["global"] = loss.detach()
        output.embeddings["global"] = z[0].detach()
        output.loss = output.loss + self.global_level.config.weight * loss

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
            level: "encoder" (tokens after the final norm), a pyramid level l (all tokens known, layer-normed as in
                training) or "global" (mean token through the projector).
            pool: `mean` [B, D], `none` [B, N_l, D] or `flatten` [B, N_l * D]; "global" is [B, P] whatever the pool.
            branch: `target` (the moving average of each part that has one, else the part itself) or `online`.

        Returns:
            Features.

        Raises:
            ValueError: for a level that the model does not have.
        """
        pool, branch = coerce_choice(FeaturePool, "pool", pool), coerce_choice(Branch, "branch", branch)
        if isinstance(level, bool) or level not in self.feature_levels:
            allowed = ", ".join(map(str, self.feature_levels))
            raise ValueError(f"level={level!r}: the model has no such level; allowed: {allowed}; choose one of them")
        encoder, pyramid, head = self._branch(branch)
        tokens: Tensor = encoder(images)
        if level == "global" and head is not None:
            projected: Tensor = head(tokens.mean(1))
            return projected
        if isinstance(level, int):
            canvas = dense_canvas(normalize(tokens), self.encoder.grid_of(images))
            tokens = pyramid(canvas)[level].values
        return _pooled(tokens, pool)

    @torch.no_grad()
    def all_features(
        self,
        images: Float[Tensor, "B C *S"],
        pool: FeaturePool | str = FeaturePool.mean,
        branch: Branch | str = Branch.target,
    ) -> dict[str | int, Tensor]:
        """Return what `features` returns, for every level of `feature_levels`; the images are encoded once."""
        pool, branch = coerce_choice(FeaturePool, "pool", pool), coerce_choice(Branch, "branch", branch)
        encoder, pyramid, head = self._branch(branch)
        tokens: Tensor = encoder(images)
        levels = pyramid(dense_canvas(normalize(tokens), self.encoder.grid_of(images)))
        found: dict[str | int, Tensor] = {"encoder": _pooled(tokens, pool)}
        found |= {level: _pooled(canvas.values, pool) for level, canvas in enumerate(levels)}
        if head is not None:
            found["global"] = head(tokens.mean(1))
        return found

    def _branch(self, branch: Branch) -> tuple[Encoder, Pyramid, GlobalLevel | None]:
        """Return the parts of a branch; a part without a moving average serves both."""
        if branch is Branch.online:
            return self.encoder, self.pyramid, self.global_level
        return (
            self.encoder if self.target_encoder is None else self.target_encoder,
            self.pyramid if self.target_pyramid is None else self.target_pyramid,
            self.global_level if self.target_global_level is None else self.target_global_level,
        )


def _pooled(tokens: Float[Tensor, "B N D"], pool: FeaturePool) -> Tensor:
    if pool is FeaturePool.none:
        return tokens
    return tokens.mean(1) if pool is FeaturePool.mean else tokens.flatten(1)


def normalize(tokens: Float[Tensor, "B K D"]) -> Float[Tensor, "B K D"]:
    """Layer-norm tokens over their channels, without parameters, in float32 at least."""
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return torch.nn.functional.layer_norm(tokens, tokens.shape[-1:])


def weighted_pool(canvas: Canvas) -> Float[Tensor, "B D"]:
    """Return the mean of the known tokens of each sample, detached."""
    weight = canvas.weight / canvas.weight.sum(1, keepdim=True)
    return (canvas.values * weight.unsqueeze(-1)).sum(1).detach()
