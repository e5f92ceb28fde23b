"""What a step is given, checked before it runs: views, masks and crops that fit one another."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hjepa_models.config import HJEPAConfig
from hjepa_models.grid import Grid, num_tokens


def check_views(config: HJEPAConfig, views: Sequence[Tensor]) -> None:
    """Refuse too few views, and views that are not of the same images."""
    needed = max(config.masked_views, 2 if config.encodes_views else 1)
    if len(views) < needed:
        raise ValueError(
            f"views: {len(views)} given; allowed: {needed} or more with masked_views={config.masked_views}, "
            f"prediction={config.prediction} and {'a' if config.global_level is not None else 'no'} global "
            "level; give more or change the model"
        )
    shapes = [tuple(view.shape) for view in views]
    masked = shapes[: config.masked_views]
    scattered = shapes[0] in shapes[count_whole(views) :]
    if len({len(view) for view in views}) > 1 or len(set(masked)) > 1 or scattered:
        raise ValueError(
            f"views of shapes {', '.join(map(str, shapes))}: do not fit one another; allowed: as many images in "
            f"each, one shape for the first masked_views={len(masked)}, and views of other shapes than the first last; "
            "give views of the same images"
        )


def count_whole(views: Sequence[Tensor]) -> int:
    """Return how many views are not small: those that come before the first of another shape."""
    for number, view in enumerate(views):  # a loop, since torch 2.11 compiles no takewhile
        if view.shape != views[0].shape:
            return number
    return len(views)


def check_masks(grid: Grid, context_index: Int[Tensor, "R Kc"], target_index: Int[Tensor, "R M Kt"]) -> None:
    """Refuse masks of other axes, without tokens, or off the grid; `spread_masks` checks their rows."""
    if context_index.ndim != 2 or target_index.ndim != 3 or 0 in target_index.shape[1:]:
        raise ValueError(
            f"masks of shapes {tuple(context_index.shape)} and {tuple(target_index.shape)}: no places to predict; "
            "allowed: context [rows, tokens] and target [rows, blocks, tokens], 1 or more of these; check the masks"
        )
    if not _can_be_read(context_index):
        return  # A device's own assertion meets places off the grid.
    count = num_tokens(grid)
    for name, index in (("context", context_index), ("target", target_index)):
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < count:
            raise ValueError(
                f"{name} masks name places {int(index.min())} to {int(index.max())}: not all on the grid {grid}; "
                f"allowed: 0 to {count - 1}; draw masks for this grid"
            )


def spread_masks(
    context_index: Int[Tensor, "R Kc"], target_index: Int[Tensor, "R M Kt"], views: int, batch: int
) -> tuple[Tensor, Tensor, int]:
    """Return masks with one row for each masked image, and how many images of each view those are.

    Args:
        context_index: places of the visible patches; a row for each image of each view, or for the first images of all.
        target_index: places of the hidden patches, likewise.
        views: how many views are masked.
        batch: images of a view.
    """
    given = len(context_index)
    if len(target_index) == given and given == views * batch:
        return context_index, target_index, batch
    if len(target_index) != given or not 0 < given <= batch:
        raise ValueError(
            f"masks: {given} context and {len(target_index)} target rows for a batch of {batch}; "
            f"allowed: equal counts, {views * batch} or 1 to {batch}; draw masks for this batch"
        )
    return context_index.repeat(views, 1), target_index.repeat(views, 1, 1), given


def pair_of_crops(views: Sequence[Tensor], crops: Sequence[Float[Tensor, "B 5"]] | None) -> Float[Tensor, "2 B 5"]:
    """Return where the first two views were cut."""
    if not crops:
        raise ValueError("crops: none given; prediction=view has to know where views were cut; give the batch's")
    sizes = [tuple(view.shape) for view in views[:2]]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"views of shapes {sizes[0]} and {sizes[1]}: one is not predicted from the other; allowed: one shape; "
            "check the first two views"
        )
    shapes = [tuple(one.shape) for one in crops[:2]]
    if shapes != [(len(views[0]), 5)] * 2:
        raise ValueError(
            f"crops of shapes {', '.join(map(str, shapes))}: do not fit {len(views[0])} images; allowed: "
            "[batch, 5] for each view; give left, top, width, height and mirrored"
        )
    pair = torch.stack(list(crops[:2]))
    if _can_be_read(pair) and not (pair[..., 2:4] > 0).all():
        raise ValueError("crops: a width or height is not above 0; allowed: parts of the image, up to 1; check them")
    return pair


def _can_be_read(tensor: Tensor) -> bool:
    """Tell whether the values of a tensor cost nothing to read: not on another device, nor where a step is traced."""
    return tensor.is_cpu and type(tensor) is Tensor and not torch.compiler.is_compiling()
