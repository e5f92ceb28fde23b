"""I-JEPA: released checkpoints as models of this package."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from hjepa_models._validation import check_axes, coerce_choice
from hjepa_models.config import Branch, HJEPAConfig, Targets
from hjepa_models.converters._mapping import Slot, check_names, load_slots
from hjepa_models.converters._released import (
    REMEDY,
    count_blocks,
    drop_batch,
    encoder_slots,
    known_heads,
    mlp_ratio,
    predictor_slots,
    read_parts,
    shape_of,
)
from hjepa_models.encoder import Encoder, EncoderConfig, check_image_size, tokens_per_axis
from hjepa_models.grid import num_tokens
from hjepa_models.hjepa import HJEPA
from hjepa_models.layers.positions import Position
from hjepa_models.objectives import LevelWeightsConfig, Objective
from hjepa_models.predictor import PredictorConfig, PredictorMode
from hjepa_models.pyramid import Fpn, PyramidConfig

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
"""Attention heads of each released width, of the predictor as well."""

SOURCE = "I-JEPA checkpoint"


def from_ijepa(
    checkpoint: Mapping[str, Any],
    *,
    num_heads: int | None = None,
    predictor_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    drop: Collection[str] = (),
) -> HJEPA:
    """Return a released I-JEPA checkpoint, both branches and the predictor, as a model that can be trained on.

    The weights are read by the user, without code from the file::

        checkpoint = torch.load("IN1K-vit.h.14-300e.pth.tar", map_location="cpu", weights_only=True)
        model = from_ijepa(checkpoint).eval()
        features = model.features(images)  # of the target encoder, the one that the paper evaluates

    The model has one level and predicts each target block on its own; a token in several blocks is scored in each.
    Position tables come from the checkpoint, whatever the order of their axes, and stay fixed as they were:
    `requires_grad` is off (no file keeps that: a model that was saved and loaded has it on). Left out is the state of
    the run: `opt`, `scaler`, `epoch`, `loss`, `batch_size`, `world_size`, `lr`.

    Args:
        checkpoint: has `encoder`, `target_encoder` and `predictor`; prefixes of data parallelism are taken off.
        num_heads: attention heads, which no tensor shows; None takes those of the released size of this width.
        predictor_heads: likewise of the predictor; None takes those of the encoder.
        image_size: pixels (H, W); None means a square.
        drop: names of keys, as the error lists them, that may be lost.

    Returns:
        The model, in training mode as any new one.

    Raises:
        ValueError: for keys that are missing, unknown or of another shape, each listed, or an unknown width.

    Source:
        Assran et al. 2023 (arXiv 2301.08243) and its released code.
    """
    state = read_parts(checkpoint, ("encoder", "target_encoder", "predictor"), drop, SOURCE)
    depth, predictor_depth = count_blocks(state, "encoder.blocks."), count_blocks(state, "predictor.predictor_blocks.")
    slots = {
        **_encoder_slots("encoder.", depth, "encoder."),
        **_encoder_slots("target_encoder.", depth, "target_encoder."),
        **predictor_slots(predictor_depth),
        "predictor.mask_token": Slot("predictor.mask_token"),
        "predictor.predictor_pos_embed": Slot("predictor.positions.table", drop_batch),
    }
    check_names(SOURCE, state, slots, REMEDY)
    encoder = _encoder_config(state, "encoder.", depth, num_heads, image_size)
    width = shape_of(state, "predictor.predictor_embed.weight", "width embed_dim", SOURCE)[0]
    predictor = PredictorConfig(
        depth=predictor_depth,
        embed_dim=width,
        num_heads=encoder.num_heads if predictor_heads is None else predictor_heads,
        mode=PredictorMode.per_block,
        mlp_ratio=mlp_ratio(state, "predictor.predictor_blocks", width, SOURCE),
    )
    config = HJEPAConfig(
        encoder=encoder,
        predictor=predictor,
        pyramid=PyramidConfig(levels=1, fpn=Fpn.none, projection=False, output_norm=False),
        targets=Targets.pooled,
        objective=Objective.smooth_l1,
        level_weights=LevelWeightsConfig(weights=(1.0,)),
    )
    model = config.build(device="meta")
    load_slots(model, state, slots, SOURCE)
    for part in (model.encoder, model.predictor):
        part.positions.table.requires_grad_(False)
    return model


def encoder_from_ijepa(
    checkpoint: Mapping[str, Any],
    *,
    branch: Branch | str = Branch.target,
    num_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    drop: Collection[str] = (),
) -> Encoder:
    """Return one encoder of a released I-JEPA checkpoint; the rest of the checkpoint is left alone.

    Args:
        checkpoint: as for `from_ijepa`; only the entry of the branch has to be there.
        branch: `target` (the one that the paper evaluates) or `online`.
        num_heads: as for `from_ijepa`.
        image_size: as for `from_ijepa`.
        drop: as for `from_ijepa`.

    Returns:
        The encoder; its position table is fixed.

    Raises:
        ValueError: as `from_ijepa`.
    """
    part = "target_encoder" if coerce_choice(Branch, "branch", branch) is Branch.target else "encoder"
    state = read_parts(checkpoint, (part,), drop, SOURCE)
    depth = count_blocks(state, f"{part}.blocks.")
    slots = _encoder_slots(f"{part}.", depth, "")
    check_names(SOURCE, state, slots, REMEDY)
    encoder = _encoder_config(state, f"{part}.", depth, num_heads, image_size).build(device="meta")
    load_slots(encoder, state, slots, SOURCE)
    encoder.positions.table.requires_grad_(False)
    return encoder


def _encoder_slots(part: str, depth: int, key: str) -> dict[str, Slot]:
    return encoder_slots(part, depth, key) | {f"{part}pos_embed": Slot(f"{key}positions.table", drop_batch)}


def _encoder_config(
    state: Mapping[str, Tensor], part: str, depth: int, num_heads: int | None, image_size: tuple[int, int] | None
) -> EncoderConfig:
    width, channels, *patch = shape_of(state, f"{part}patch_embed.proj.weight", "width channels patch patch", SOURCE)
    count = shape_of(state, f"{part}pos_embed", "1 tokens width", SOURCE)[1]
    side = math.isqrt(count)
    if image_size is None:
        image_size = (side * patch[0], side * patch[1])
    check_image_size("image_size", check_axes("image_size", image_size), tuple(patch))
    if num_tokens(tokens_per_axis(image_size, tuple(patch))) != count:
        raise ValueError(
            f"image_size={image_size}: has no {count} patches of {patch[0]} x {patch[1]} pixels as {part}pos_embed; "
            f"allowed: H * W = {count * patch[0] * patch[1]}; give image_size"
        )
    return EncoderConfig(
        image_size=image_size,
        patch_size=tuple(patch),
        in_channels=channels,
        embed_dim=width,
        depth=depth,
        num_heads=known_heads("num_heads", num_heads, width, HEADS),
        mlp_ratio=mlp_ratio(state, f"{part}blocks", width, SOURCE),
        position=Position.learned,
    )
