"""Open whatever a text names: shards, a folder of images, a data set of Hugging Face or torchvision."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping

from hjepa_data.errors import DataError, one_line
from hjepa_data.shards.cache import CacheConfig
from hjepa_data.shards.patterns import Pattern
from hjepa_data.shards.source import ShardSource
from hjepa_data.sources.base import Source
from hjepa_data.sources.folder import FolderSource
from hjepa_data.sources.hugging_face import HuggingFaceSource, load_splits
from hjepa_data.sources.layout import find_images
from hjepa_data.sources.torchvision import TorchvisionSource, load_split

__all__ = ["is_adapter", "open_adapter", "open_source"]

_ADAPTER = re.compile(r"(hf|torchvision):(?!//)")
# The name may hold colons, the split holds one in its brackets only: train[:10%].
_HF = re.compile(r"hf:(.+?)(?::([^:/\[]+(?:\[.*\])?))?")
_TORCHVISION = re.compile(r"torchvision:(\w+):(.+?)(?::(\w+))?")


def open_source(pattern: Pattern, *, cache: CacheConfig | None = None) -> Source:
    """Open the samples that a pattern names.

    Args:
        pattern: ``hf:NAME[:SPLIT]``, ``torchvision:CLASS:ROOT[:SPLIT]``, a folder of images (flat, or one folder a
            class), or what ``ShardSource`` understands: a folder of shards, braces, a glob, a list file, URLs.
        cache: of remote shards.

    Returns:
        The source.

    Raises:
        DataError: there is nothing of the kind, a folder holds both shards and images, or there are several splits.
    """
    if isinstance(pattern, str | os.PathLike):
        text = os.path.expanduser(os.fspath(pattern))
        if is_adapter(text):
            splits = open_adapter(text)
            if len(splits) > 1:
                raise DataError(
                    f"'{text}' has the splits {', '.join(splits)}; give one of them: '{text}:{next(iter(splits))}'"
                )
            return next(iter(splits.values()))
        if os.path.isdir(text) and _holds_images(text):
            return FolderSource(text)
    return ShardSource(pattern, cache=cache)


def is_adapter(text: str) -> bool:
    """Say whether a text names a data set of Hugging Face or torchvision."""
    return _ADAPTER.match(text) is not None


def open_adapter(text: str) -> Mapping[str, HuggingFaceSource | TorchvisionSource]:
    """Open a data set of Hugging Face or torchvision.

    Args:
        text: ``hf:NAME[:SPLIT]`` or ``torchvision:CLASS:ROOT[:SPLIT]``.

    Returns:
        Sources by the names of their splits.

    Raises:
        DataError: there is no such data set, or it is no set of images.
    """
    try:
        if text.startswith("hf:") and (match := _HF.fullmatch(text)):
            name, split = match.groups()
            if split is not None and os.path.isdir(f"{name}:{split}"):
                name, split = f"{name}:{split}", None
            return load_splits(os.path.expanduser(name), split)
        if match := _TORCHVISION.fullmatch(text):
            kind, root, split = match.groups()
            return {split or "train": load_split(kind, os.path.expanduser(root), split)}
    except DataError as error:
        raise DataError(one_line(error)) from None
    raise DataError(f"'{text}' names no data set; allowed: hf:NAME[:SPLIT], torchvision:CLASS:ROOT[:SPLIT]")


def _holds_images(folder: str) -> bool:
    """Tell a folder of images from one of shards by what lies there."""
    shards = sum(name.endswith(".tar") and not name.startswith(".") for name in os.listdir(folder))
    image = next(find_images(folder, Counter()), None)
    if shards and image is not None:
        raise DataError(
            f"'{folder}' holds {shards} *.tar and images such as '{image}'; name the shards, '{folder}/*.tar', or move "
            "one of them"
        )
    if not shards and image is None:
        raise DataError(f"'{folder}' holds neither shards (*.tar) nor images; give a folder of one of them")
    return image is not None
