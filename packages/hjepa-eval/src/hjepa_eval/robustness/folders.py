"""Folders of other images of the same classes: ImageNet-A, -R, -Sketch, or any set with one folder a class."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")


@dataclass(kw_only=True, slots=True)
class ClassFolders:
    """Image files with the class numbers that a model was trained with.

    Attributes:
        paths: The files, class by class, in order of their names.
        labels: Class of each, an index into the classes of the training set.
        present: The classes that the set has. ImageNet-A and -R have 200 of 1,000: predictions are among these only.
    """

    paths: list[Path]
    labels: Int[Tensor, " n"]
    present: Int[Tensor, " p"]

    def batches(self, decode: Callable[[Path], Tensor], batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield decoded images with their labels, each once.

        Args:
            decode: Reads a file into a tensor; all of one shape.
            batch_size: Images of a batch.
        """
        for start in range(0, len(self.paths), batch_size):
            part = slice(start, start + batch_size)
            yield torch.stack([decode(path) for path in self.paths[part]]), self.labels[part]

    def among_present(self, scores: Tensor) -> Int[Tensor, " B"]:
        """The class with the largest score [B, C] among the classes of the set, as published results count it."""
        return self.present.to(scores.device)[scores[:, self.present.to(scores.device)].argmax(dim=1)]


def class_folders(root: Path | str, classes: Sequence[str]) -> ClassFolders:
    """Find the images of a set with one folder a class.

    Args:
        root: Holds a folder for each of some classes (n01498041, ...), images anywhere below.
        classes: Names of the folders of the training set, in the order of its class numbers.

    Returns:
        Files and labels.

    Raises:
        ValueError: Where there is no such folder, a class comes twice, a folder is no class, or there is no image.

    Source:
        ImageNet-A (arXiv 1907.07174), ImageNet-R (arXiv 2006.16241), ImageNet-Sketch (arXiv 1905.13549).
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"root={root}: no such folder; give the one that holds a folder for each class")
    number = {name: index for index, name in enumerate(classes)}
    if len(number) < len(classes):
        raise ValueError(f"classes: of {len(classes)} names only {len(number)} differ; give each class once, in order")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    strange = [folder.name for folder in folders if folder.name not in number]
    if strange:
        shown = ", ".join(strange[:3])
        raise ValueError(
            f"root={root}: {len(strange)} folders are no class of the training set ({shown}); allowed: its class "
            f"folders, as {', '.join(list(classes)[:3])}"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for folder in folders:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        paths += files
        labels += [number[folder.name]] * len(files)
    if not paths:
        raise ValueError(f"root={root}: no image in its class folders; allowed: {', '.join(SUFFIXES)}")
    known = torch.tensor(labels)
    return ClassFolders(paths=paths, labels=known, present=torch.tensor(sorted(set(labels))))
