"""One training step of a model on one batch: the terms that are on, and the loss that they add up to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from hjepa_models.canvas import Canvas, dense_canvas, scatter_to_canvas
from hjepa_models.config import ONLINE_TARGETS, Targets
from hjepa_models.crops import relate_crops
from hjepa_models.distributed import all_reduce_mean, world_size
from hjepa_models.encoder import tokens_per_axis
from hjepa_models.features import named_maps
from hjepa_models.grid import Grid, gather_tokens, num_tokens
from hjepa_models.inputs import count_whole, spread_masks
from hjepa_models.layers.norm import normalize
from hjepa_models.layers.upsampler import children_index, sample_children, upsampling_ratio
from hjepa_models.objectives import adaptive_weights, mean_token, sigreg
from hjepa_models.predictor import PredictorMode
from hjepa_models.random import row_seeds

if TYPE_CHECKING:
    from hjepa_models.hjepa import HJEPA


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


class StepInputs(NamedTuple):
    """What a step is given, checked.

    Attributes:
        views: normalised pixels of each view.
        context_index: places of the visible patches; None where nothing is hidden.
        target_index: those of the hidden ones, likewise.
        crops: where the first two views were cut; None where neither is predicted from the other.
    """

    views: Sequence[Float[Tensor, "B C *S"]]
    context_index: Int[Tensor, "R Kc"] | None
    target_index: Int[Tensor, "R M Kt"] | None
    crops: Float[Tensor, "2 B 5"] | None


def run_step(
    model: "HJEPA", inputs: StepInputs, weights: Float[Tensor, " L"], number: Int[Tensor, ""], plan: StepPlan
) -> HJEPAOutput:
    """Return the loss of a batch; the function that is compiled.

    Args:
        model: what is trained.
        inputs: views, masks and crops.
        weights: of the levels.
        number: of the step in the run.
        plan: what of it was decided before.
    """
    return Step(model, weights, number, plan).run(inputs)


class Step:
    """A step under way: each term adds to `output` when it has been computed.

    Args:
        model: what is trained.
        weights: of the levels.
        number: of the step in the run.
        plan: what of it was decided before.
    """

    def __init__(self, model: "HJEPA", weights: Float[Tensor, " L"], number: Int[Tensor, ""], plan: StepPlan) -> None:
        self.model, self.config = model, model.config
        self.number, self.plan = number, plan
        self.weights = weights
        if plan.predicts and model.level_averages is not None:
            self.weights = adaptive_weights(model.level_averages(number), weights)
        self.output = HJEPAOutput(torch.zeros((), device=weights.device), {}, {})

    def run(self, inputs: StepInputs) -> HJEPAOutput:
        """Compute every term that is on."""
        model, output, views = self.model, self.output, inputs.views
        scales = None
        if self.config.encodes_views:
            scales = model.encode_views(views if model.global_level is not None else views[:2])
        full = None if scales is None else [tokens for tokens, *_ in scales]
        if full is not None:
            output.embeddings["encoder"] = full[0].detach().mean(1)
        if inputs.crops is not None:
            assert full is not None
            self._predict_views(views, full, inputs.crops)
        elif self.plan.predicts:
            assert inputs.context_index is not None
            assert inputs.target_index is not None
            self._predict_hidden(views, full, inputs.context_index, inputs.target_index)
        if scales is not None and model.global_level is not None:
            self._agree(scales, count_whole(views))
        elif not self.plan.predicts:
            output.loss = output.loss + 0.0 * model.predictor.mask_token.sum()
        return output

    def _predict_hidden(
        self, views: Sequence[Tensor], full: list[Tensor] | None, context_index: Tensor, target_index: Tensor
    ) -> None:
        """Predict the hidden patches of each masked view from its visible ones."""
        model, config = self.model, self.config
        context_index, target_index, rows = spread_masks(
            context_index, target_index, config.masked_views, len(views[0])
        )
        images = torch.cat([view[:rows] for view in views[: config.masked_views]])
        grid = model.encoder.grid_of(images)
        index, output_grid = self._output_index(images, target_index.flatten(1), grid)
        # The places that are known are few among many on an output grid that is finer than the patches.
        few = index if config.encoder.output_patch_size else None
        # The gradient branch runs first, so that the half-precision weights that autocast keeps are made with gradient.
        context = model.encoder(images, context_index)
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.targets is Targets.online):
            whole, wanted = self.target_tokens(images, full, rows, index)
            targets = model.target_levels(scatter_to_canvas(wanted, index, output_grid), few)
        if full is None:
            seen = context if whole is None else whole
            self.output.embeddings["encoder"] = seen[:rows].detach().mean(1)
        predicted, terms = self._predicted(context, context_index, target_index, grid, wanted)
        if config.encoder.output_patch_size:
            canvas = scatter_to_canvas(predicted, target_index.flatten(1), grid)
            predicted = model.encoder.upsample(canvas, output_grid, index)
        predictions = model.pyramid(scatter_to_canvas(predicted, index, output_grid), few)
        terms |= model.losses.regularizers(predicted, wanted, predictions, self.weights)
        terms |= model.losses.instance(context, whole)
        if config.sigreg_weight:
            seen = full if whole is None or full is not None else whole.chunk(config.masked_views)
            assert seen is not None
            terms["sigreg"] = (config.sigreg_weight, self._sigreg(seen))
        self._add_levels(predictions, targets, index, self._single_tokens(predicted))
        self._add_terms(terms)

    def _predict_views(self, views: Sequence[Tensor], full: list[Tensor], crops: Float[Tensor, "2 B 5"]) -> None:
        """Predict the first view from the second, and the second from the first."""
        model, config = self.model, self.config
        grid = model.encoder.grid_of(views[0])
        relation = relate_crops(crops.flatten(0, 1), crops.flip(0).flatten(0, 1), grid)
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.targets is Targets.online):
            target = model.target_encoder
            whole = torch.cat(full[:2]) if target is None else target(torch.cat(list(views[:2])))
            wanted = self._wanted(whole)
            targets = model.target_levels(Canvas(wanted, relation.inside, grid))
        predicted = model.predictor.across(torch.cat(full[1::-1]), relation, grid)
        values = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
        predictions = model.pyramid(Canvas(values, relation.inside, grid))
        self._add_levels(predictions, targets)
        terms = model.losses.regularizers(predicted, wanted, predictions, self.weights, relation.inside)
        if config.sigreg_weight:
            terms["sigreg"] = (config.sigreg_weight, self._sigreg(full))
        self._add_terms(terms)

    def _agree(self, scales: list[tuple[Tensor, ...]], whole: int) -> None:
        """Let the views of an image agree, at the global level and at those of the stem's maps."""
        model, output, losses = self.model, self.output, []
        assert model.global_level is not None
        levels = {"global": model.global_level} | dict(named_maps(model.map_levels))
        for (name, level), views in zip(levels.items(), zip(*scales, strict=True), strict=True):
            pooled = torch.stack([level.pooled(view) for view in views])
            z = level(pooled)
            losses.append(level.loss(z, self.number, whole))
            output.level_losses[name] = losses[-1].detach()
            output.embeddings[name] = (z if level is model.global_level else pooled)[0].detach()
        output.loss = output.loss + model.global_level.config.weight * torch.stack(losses).mean()

    def target_tokens(
        self, images: Tensor, full: list[Tensor] | None, rows: int, index: Tensor
    ) -> tuple[Float[Tensor, "B N D"] | None, Float[Tensor, "B O D"]]:
        """Return the target branch's tokens of whole images, if there are any, and the layer-normed ones at `index`.

        Args:
            images: what is masked.
            full: the online tokens of each whole view, if it was encoded.
            rows: masked images of each view.
            index: places on the output grid.
        """
        model, config, plan = self.model, self.config, self.plan
        if model.projection is not None:
            return None, normalize(model.projection(images, index, plan.output_patch))
        if config.targets in ONLINE_TARGETS:
            masked = None if full is None else torch.cat([view[:rows] for view in full[: config.masked_views]])
            whole: Tensor = model.encoder(images) if masked is None else masked
            return whole, self._wanted(whole, index)
        encoder = model.target_encoder
        assert encoder is not None
        if not config.encoder.output_patch_size:
            whole = encoder(images)
            return whole, self._wanted(whole, index)
        patch = config.target_patch_size or plan.output_patch
        whole = encoder(images, processing_patch_size=patch)
        if patch == plan.output_patch:
            return whole, normalize(gather_tokens(whole, index))
        sizes = tuple(images.shape[2:])
        canvas = dense_canvas(whole, tokens_per_axis(sizes, patch))
        return whole, normalize(encoder.upsample(canvas, tokens_per_axis(sizes, plan.output_patch), index))

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

    def _output_index(
        self, images: Tensor, target_index: Int[Tensor, "B K"], grid: Grid
    ) -> tuple[Int[Tensor, "B O"], Grid]:
        """Return the places that the loss scores, inside the hidden patches, and the grid that they are counted on."""
        config = self.config
        if not config.encoder.output_patch_size:
            return target_index, grid
        output_grid = tokens_per_axis(tuple(images.shape[2:]), self.plan.output_patch)
        if config.output_tokens:
            # A schedule may start at patches that hold fewer.
            count = min(config.output_tokens, num_tokens(upsampling_ratio(grid, output_grid)))
            seeds = self._row_seeds(target_index)
            return sample_children(target_index, grid, output_grid, count, seeds), output_grid
        return children_index(target_index, grid, output_grid), output_grid

    def _row_seeds(self, rows: Tensor) -> Int[Tensor, " B"]:
        """Return a seed for each masked row, the same whichever process has it."""
        return row_seeds(self.number, len(rows), rows.device, self.config.masked_views)

    def _predicted(
        self, context: Tensor, context_index: Tensor, target_index: Tensor, grid: Grid, wanted: Tensor
    ) -> tuple[Float[Tensor, "B K D"], dict[str, tuple[float, Tensor]]]:
        """Return the predicted tokens of all blocks, and the term of a hybrid state."""
        predictor, condition, terms = self.model.predictor, None, {}
        if predictor.state is not None:
            blocks = rearrange(wanted.detach(), "b (m k) d -> b m k d", m=target_index.shape[1]).mean(2)
            seeds = self._row_seeds(context)
            condition, divergence = predictor.rollout(context, target_index, grid, seeds, blocks)
            assert divergence is not None
            terms["state"] = (1.0, divergence.loss)
            if not self.model.training:
                condition, _ = predictor.rollout(context, target_index, grid, seeds)
        return predictor(context, context_index, target_index, grid, condition).flatten(1, 2), terms

    def _single_tokens(self, predicted: Float[Tensor, "B K D"]) -> Float[Tensor, "B K D"] | None:
        """Return the finest level of predictions that differ by block where a place is in several, else None.

        On a canvas such predictions are averaged, which spares them what they differ by. A level that looks at its
        neighbours, or is upsampled, needs the canvas.
        """
        config, pyramid = self.config, self.model.pyramid
        alike = config.predictor.mode is PredictorMode.joint and config.predictor.state is None
        if alike or config.encoder.output_patch_size or pyramid.looks_around:
            return None
        tokens: Tensor = pyramid.finest(predicted.to(torch.promote_types(predicted.dtype, torch.float32)))
        return tokens

    def _add_levels(
        self,
        predictions: list[Canvas],
        targets: list[Canvas],
        index: Int[Tensor, "B O"] | None = None,
        tokens: Tensor | None = None,
    ) -> None:
        model, output = self.model, self.output
        losses = torch.zeros_like(self.weights)
        for level, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
            output.embeddings[str(level)] = mean_token(target.values, target.weight).detach()
            if self.plan.active[level]:
                single = (index, tokens) if level == 0 else ()
                loss = model.losses.level(prediction, target, *single)
                output.level_losses[str(level)] = losses[level] = loss.detach()
                output.loss = output.loss + self.weights[level] * loss
        if model.level_averages is not None and model.training:
            model.level_averages.observe(self.number, losses)

    def _add_terms(self, terms: dict[str, tuple[float, Tensor]]) -> None:
        for name, (weight, term) in terms.items():
            self.output.level_losses[name] = term.detach()
            self.output.loss = self.output.loss + weight * term

    def _sigreg(self, views: Sequence[Float[Tensor, "B N D"]]) -> Float[Tensor, ""]:
        return sigreg(torch.stack([tokens.mean(1) for tokens in views]), self.number)
