"""The layout that the released checkpoints of I-JEPA and V-JEPA 2 share."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from hjepa_models.converters._mapping import Slot, exact_ratio, flatten_kernel, linear_slots, listed

ENTRIES = ("encoder", "target_encoder", "predictor")
"""The parts of a checkpoint that hold weights."""

TRAINING_STATE = ("opt", "scaler", "epoch", "loss", "batch_size", "world_size", "lr")
"""The parts of a checkpoint that are left out: the state of the run that wrote it."""

WRAPPERS = ("module.", "backbone.")
"""Prefixes that data parallelism and the multi-sequence wrapper put before every key of a part."""

REMEDY = "check the file, or name in drop what may be lost"


def read_parts(
    checkpoint: Mapping[str, Any], parts: Collection[str], drop: Collection[str], source: str
) -> dict[str, Tensor]:
    """Return the tensors of some parts in one flat dict, `<part>.<key>`, without wrappers.

    Args:
        checkpoint: as it was saved.
        parts: the entries wanted; other entries of weights are left alone.
        drop: names of entries and of flat keys that may be lost.
        source: for errors.

    Returns:
        Tensors by flat name.

    Raises:
        ValueError: for missing or unknown entries, or values that are no tensors.
    """
    missing = [part for part in parts if part not in checkpoint]
    known = {*ENTRIES, *TRAINING_STATE, *drop}
    unexpected = [str(name) for name in checkpoint if name not in known]
    if missing or unexpected:
        raise ValueError(
            f"{source}: does not fit; missing: {listed(missing)}; unexpected: {listed(unexpected)}; "
            f"allowed: {', '.join((*ENTRIES, *TRAINING_STATE))}; {REMEDY}"
        )
    state: dict[str, Tensor] = {}
    for part in parts:
        if not isinstance(checkpoint[part], Mapping):
            raise ValueError(
                f"{source}: {part} is a {type(checkpoint[part]).__name__}; allowed: a state dict; check the file"
            )
        entry = dict(checkpoint[part])
        for wrapper in WRAPPERS:
            if entry and all(name.startswith(wrapper) for name in entry):
                entry = {name.removeprefix(wrapper): value for name, value in entry.items()}
        state |= {f"{part}.{name}": value for name, value in entry.items() if f"{part}.{name}" not in drop}
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(f"{source}: no tensors: {listed(strange)}; allowed: tensors; {REMEDY}")
    return state


def count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    """Return how many blocks have keys below `prefix`, at least 1."""
    numbers = {match[1] for name in state if (match := re.match(re.escape(prefix) + r"(\d+)\.", name))}
    return max(len(numbers), 1)


def transformer_slots(blocks: str, norm: str, depth: int, key: str) -> dict[str, Slot]:
    """Return the slots of a stack of blocks and its final norm."""
    slots = linear_slots(norm, f"{key}.norm")
    for layer in range(depth):
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            slots |= linear_slots(f"{blocks}.{layer}.{part}", f"{key}.blocks.{layer}.{part}")
    return slots


def encoder_slots(part: str, depth: int, key: str) -> dict[str, Slot]:
    """Return the slots of an encoder without its positions; `part` and `key` end with a dot or are empty."""
    slots = linear_slots(f"{part}patch_embed.proj", f"{key}stem.proj")
    slots[f"{part}patch_embed.proj.weight"] = Slot(f"{key}stem.proj.weight", flatten_kernel)
    return slots | transformer_slots(f"{part}blocks", f"{part}norm", depth, f"{key}transformer")


def predictor_slots(depth: int) -> dict[str, Slot]:
    """Return the slots of a predictor in a whole model, without positions and mask tokens."""
    return (
        linear_slots("predictor.predictor_embed", "predictor.input")
        | linear_slots("predictor.predictor_proj", "predictor.output")
        | transformer_slots("predictor.predictor_blocks", "predictor.predictor_norm", depth, "predictor.transformer")
    )


def drop_batch(table: Tensor) -> Tensor:
    """Return a table saved with a leading axis of 1 without it."""
    return table[0] if table.ndim > 1 and len(table) == 1 else table


def shape_of(state: Mapping[str, Tensor], name: str, axes: str, source: str) -> tuple[int, ...]:
    """Return a shape that has the given axes, or refuse."""
    shape = tuple(state[name].shape)
    if len(shape) != len(axes.split()):
        raise ValueError(
            f"{source}: does not fit; other shapes: {name} {shape}; allowed: ({', '.join(axes.split())}); "
            "check the file"
        )
    return shape


def mlp_ratio(state: Mapping[str, Tensor], blocks: str, width: int, source: str) -> float:
    """Return the hidden width of the first block over `width`."""
    return exact_ratio(shape_of(state, f"{blocks}.0.mlp.fc1.weight", "hidden width", source)[0], width)


def known_heads(field: str, given: int | None, width: int, table: Mapping[int, int]) -> int:
    """Return the attention heads, which no tensor shows: those given, else those of the released size."""
    if given is not None:
        return given
    if width not in table:
        sizes = ", ".join(f"{size} ({heads} heads)" for size, heads in table.items())
        raise ValueError(f"{field}=None: width {width} is no released size; allowed: {sizes}; give {field}")
    return table[width]
