"""A model at another resolution than the one that it was trained at."""

import dataclasses
from enum import StrEnum

import torch
from torch import Tensor

from hjepa_models._validation import coerce_choice
from hjepa_models.config import HJEPAConfig
from hjepa_models.encoder import EncoderConfig
from hjepa_models.grid import Grid, resampling_matrix
from hjepa_models.hjepa import HJEPA
from hjepa_models.initialization import construct
from hjepa_models.layers.positions import TABLES, Position, offset_resampling
from hjepa_models.pretrained import load_state


class PositionResize(StrEnum):
    """What positions do when a grid changes.

    `interpolate`: the new grid spans the extent of the old one; tables are interpolated, rotations and fixed embeddings
    are taken at fractions of a token. `extend`: tokens keep their distance, the new grid reaches further; not for
    tables, which say nothing of places beyond them.
    """

    interpolate = "interpolate"
    extend = "extend"


def at_resolution(
    model: HJEPA, image_size: tuple[int, ...], positions: PositionResize | str = PositionResize.interpolate
) -> HJEPA:
    """Return a copy of a model for another image size, with all its other weights.

    A model takes images of another size as it is, with interpolated positions; this makes that size its own, so that it
    can be trained on there (tables have one row for each new token) and so that positions may extend instead.

    Args:
        model: any; it is left as it is.
        image_size: pixels per axis.
        positions: `interpolate` or `extend`.

    Returns:
        The model, on the device and in the mode of the given one.

    Raises:
        ValueError: for a size that the patches cannot tile, or tables that would have to extend.
    """
    positions = coerce_choice(PositionResize, "positions", positions)
    old = model.config.encoder
    if positions is PositionResize.extend and old.position in TABLES:
        raise ValueError(
            f"positions=extend: position={old.position} is a table that says nothing of places beyond it; "
            "allowed: interpolate; choose that"
        )
    encoder = _encoder_at(old, image_size, positions)
    config: HJEPAConfig = dataclasses.replace(model.config, encoder=encoder)
    state = {
        key: _resample(value, old, encoder) if key.endswith("positions.table") else value
        for key, value in model.state_dict().items()
    }
    first = next(model.parameters())
    resized = construct(lambda: HJEPA(config), 0, first.device).to(first.dtype)
    load_state(resized, state, f"model at {image_size}")
    return resized.train(model.training)


def _encoder_at(old: EncoderConfig, image_size: tuple[int, ...], positions: PositionResize) -> EncoderConfig:
    """Return the config of the encoder at another image size; a table gets the new grid, all else a reference."""
    encoder = dataclasses.replace(old, image_size=tuple(image_size), position_grid=())
    if old.position in TABLES:
        return encoder
    before = old.position_grid or old.grid
    if positions is PositionResize.interpolate:
        return dataclasses.replace(encoder, position_grid=before)
    # Distances stay: the reference grows with the grid, which changes nothing where it was the grid itself.
    grown = tuple(max(1, round(ref * new / was)) for ref, new, was in zip(before, encoder.grid, old.grid, strict=True))
    return dataclasses.replace(encoder, position_grid=() if grown == encoder.grid else grown)


def _resample(table: Tensor, old: EncoderConfig, new: EncoderConfig) -> Tensor:
    before, after = (config.position_grid or config.grid for config in (old, new))
    matrix = _table_resampling(old.position, before, after, table.device)
    return (matrix.to(torch.float64) @ table.to(torch.float64)).to(table.dtype)


def _table_resampling(kind: Position, before: Grid, after: Grid, device: torch.device) -> Tensor:
    if kind is Position.relative:
        return offset_resampling(after, before, device)
    return resampling_matrix(after, before, device)
