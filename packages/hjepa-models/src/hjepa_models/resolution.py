"""A model at another resolution than the one that it was trained at."""

import dataclasses
from enum import StrEnum

import torch
from torch import Tensor

from hjepa_models._validation import coerce_choice
from hjepa_models.config import HJEPAConfig
from hjepa_models.encoder import EncoderConfig
from hjepa_models.grid import Grid
from hjepa_models.hjepa import HJEPA
from hjepa_models.initialization import construct
from hjepa_models.layers.positions import TABLES, table_resampling
from hjepa_models.pooling import pooling_grid
from hjepa_models.pretrained import load_state, plain_state
from hjepa_models.pyramid import PyramidConfig


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
        ValueError: for a size that the patches cannot tile, tables that would have to extend, positions that were
            interpolated before and cannot extend to it, or weights that are no plain tensors.
    """
    positions = coerce_choice(PositionResize, "positions", positions)
    old = model.config.encoder
    if positions is PositionResize.extend and old.position in TABLES:
        raise ValueError(
            f"positions=extend: position={old.position} is a table that says nothing of places beyond it; "
            "allowed: interpolate; choose that"
        )
    encoder = _encoder_at(old, image_size, positions)
    pyramid = _pyramid_at(model, encoder, positions)
    config: HJEPAConfig = dataclasses.replace(model.config, encoder=encoder, pyramid=pyramid)
    state = {
        key: _resample(value, old, encoder) if key.endswith("positions.table") else value
        for key, value in plain_state(model).items()
    }
    first = next(model.parameters())
    resized = construct(lambda: HJEPA(config), 0, first.device).to(first.dtype)
    load_state(resized, state, f"model at {image_size}")
    for name, parameter in model.named_parameters():
        resized.get_parameter(name).requires_grad_(parameter.requires_grad)
    return resized.train(model.training)


def _encoder_at(old: EncoderConfig, image_size: tuple[int, ...], positions: PositionResize) -> EncoderConfig:
    """Return the config of the encoder at another image size; a table gets the new grid, all else a reference."""
    encoder = dataclasses.replace(old, image_size=image_size, position_grid=())
    if old.position in TABLES:
        return encoder
    before = old.position_grid or old.grid
    return dataclasses.replace(encoder, position_grid=_reference(before, old.grid, encoder.grid, positions))


def _pyramid_at(model: HJEPA, encoder: EncoderConfig, positions: PositionResize) -> PyramidConfig:
    """Return the config of the pyramid of another encoder: attention between its levels looks at places."""
    old = model.config.pyramid
    if not old.attention_heads:
        return old
    was, now = (pooling_grid(one.output_grid, old.pooling) for one in (model.config.encoder, encoder))
    return dataclasses.replace(old, position_grid=_reference(model.pyramid.reference, was, now, positions))


def _reference(before: Grid, was: Grid, now: Grid, positions: PositionResize) -> Grid:
    """Return the grid that positions of the grid `now` are counted on, empty for itself; `before` served `was`."""
    if positions is PositionResize.interpolate:
        return before
    # Distances stay: the reference grows with the grid, which changes nothing where it was the grid itself.
    if any(reference * new % old for reference, new, old in zip(before, now, was, strict=True)):
        raise ValueError(
            f"positions=extend: {before} positions over {was} tokens make no whole number over {now}; "
            "allowed: sizes that do; choose another image size, or interpolate"
        )
    grown = tuple(reference * new // old for reference, new, old in zip(before, now, was, strict=True))
    return () if grown == now else grown


def _resample(table: Tensor, old: EncoderConfig, new: EncoderConfig) -> Tensor:
    before, after = (config.position_grid or config.grid for config in (old, new))
    matrix = table_resampling(old.position, after, before, table.device)
    return (matrix.to(torch.float64) @ table.to(torch.float64)).to(table.dtype)
