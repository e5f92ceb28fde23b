"""V-JEPA 2: released checkpoints as models of this package."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from hjepa_models._validation import coerce_choice
from hjepa_models.config import Branch, HJEPAConfig, Targets
from hjepa_models.converters._mapping import Slot, check_names, load_slots
from hjepa_models.converters._released import (
    REMEDY,
    count_blocks,
    encoder_slots,
    known_heads,
    mlp_ratio,
    predictor_slots,
    read_parts,
    shape_of,
)
from hjepa_models.encoder import Encoder, EncoderConfig
from hjepa_models.hjepa import HJEPA
from hjepa_models.layers.positions import Position
from hjepa_models.objectives import LevelWeightsConfig, Objective
from hjepa_models.predictor import PredictorConfig, PredictorMode
from hjepa_models.pyramid import Fpn, PyramidConfig

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 22, 1664: 26}
"""Attention heads of each released width: L 1024, H 1280, g 1408; the others are sizes that the code names."""

PREDICTOR_HEADS = {384: 12}
"""Attention heads of the released predictors."""

SOURCE = "V-JEPA 2 checkpoint"


def from_vjepa2(
    checkpoint: Mapping[str, Any],
    *,
    image_size: tuple[int, int, int] = (64, 256, 256),
    num_heads: int | None = None,
    predictor_heads: int | None = None,
    mask_token: int = 0,
    drop: Collection[str] = (),
) -> HJEPA:
    """Return a released V-JEPA 2 checkpoint, both branches and the predictor, as a model of clips [B, C, T, H, W].

    The weights are read by the user, without code from the file::

        checkpoint = torch.load("vitl.pt", map_location="cpu", weights_only=True)
        model = from_vjepa2(checkpoint, image_size=(16, 256, 256)).eval()
        features = model.features(clips)  # of the target encoder, the one that the paper evaluates

    Positions turn queries and keys by the rotation of the released code (`rope_legacy`), defect included. All weights
    of the encoders map. The released predictor has several mask tokens, of which its training used the first alone: one
    is kept. All targets of a clip are predicted in one sequence. The released training scored two kinds of masks per
    clip, each with its own context; a step of this model scores one.

    Left out are the other `mask_tokens`, the tables `pos_embed` and `predictor_pos_embed` (saved by some runs, of no
    use with rotary positions) and the state of the run: `opt`, `scaler`, `epoch`, `loss`, `batch_size`, `world_size`,
    `lr`.

    Args:
        checkpoint: has `encoder`, `target_encoder` and `predictor`; prefixes of wrappers are taken off.
        image_size: (T, H, W) in frames and pixels, which no tensor shows. The released code counts positions in tokens
            at every size, this package interpolates them on the grid of this size: give the size of the clips.
        num_heads: attention heads, which no tensor shows; None takes those of the released size of this width.
        predictor_heads: likewise of the predictor.
        mask_token: which of the mask tokens is kept.
        drop: names of keys, as the error lists them, that may be lost.

    Returns:
        The model, in training mode as any new one.

    Raises:
        ValueError: for keys that are missing, unknown or of another shape, each listed, or an unknown width. The
            action-conditioned checkpoint has another predictor: take its encoder by `encoder_from_vjepa2`.

    Source:
        Assran et al. 2025 (arXiv 2506.09985) and its released code.
    """
    left_out = {"encoder.pos_embed", "target_encoder.pos_embed", "predictor.predictor_pos_embed", *drop}
    state = read_parts(checkpoint, ("encoder", "target_encoder", "predictor"), left_out, SOURCE)
    kept = f"predictor.mask_tokens.{mask_token}"
    state = {name: value for name, value in state.items() if name == kept or not _is_mask_token(name)}
    depth, predictor_depth = count_blocks(state, "encoder.blocks."), count_blocks(state, "predictor.predictor_blocks.")
    slots = {
        **encoder_slots("encoder.", depth, "encoder."),
        **encoder_slots("target_encoder.", depth, "target_encoder."),
        **predictor_slots(predictor_depth),
        kept: Slot("predictor.mask_token"),
    }
    check_names(SOURCE, state, slots, REMEDY)
    width = shape_of(state, "predictor.predictor_embed.weight", "width embed_dim", SOURCE)[0]
    predictor = PredictorConfig(
        depth=predictor_depth,
        embed_dim=width,
        num_heads=known_heads("predictor_heads", predictor_heads, width, PREDICTOR_HEADS),
        mode=PredictorMode.joint,
        mlp_ratio=mlp_ratio(state, "predictor.predictor_blocks", width, SOURCE),
    )
    config = HJEPAConfig(
        encoder=_encoder_config(state, "encoder.", depth, num_heads, image_size),
        predictor=predictor,
        pyramid=PyramidConfig(levels=1, fpn=Fpn.none, projection=False, output_norm=False),
        targets=Targets.pooled,
        objective=Objective.l1,
        level_weights=LevelWeightsConfig(weights=(1.0,)),
    )
    model = config.build(device="meta")
    load_slots(model, state, slots, SOURCE)
    return model


def encoder_from_vjepa2(
    checkpoint: Mapping[str, Any],
    *,
    branch: Branch | str = Branch.target,
    image_size: tuple[int, int, int] = (64, 256, 256),
    num_heads: int | None = None,
    drop: Collection[str] = (),
) -> Encoder:
    """Return one encoder of a released V-JEPA 2 checkpoint; the rest of the checkpoint is left alone.

    Args:
        checkpoint: as for `from_vjepa2`; only the entry of the branch has to be there.
        branch: `target` (the one that the paper evaluates) or `online`.
        image_size: as for `from_vjepa2`.
        num_heads: as for `from_vjepa2`.
        drop: as for `from_vjepa2`.

    Returns:
        The encoder.

    Raises:
        ValueError: as `from_vjepa2`.
    """
    part = "target_encoder" if coerce_choice(Branch, "branch", branch) is Branch.target else "encoder"
    state = read_parts(checkpoint, (part,), {f"{part}.pos_embed", *drop}, SOURCE)
    depth = count_blocks(state, f"{part}.blocks.")
    slots = encoder_slots(f"{part}.", depth, "")
    check_names(SOURCE, state, slots, REMEDY)
    encoder = _encoder_config(state, f"{part}.", depth, num_heads, image_size).build(device="meta")
    load_slots(encoder, state, slots, SOURCE)
    return encoder


def _is_mask_token(name: str) -> bool:
    return name.startswith("predictor.mask_tokens.")


def _encoder_config(
    state: Mapping[str, Tensor], part: str, depth: int, num_heads: int | None, image_size: tuple[int, int, int]
) -> EncoderConfig:
    width, channels, *patch = shape_of(
        state, f"{part}patch_embed.proj.weight", "width channels tubelet patch patch", SOURCE
    )
    return EncoderConfig(
        image_size=image_size,
        patch_size=tuple(patch),
        in_channels=channels,
        embed_dim=width,
        depth=depth,
        num_heads=known_heads("num_heads", num_heads, width, HEADS),
        mlp_ratio=mlp_ratio(state, f"{part}blocks", width, SOURCE),
        position=Position.rope,
        rope_theta=10_000.0,
        rope_legacy=True,
    )
