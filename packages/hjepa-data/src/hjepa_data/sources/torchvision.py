"""Data sets of torchvision: their files where they name them, else their PIL images."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import numpy as np
from PIL import Image

from hjepa_data.errors import DataError
from hjepa_data.shards.index import Int64Array
from hjepa_data.shards.source import RawSample
from hjepa_data.sources.base import LabelledSource
from hjepa_data.sources.files import FileSource
from hjepa_data.transforms.decode import SkipImageError, SkipReason

__all__ = ["TorchvisionSource", "load_split"]


class TorchvisionSource(LabelledSource):
    """The samples of a map-style data set of torchvision, by their numbers.

    A data set with ``samples`` and torchvision's own loader (``ImageFolder``, ``ImageNet``, ...) is read file by file,
    undecoded; any other is asked for ``dataset[index]``, a pair of a PIL image and a class number.

    Args:
        dataset: without transforms, since streams cut their own views.
        labels: class number of each sample; None takes ``targets`` or ``labels`` of the data set, and where it has
            neither, every sample is loaded once for its label.
        group_size: consecutive samples that count as one group; None makes one group of all, so that each epoch is
            shuffled as a whole.

    Raises:
        DataError: the data set has transforms, no PIL images, or no class numbers.
    """

    def __init__(
        self,
        dataset: Any,  # noqa: ANN401 (any object with these methods)
        *,
        labels: Sequence[int] | None = None,
        group_size: int | None = None,
    ) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or not len(dataset):
            raise DataError(f"a {type(dataset).__name__} has no numbered samples; a source is a map-style data set")
        if any(getattr(dataset, name, None) is not None for name in ("transform", "target_transform", "transforms")):
            raise DataError(
                f"the {type(dataset).__name__} has transforms, but streams cut their own views; build it without"
            )
        self._name = type(dataset).__name__
        self._files: FileSource | None = None
        self._dataset: Any = None
        files = _files(dataset)
        if files is None:
            self._dataset = dataset
            # One that is damaged is left out when its turn comes, the first like any other.
            with suppress(SkipImageError):
                self._image(0)
        else:
            self._files = FileSource(files, np.full(len(files), -1, dtype=np.int64))
        super().__init__(_labels(dataset, labels), group_size)
        self.classes: list[str] = [str(name) for name in getattr(dataset, "classes", [])]

    def read(self, index: int) -> RawSample:
        """Read one sample.

        Args:
            index: its number in [0, len).

        Returns:
            The bytes of its file, or its PIL image, and its label.

        Raises:
            DataError: its file cannot be read.
            SkipImageError: it is no image.
            IndexError: there is no such number.
        """
        self.check(index)
        image = self._files.read(index).image if self._files is not None else self._image(index)
        return RawSample(image=image, label=self.labels.item(index))

    def read_ahead(self, groups: Iterable[int]) -> None:
        """Do nothing: the samples lie in memory, or in files of their own."""

    def locate(self, index: int) -> str:
        """Give the path of a sample, or its number, for messages."""
        return f"{self._name}[{index}]" if self._files is None else self._files.locate(index)

    def close(self) -> None:
        """Do nothing: the data set belongs to the caller."""

    def _image(self, index: int) -> Image.Image:
        try:
            image = _pair(self._dataset, index)[0]
        except FileNotFoundError as error:
            raise DataError(f"{self.locate(index)} cannot be read: {error}") from None
        except (OSError, SyntaxError, ValueError):
            raise SkipImageError(SkipReason.UNDECODABLE) from None
        if not isinstance(image, Image.Image):
            raise DataError(f"{self.locate(index)} holds a {type(image).__name__}, where a source needs a PIL image")
        return image


def load_split(name: str, root: str, split: str | None) -> TorchvisionSource:
    """Build a data set of torchvision that lies on the disk already.

    Args:
        name: of its class in ``torchvision.datasets``.
        root: folder that it was downloaded to.
        split: such as train or test; None takes the default of the class.

    Returns:
        Its source.

    Raises:
        DataError: there is no such class, the data set is not there, or it is no set of images with class numbers.
    """
    datasets: Any = import_module("torchvision.datasets")
    kind: Any = getattr(datasets, name, None) if name in datasets.__all__ else None
    fields = {} if kind is None else inspect.signature(kind).parameters
    if "root" not in fields:
        raise DataError(f"torchvision has no data set '{name}' in a folder; allowed: such as CIFAR10, ImageFolder")
    choice: dict[str, Any] = {}
    if split is not None and "train" in fields:
        if split not in {"train", "test"}:
            raise DataError(f"{name} has no split '{split}'; allowed: train, test")
        choice = {"train": split == "train"}
    elif split is not None and "split" in fields:
        choice = {"split": split}
    elif split is not None:
        raise DataError(f"{name} has no splits, but '{split}' is asked for; leave it out")
    try:
        dataset = kind(root, **choice)
    except Exception as error:
        raise DataError(f"torchvision:{name}:{root}: {error}") from None
    return TorchvisionSource(dataset)


def _files(dataset: Any) -> list[str] | None:  # noqa: ANN401
    """Paths of the files, if they are all that there is to a sample."""
    default_loader = import_module("torchvision.datasets.folder").default_loader
    samples = getattr(dataset, "samples", None) or getattr(dataset, "imgs", None)
    if samples is None or getattr(dataset, "loader", None) is not default_loader or len(samples) != len(dataset):
        return None
    return [str(path) for path, _ in samples]


def _labels(dataset: Any, labels: Sequence[int] | None) -> Int64Array:  # noqa: ANN401
    given = (labels, getattr(dataset, "targets", None), getattr(dataset, "labels", None))
    found: Any = next((numbers for numbers in given if numbers is not None), None)
    if found is None and isinstance(_pair(dataset, 0)[1], int | None):
        every = (_pair(dataset, index)[1] for index in range(len(dataset)))
        found = [-1 if label is None else label for label in every]
    numbers = np.asarray([] if found is None else found)
    if numbers.shape != (len(dataset),) or numbers.dtype.kind not in "iu":
        raise DataError(
            f"the labels of the {type(dataset).__name__} are no class numbers, one a sample; give labels=, -1 for "
            "those without one"
        )
    return numbers.astype(np.int64)


def _pair(dataset: Any, index: int) -> tuple[Any, Any]:  # noqa: ANN401
    sample = dataset[index]
    return (sample[0], sample[1]) if isinstance(sample, tuple) and len(sample) > 1 else (sample, None)
