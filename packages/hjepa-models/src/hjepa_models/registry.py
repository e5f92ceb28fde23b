"""Encoders by name: `vit_<size>_patch<pixels>`."""

import re
from dataclasses import fields

from hjepa_models._validation import suggestion
from hjepa_models.encoder import EncoderConfig

SIZES: dict[str, tuple[int, int, int, float]] = {
    "nano": (128, 2, 4, 4.0),
    "tiny": (192, 12, 3, 4.0),
    "small": (384, 12, 6, 4.0),
    "base": (768, 12, 12, 4.0),
    "large": (1024, 24, 16, 4.0),
    "huge": (1280, 32, 16, 4.0),
    "giant": (1408, 40, 16, 48 / 11),
}
"""Width, depth, heads and MLP ratio of each size."""

LISTED_PATCHES = (4, 8, 14, 16)


def list_models() -> list[str]:
    """Return the usual names; any other patch size works as well."""
    return [f"vit_{size}_patch{patch}" for size in SIZES for patch in LISTED_PATCHES]


def encoder_config(name: str, **overrides: object) -> EncoderConfig:
    """Return the config of a named encoder, 224 x 224 pixels unless overridden.

    >>> encoder_config("vit_nano_patch4", image_size=(32, 32)).grid
    (8, 8)

    Args:
        name: `vit_{nano,tiny,small,base,large,huge,giant}_patch<P>` with any P.
        overrides: fields of `EncoderConfig`.

    Returns:
        The config.

    Raises:
        ValueError: for an unknown name or field, with the nearest one.
    """
    match = re.fullmatch(r"vit_([a-z]+)_patch([1-9]\d*)", name)
    if match is None or match[1] not in SIZES:
        raise ValueError(
            f"model={name!r}: unknown encoder; allowed: vit_{{{','.join(SIZES)}}}_patch<pixels>"
            f"{suggestion(name, list_models())}"
        )
    known = [field.name for field in fields(EncoderConfig)]
    for key in overrides:
        if key not in known:
            raise ValueError(f"{key}: no field of an encoder; allowed: {', '.join(known)}{suggestion(key, known)}")
    width, depth, heads, ratio = SIZES[match[1]]
    patch = int(match[2])
    named: dict[str, object] = {
        "patch_size": (patch, patch),
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": ratio,
    }
    return EncoderConfig(**(named | overrides))  # type: ignore[arg-type]
