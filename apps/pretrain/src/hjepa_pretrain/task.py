"""What the trainer trains: colours, masks and the model, joined."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hjepa_data import Batch, ColorAugment, MaskSampler, normalize
from hjepa_models import HJEPA, HJEPAOutput
from hjepa_pretrain.baselines import Baseline, Inputs
from hjepa_pretrain.config import PretrainConfig
from hjepa_pretrain.model import Model, build_model
from hjepa_train import StepOutput


class PretrainTask(nn.Module):
    """Turns a batch of uint8 views into the loss of the model; everything random is a function of (seed, step, sample).

    Args:
        model: what learns.
        masks: one sampler for each masked view; none where nothing is hidden.
        color: colour augmentation, or None.
        mean: of each channel, pixels from 0 to 1.
        std: likewise.
    """

    def __init__(
        self,
        model: Model,
        masks: Sequence[MaskSampler],
        color: ColorAugment | None,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.model = model
        self._masks = tuple(masks)
        self._color = color
        self._mean, self._std = mean, std

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """The (online, target) modules that the trainer keeps close."""
        return self.model.ema_pairs()

    @property
    def may_skip_parameters(self) -> bool:
        """Whether some steps leave trained parameters without a gradient."""
        return self.model.may_skip_parameters

    @property
    def cycle(self) -> int:
        """Steps after which those that predict, and those that do not, begin anew."""
        return self.model.config.predict_every if isinstance(self.model, HJEPA) else 1

    def compile_step(self, **options: Any) -> None:  # noqa: ANN401
        """Compile the model's part of the step in place, with options of `torch.compile`."""
        self.model.compile_step(**options)

    def draw_masks(self, step: int, sample: Int[Tensor, " B"]) -> tuple[Int[Tensor, "R Kc"], Int[Tensor, "R M Kt"]]:
        """Draw the masks of a step, view after view: R = masked views * B rows of flat indices."""
        drawn = [masks(step, sample) for masks in self._masks]
        return torch.cat([one.context for one in drawn]), torch.cat([one.targets for one in drawn])

    def all_features(self, images: Float[Tensor, "B C H W"]) -> dict[str, Float[Tensor, "B D"]]:
        """Return the features of every level for normalised images (mean of tokens), of the target branch if any."""
        return {str(level): features for level, features in self.model.all_features(images).items()}

    def forward(self, batch: Batch, step: int) -> StepOutput:
        """Return loss, losses by level and embeddings of one micro-batch."""
        views = [self._prepare(view, step, batch.sample, number) for number, view in enumerate(batch.views)]
        # Drawn of (seed, step, sample): those of a step that needs none are missed by no other.
        context, targets = self.draw_masks(step, batch.sample) if self.model.needs_masks(step) else (None, None)
        output = self.run_model(views, context, targets, batch.labels, step, batch.crops)
        metrics = {f"loss_level_{level}": loss for level, loss in output.level_losses.items()}
        return StepOutput(loss=output.loss, metrics=metrics, embeddings=output.embeddings)

    def run_model(
        self,
        views: Sequence[Float[Tensor, "B C H W"]],
        context_index: Int[Tensor, "R Kc"] | None,
        target_index: Int[Tensor, "R M Kt"] | None,
        labels: Int[Tensor, " B"],
        step: int,
        crops: Sequence[Float[Tensor, "B 5"]] | None = None,
    ) -> HJEPAOutput:
        """Return what the model, an H-JEPA or a baseline, makes of normalised views, their masks and their crops."""
        if not isinstance(self.model, Baseline):
            output: HJEPAOutput = self.model(views, context_index, target_index, step, crops)
            return output
        context_index, target_index = (
            None if index is None else index[: len(labels)] for index in (context_index, target_index)
        )
        inputs = Inputs(views=views, context_index=context_index, target_index=target_index, labels=labels)
        output = self.model(inputs)
        return output

    def _prepare(self, view: Tensor, step: int, sample: Tensor, number: int) -> Float[Tensor, "B C H W"]:
        pixels = view if self._color is None else self._color(view, step, sample, number)
        return normalize(pixels, self._mean, self._std)


def build_task(config: PretrainConfig) -> PretrainTask:
    """Build model, masks and colours from one seed."""
    seed = config.run.seed
    return PretrainTask(
        build_model(config),
        [config.masks.build(seed + view) for view in range(config.hjepa.masked_views if config.hides_patches else 0)],
        None if config.color is None else config.color.build(seed),
        config.data.mean,
        config.data.std,
    )
