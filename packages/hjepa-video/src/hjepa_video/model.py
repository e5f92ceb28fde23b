"""VideoHJEPA: the hierarchical JEPA of hjepa_models on clips, with tube masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from hjepa_data import IMAGENET_MEAN, IMAGENET_STD, Batch, normalize
from hjepa_data.errors import refuse
from hjepa_data.random import hash_int
from hjepa_models import (
    HJEPA,
    Branch,
    ContrastScope,
    FeaturePool,
    HJEPAConfig,
    HJEPAOutput,
    LevelWeightsConfig,
    Objective,
    PredictorConfig,
    PyramidConfig,
    encoder_config,
    max_levels,
)
from hjepa_models.distributed import rank
from hjepa_video.masks import TubeMaskConfig, long_range, short_range

__all__ = ["VideoHJEPA", "VideoHJEPAConfig", "VideoOutput", "video_config"]

_LEVEL_WEIGHTS = (1.0, 0.7, 0.5)


@dataclass(kw_only=True, slots=True)
class VideoHJEPAConfig:
    """Describes a hierarchical JEPA on clips.

    Attributes:
        model: The model; its encoder has three axes, image_size (T, H, W) and patch_size (tubelet, P, P).
        masks: Kinds of masks; each step deals them to the clips of the batch in turn.
        mask_seed: Of the masks.
        mean: Of each channel, on the scale of 0 to 1.
        std: Of each channel, on the scale of 0 to 1.
    """

    model: HJEPAConfig
    masks: tuple[TubeMaskConfig, ...] = field(default_factory=lambda: (short_range(), long_range()))
    mask_seed: int = 0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        self.masks, self.mean, self.std = tuple(self.masks), tuple(self.mean), tuple(self.std)
        encoder = self.model.encoder
        if len(encoder.grid) != 3:
            refuse(
                "model.encoder.image_size",
                encoder.image_size,
                "a clip has time, height and width",
                "allowed: (T, H, W) with patch_size (tubelet, P, P); see video_config",
            )
        if not self.masks:
            refuse("masks", self.masks, "nothing would be hidden", "allowed: one kind of masks or more")
        whole = _whole_batch_term(self.model)
        if whole is not None and len(self.masks) > 1:
            refuse(
                "masks", f"{len(self.masks)} kinds", f"model.{whole} needs whole batches", "allowed: one kind with it"
            )
        for name in ("mean", "std"):
            if len(getattr(self, name)) != encoder.in_channels:
                channels = f"clips have {encoder.in_channels} channels"
                refuse(name, getattr(self, name), channels, "allowed: a number for each channel")

    def build(self, *, seed: int = 0, device: torch.device | str | None = None) -> VideoHJEPA:
        """Return the model, its weights drawn from ``seed``.

        Args:
            seed: Of the weights.
            device: Where they are; None: the CPU.

        Returns:
            The model.

        Raises:
            ValueError: The grid is too small for the masks.
        """
        return VideoHJEPA(self, seed=seed, device=device)


def _whole_batch_term(model: HJEPAConfig) -> str | None:
    """Name a term that compares the clips of a batch with one another, which kinds of masks would split."""
    terms = {
        "global_level": model.global_level is not None,
        "vicreg_weight": model.vicreg_weight > 0,
        "sigreg_weight": model.sigreg_weight > 0,
        "disentanglement_weight": model.disentanglement_weight > 0,
        "instance_weight": model.instance_weight > 0,
        "center_targets": model.center_targets,
        "contrast=batch": model.objective is Objective.patch_discrimination and model.contrast is ContrastScope.batch,
    }
    return next((name for name, on in terms.items() if on), None)


def video_config(
    name: str,
    *,
    frames: int = 16,
    size: int = 256,
    tubelet: int = 2,
    levels: int = 3,
    activation_checkpointing: bool = False,
) -> VideoHJEPAConfig:
    """Describe a video model by the name of its encoder, with the objective, masks and predictor of V-JEPA 2.

    The levels are those of the pyramid on the grid (t, h, w): level l pools 2^l frames' tubelets and 2^l x 2^l patches.

    Args:
        name: ``vit_<size>_patch<P>``, as for images.
        frames: Frames of a clip.
        size: Height and width, pixels.
        tubelet: Frames of a patch.
        levels: Levels of the hierarchy; fewer where the grid admits fewer.
        activation_checkpointing: Recompute blocks in the backward pass to save memory.

    Returns:
        The config: L1 on layer-normed targets, an EMA target branch, a predictor of at most 12 blocks and width 384.

    Raises:
        ValueError: Unknown names, or sizes that the patches cannot tile.

    Source:
        V-JEPA 2 (arXiv 2506.09985), section 2; the hierarchy is this project's.
    """
    patch = encoder_config(name, image_size=(size, size)).patch_size[0]
    encoder = encoder_config(
        name,
        image_size=(frames, size, size),
        patch_size=(tubelet, patch, patch),
        activation_checkpointing=activation_checkpointing,
    )
    levels = min(levels, max_levels(encoder.grid))
    width = min(384, encoder.embed_dim)
    return VideoHJEPAConfig(
        model=HJEPAConfig(
            encoder=encoder,
            predictor=PredictorConfig(depth=min(12, encoder.depth), embed_dim=width, num_heads=width // 32),
            pyramid=PyramidConfig(levels=levels),
            objective=Objective.l1,
            level_weights=LevelWeightsConfig(weights=_level_weights(levels)),
        )
    )


def _level_weights(levels: int) -> tuple[float, ...]:
    return tuple(_LEVEL_WEIGHTS[min(level, len(_LEVEL_WEIGHTS) - 1)] for level in range(levels))


@dataclass(slots=True)
class VideoOutput(HJEPAOutput):
    """What a step returns; the rows of ``embeddings`` stand in the order of the kinds of masks, not of the batch."""

    @property
    def metrics(self) -> dict[str, Tensor]:
        """The unweighted loss of each level as ``loss_level_<l>``."""
        return {f"loss_level_{level}": loss for level, loss in self.level_losses.items()}


class VideoHJEPA(nn.Module):
    """An HJEPA on clips: normalises, draws tube masks and sums up over the kinds of masks.

    Clip i of step s, counted over all processes, is masked by kind (i + s) mod n: every kind has its share of every
    batch, the target branch encodes each clip once, and over steps each clip meets every kind.

    Args:
        config: The model.
        seed: Of its weights.
        device: Where they are.
    """

    def __init__(self, config: VideoHJEPAConfig, *, seed: int = 0, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        self.model: HJEPA = config.model.build(seed=seed, device=device)
        grid = config.model.encoder.grid
        self.masks = [kind.build(grid, hash_int(config.mask_seed, number)) for number, kind in enumerate(config.masks)]

    def forward(self, batch: Batch, step: int) -> VideoOutput:
        """Return the loss of a batch.

        Args:
            batch: Clips [B, C, T, H, W] (uint8, or floats in [0, 1]) as views, and the numbers of their samples.
            step: Step of the run.

        Returns:
            Loss, level losses (means over the clips) and embeddings.

        Raises:
            ValueError: Clips that do not fit the model, or those that are masked the grid of the masks.
        """
        kinds, size = len(self.masks), len(batch)
        self._check_sizes(batch)
        parts: list[tuple[float, HJEPAOutput]] = []
        for number, draw in enumerate(self.masks):
            rows = slice((number - step - rank() * size) % kinds, None, kinds)
            sample = batch.sample[rows]
            if len(sample) > 0:
                masks = draw(step, sample)
                views = [self.normalize(view[rows]) for view in batch.views]
                parts.append((len(sample) / size, self.model(views, masks.context, masks.targets, step)))
        return _joined(parts)

    def _check_sizes(self, batch: Batch) -> None:
        wanted = self.config.model.encoder.image_size
        for view in batch.views[: self.config.model.masked_views]:
            if tuple(view.shape[2:]) != wanted:
                refuse(
                    "batch.views",
                    tuple(view.shape),
                    f"the masks are those of clips of {wanted} frames and pixels",
                    "allowed: (B, C, T, H, W) with that (T, H, W); change the stream or the model",
                )

    def compile_step(self, **options: Any) -> None:  # noqa: ANN401
        """Compile the step in place, a graph for each kind of masks; see ``HJEPA.compile_step``.

        Args:
            options: Of ``torch.compile``.
        """
        self.model.compile_step(**options)

    @property
    def may_skip_parameters(self) -> bool:
        """Whether some steps leave trained parameters without a gradient; see ``HJEPA.may_skip_parameters``."""
        return self.model.may_skip_parameters

    def normalize(self, clips: Num[Tensor, "B C T H W"]) -> Float[Tensor, "B C T H W"]:
        """Turn pixels into what the encoder takes."""
        return normalize(clips, self.config.mean, self.config.std)

    def features(
        self,
        clips: Num[Tensor, "B C T H W"],
        level: int | str = "encoder",
        pool: FeaturePool | str = FeaturePool.mean,
        branch: Branch | str = Branch.target,
    ) -> Tensor:
        """Return features of whole clips, without gradient; see ``HJEPA.features``.

        Args:
            clips: Pixels, uint8 or floats in [0, 1].
            level: "encoder", a level of the pyramid or one above it ("map0", ..., "pooled", "all", "global").
            pool: ``mean``, ``none`` or ``flatten``.
            branch: ``target`` or ``online``.

        Returns:
            Features.
        """
        return self.model.features(self.normalize(clips), level, pool, branch)

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (online, target) modules; the trainer moves the second towards the first."""
        return self.model.ema_pairs()


def _joined(parts: Sequence[tuple[float, HJEPAOutput]]) -> VideoOutput:
    """Sum up the outputs of the kinds of masks, each with its share of the batch."""
    loss = torch.stack([share * output.loss for share, output in parts]).sum()
    first = parts[0][1]
    losses = {
        key: torch.stack([share * output.level_losses[key] for share, output in parts]).sum()
        for key in first.level_losses
    }
    embeddings = {key: torch.cat([output.embeddings[key] for _, output in parts]) for key in first.embeddings}
    return VideoOutput(loss, losses, embeddings)
