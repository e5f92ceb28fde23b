"""The terms of the loss that predictions are scored by."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hjepa_models.aggregate import ProjectAndAggregate
from hjepa_models.canvas import Canvas
from hjepa_models.config import HJEPAConfig
from hjepa_models.grid import gather_tokens
from hjepa_models.objectives import (
    Objective,
    TwoHotHead,
    disentanglement,
    info_nce,
    mean_token,
    patch_discrimination,
    prediction_loss,
    vicreg_terms,
)


class PredictionLosses(nn.Module):
    """The objective of a level and the terms beside it, with the heads that some of them need."""

    def __init__(self, config: HJEPAConfig) -> None:
        super().__init__()
        self.config = config
        width = config.encoder.embed_dim
        self.two_hot = TwoHotHead(config.two_hot, width) if config.objective is Objective.two_hot else None
        self.aggregate = ProjectAndAggregate(config.aggregate, width) if config.instance_weight else None

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every parameter from a CPU generator."""
        for head in (self.two_hot, self.aggregate):
            if head is not None:
                head.init_weights(generator)

    def level(
        self,
        prediction: Canvas,
        target: Canvas,
        index: Int[Tensor, "B K"] | None = None,
        tokens: Float[Tensor, "B K D"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss of one level: on the weighted canvas, or on the tokens at `index` where one is given.

        Args:
            prediction: predicted tokens of the level; predictions of one place are averaged on it.
            target: wanted tokens.
            index: places that are scored, each as often as it is named; `patch_discrimination` scores each once.
            tokens: what is predicted at `index`, where predictions of one place differ; None means those on the canvas.
        """
        config = self.config
        contrast = config.objective is Objective.patch_discrimination
        if contrast and not config.encoder.output_patch_size:
            # On the canvas each place stands once: blocks that overlap would have targets that none can tell apart.
            index = None
        guess, wanted, weight = prediction.values, target.values, target.weight if index is None else None
        if index is not None:
            guess = gather_tokens(guess, index) if tokens is None else tokens
            wanted = gather_tokens(wanted, index)
        if contrast:
            # On an output grid, which is never compared as a whole, a place stands where it is named first.
            weight = first_named(index) if index is not None else weight
            return patch_discrimination(guess, wanted, config.temperature, config.contrast, weight)
        if self.two_hot is not None:
            return self.two_hot.loss(self.two_hot(guess), wanted, weight)
        return prediction_loss(config.objective, guess, wanted, weight, config.beta, config.symlog)

    def regularizers(
        self,
        predicted: Float[Tensor, "B K D"],
        wanted: Float[Tensor, "B K D"],
        levels: Sequence[Canvas],
        weights: Float[Tensor, " L"],
        known: Float[Tensor, "B K"] | None = None,
    ) -> dict[str, tuple[float, Float[Tensor, ""]]]:
        """Return the terms on all predictions, (weight, term) by name; those whose weight is 0 are left out.

        Args:
            predicted: predicted tokens.
            wanted: layer-normed target tokens.
            levels: the predicted tokens through the pyramid.
            weights: of the levels at this step.
            known: 1 for the tokens that are scored, 0 for others; None means all.
        """
        config, terms = self.config, {}
        # An image of which nothing is known has no mean token: a row of 0 would count as one.
        seen = None if known is None else (known.sum(1) > 0).to(known.dtype)
        if config.vicreg_weight and config.vicreg_levels:
            each = torch.stack([self._spread(mean_token(level.values, level.weight), seen) for level in levels])
            terms["vicreg"] = (config.vicreg_weight, (weights * each).sum())
        elif config.vicreg_weight:
            mean = mean_token(predicted, known)
            term = self._spread(mean, seen)
            if config.vicreg_invariance:
                difference = torch.nn.functional.mse_loss(mean.to(wanted.dtype), mean_token(wanted, known))
                term = term + config.vicreg_invariance * difference
            terms["vicreg"] = (config.vicreg_weight, term)
        if config.disentanglement_weight:
            terms["disentanglement"] = (config.disentanglement_weight, disentanglement(levels))
        return terms

    def instance(
        self, context: Float[Tensor, "R Kc D"], whole: Float[Tensor, "R N D"] | None
    ) -> dict[str, tuple[float, Float[Tensor, ""]]]:
        """Return the instance term, likewise.

        Args:
            context: tokens of the visible patches, view after view.
            whole: target tokens of the same images, which are taken where only one view is masked.
        """
        if self.aggregate is None:
            return {}
        one, *others = self.aggregate(context).chunk(self.config.masked_views)
        if not others:
            assert whole is not None
            others = [self.aggregate(whole)]
        return {"instance": (self.config.instance_weight, info_nce(one, others[0], self.config.temperature))}

    def _spread(self, mean_tokens: Float[Tensor, "B D"], seen: Float[Tensor, " B"] | None) -> Float[Tensor, ""]:
        terms = vicreg_terms(mean_tokens, weight=seen)
        return self.config.vicreg_variance * terms.variance + self.config.vicreg_covariance * terms.covariance


def first_named(index: Int[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Return 1 where a position stands for the first time in its row, else 0.

    >>> first_named(torch.tensor([[5, 2, 5, 7, 2]]))
    tensor([[1., 1., 0., 1., 0.]])
    """
    order = index.sort(dim=1, stable=True)
    again = torch.nn.functional.pad(order.values[:, 1:] == order.values[:, :-1], (1, 0))
    return (~torch.zeros_like(again).scatter(1, order.indices, again)).float()
