"""Filling a model from a state dict with other names, key by key."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn


class Slot(NamedTuple):
    """Where a foreign tensor goes."""

    key: str
    convert: Callable[[Tensor], Tensor] = Tensor.detach


def listed(names: Iterable[str]) -> str:
    """Return names for an error, separated by commas."""
    return ", ".join(names) or "none"


def check_names(source: str, given: Collection[str], wanted: Collection[str], remedy: str) -> None:
    """Refuse a state dict that lacks a key or has one too many, and list each."""
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    if missing or unexpected:
        raise ValueError(
            f"{source}: does not fit; missing: {listed(missing)}; unexpected: {listed(unexpected)}; "
            f"allowed: exactly the keys of this layout; {remedy}"
        )


def load_slots(model: nn.Module, state: Mapping[str, Tensor], slots: Mapping[str, Slot], source: str) -> None:
    """Fill a model built on meta with converted copies of the tensors, in their dtype and on their device.

    Args:
        model: receives all of its state.
        state: foreign tensors; every key has a slot.
        slots: one slot per key of `state`, which together cover the state of `model`.
        source: what the tensors came from, for errors.

    Raises:
        ValueError: for shapes that differ, each listed under its foreign name.
    """
    wanted = model.state_dict()
    found = {slot.key: slot.convert(state[name].detach()) for name, slot in slots.items()}
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    shapes = [
        f"{name} {tuple(found[slot.key].shape)} for {tuple(wanted[slot.key].shape)}"
        for name, slot in slots.items()
        if found[slot.key].shape != wanted[slot.key].shape
    ]
    if shapes:
        raise ValueError(
            f"{source}: does not fit; other shapes: {listed(shapes)}; "
            f"allowed: one width, depth and patch size throughout; check the file"
        )
    model.load_state_dict({key: value.clone().contiguous() for key, value in found.items()}, assign=True)


def linear_slots(name: str, key: str) -> dict[str, Slot]:
    """Return the slots of weight and bias."""
    return {f"{name}.{part}": Slot(f"{key}.{part}") for part in ("weight", "bias")}


def flatten_kernel(kernel: Tensor) -> Tensor:
    """Return a convolution that tiles the pixels as a linear map on (channel, axis 0, axis 1, ...)."""
    return kernel.flatten(1) if kernel.ndim > 1 else kernel


def exact_ratio(hidden: int, width: int) -> float:
    """Return the ratio for which `int(width * ratio)` is `hidden`, in spite of rounding.

    >>> int(49 * (1 / 49)), int(49 * exact_ratio(1, 49))
    (0, 1)
    """
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
