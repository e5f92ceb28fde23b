"""Data sets of Hugging Face ``datasets``, their images undecoded."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import numpy as np

from hjepa_data.errors import DataError
from hjepa_data.shards.index import Int64Array
from hjepa_data.shards.source import RawSample
from hjepa_data.sources.base import LabelledSource, raw_image
from hjepa_data.transforms.decode import SkipImageError, SkipReason

__all__ = ["HuggingFaceSource", "load_splits"]


class HuggingFaceSource(LabelledSource):
    """The rows of a ``datasets.Dataset``, by their numbers.

    Args:
        dataset: with a column of images.
        image: name of that column; None takes the only one.
        label: name of a column of class numbers; None takes the only one of class labels, if there is one.
        group_size: consecutive rows that count as one group; None makes one group of all, so that each epoch is
            shuffled as a whole.

    Raises:
        DataError: this is no such data set, or has no such columns.
    """

    def __init__(
        self,
        dataset: Any,  # noqa: ANN401 (its package is optional)
        *,
        image: str | None = None,
        label: str | None = None,
        group_size: int | None = None,
    ) -> None:
        package = _package()
        if not isinstance(dataset, package.Dataset):
            splits = f" with the splits {', '.join(map(str, dataset))}; give one of them" if _is_dict(dataset) else ""
            raise DataError(
                f"a {type(dataset).__name__}{splits}: a source is a datasets.Dataset, whose rows have numbers"
            )
        if not len(dataset):
            raise DataError("the data set has no rows")
        images = [name for name, feature in dataset.features.items() if isinstance(feature, package.Image)]
        classes = [name for name, feature in dataset.features.items() if isinstance(feature, package.ClassLabel)]
        self._image = _column(dataset, "image", image, images)
        label = _column(dataset, "label", label, classes) if label is not None or classes else None
        self._rows = dataset.with_format(None).select_columns([self._image])
        if self._image not in images:
            raise DataError(
                f"image={self._image!r}: that column holds no images; allowed: {', '.join(images) or 'none'}"
            )
        self._rows = self._rows.cast_column(self._image, package.Image(decode=False))
        super().__init__(_labels(dataset, label), group_size)
        self.classes: list[str] = list(dataset.features[label].names) if label in classes else []

    def read(self, index: int) -> RawSample:
        """Read one row.

        Args:
            index: its number in [0, len).

        Returns:
            The bytes of its image, or the image if it is no JPEG, PNG or WebP, and its label.

        Raises:
            DataError: the row names a file that cannot be read.
            SkipImageError: the row has no image.
            IndexError: there is no such number.
        """
        self.check(index)
        found = self._rows[index][self._image]
        if found is None or (found["bytes"] is None and found["path"] is None):
            raise SkipImageError(SkipReason.EMPTY)
        data = found["bytes"]
        if data is None:
            try:
                with open(found["path"], "rb") as file:
                    data = file.read()
            except OSError as error:
                raise DataError(
                    f"image '{found['path']}' of {self.locate(index)} cannot be read: {error.strerror}"
                ) from None
        return RawSample(image=raw_image(data), label=self.labels.item(index))

    def read_ahead(self, groups: Iterable[int]) -> None:
        """Do nothing: the rows are mapped into memory."""

    def locate(self, index: int) -> str:
        """Give the number of a row, for messages."""
        return f"row {index}"

    def close(self) -> None:
        """Do nothing: the data set belongs to the caller."""


def load_splits(name: str, split: str | None) -> dict[str, HuggingFaceSource]:
    """Load a data set; no code that comes with it is run.

    Args:
        name: folder that ``save_to_disk`` wrote, or what ``datasets.load_dataset`` takes: a folder of parquet files or
            images, or a name on the Hub.
        split: which split; None takes all of them.

    Returns:
        Sources by the names of their splits.

    Raises:
        DataError: there is no such data set or split, or it is no set of images.
    """
    package = _package()
    try:
        if any(os.path.exists(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json")):
            found = package.load_from_disk(name)
            if split is not None:
                found = found[split] if _is_dict(found) else {str(found.split or "train"): found}[split]
        else:
            # Versions that could run such code ask, unless they are told.
            asks = "trust_remote_code" in inspect.signature(package.load_dataset).parameters
            found = package.load_dataset(name, split=split, **({"trust_remote_code": False} if asks else {}))
    except KeyError:
        raise DataError(f"hf:{name}:{split}: there is no such split") from None
    except Exception as error:
        raise DataError(f"hf:{name}: {error}") from None
    splits = dict(found) if _is_dict(found) else {split or str(found.split or "train"): found}
    return {str(key): HuggingFaceSource(value) for key, value in splits.items()}


def _package() -> Any:  # noqa: ANN401
    try:
        return import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"data sets of Hugging Face need the package 'datasets' ({error}): pip install 'hjepa-data[datasets]'"
        ) from None


def _is_dict(dataset: object) -> bool:
    return isinstance(dataset, dict)


def _column(dataset: Any, field: str, name: str | None, found: list[str]) -> str:  # noqa: ANN401
    if name is not None:
        if name not in dataset.features:
            raise DataError(f"{field}={name!r}: no such column; allowed: {', '.join(dataset.features)}")
        return name
    if len(found) != 1:
        raise DataError(
            f"{len(found)} columns are {field}s: give {field}=, one of {', '.join(found or dataset.features)}"
        )
    return found[0]


def _labels(dataset: Any, label: str | None) -> Int64Array:  # noqa: ANN401
    if label is None:
        return np.full(len(dataset), -1, dtype=np.int64)
    column = dataset.select_columns([label]).with_format("arrow")[:].column(0)
    if not str(column.type).startswith(("int", "uint")):
        raise DataError(
            f"label={label!r}: that column holds {column.type}, no class numbers; "
            f"dataset.class_encode_column({label!r}) numbers them"
        )
    labels: Int64Array = column.cast("int64").fill_null(-1).to_numpy().astype(np.int64)
    return labels
