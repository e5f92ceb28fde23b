"""What a suite has found so far: measurements, and which test samples each classifier got right."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hjepa_eval import FeatureName, FeatureSet, Interval, Measurement, bootstrap
from hjepa_pretrain.evaluation import Images
from hjepa_pretrain.results import subject_of

RIGHT_FILE = "right.safetensors"
Details = Mapping[str, str | int | float | bool | None]
NONE: Details = {}


@dataclass(kw_only=True, slots=True)
class Findings:
    """Measurements in the order in which they were made.

    Attributes:
        measurements: for the results file.
        right: booleans [n] by metric and features: paired comparisons of runs are made of them.
        predicted: classes that the probes gave to the test images, by subject and level.
        left_out: measures for which there are too few images, and how many there are; empty where there are none.
    """

    measurements: list[Measurement] = field(default_factory=list)
    right: dict[str, Tensor] = field(default_factory=dict)
    predicted: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    left_out: str = ""

    def accuracy(
        self, metric: str, name: FeatureName, right: Tensor, *, n_train: int | None = None, details: Details = NONE
    ) -> None:
        """Keep an accuracy with its bootstrap interval, and what it is made of."""
        right = right.cpu()
        self.measurements.append(Measurement.of(metric, name, bootstrap(right), n_train=n_train, details=details))
        self.right[sample_key(metric, name)] = right

    def interval(
        self,
        metric: str,
        name: FeatureName,
        interval: Interval,
        *,
        n: int | None = None,
        n_train: int | None = None,
        details: Details = NONE,
    ) -> None:
        """Keep a number with its interval; n is the interval's own unless given."""
        self.measurements.append(Measurement.of(metric, name, interval, n=n, n_train=n_train, details=details))

    def value(self, metric: str, name: FeatureName, value: float, n: int, details: Details = NONE) -> None:
        """Keep a number without one."""
        self.measurements.append(Measurement(metric=metric, name=name, value=value, n=n, details=details))


def find(measurements: Iterable[Measurement], metric: str, *, subject: str, level: str) -> Measurement | None:
    """The first measurement of a metric at a level of a subject."""
    for one in measurements:
        if one.metric == metric and subject_of(one.name.branch) == subject and one.name.level == level:
            return one
    return None


def sample_key(metric: str, name: FeatureName) -> str:
    """What a row of booleans is called in the file."""
    return "|".join((metric, name.branch, name.level, name.pooling))


def images_hash(images: Images) -> str:
    """Hash of images and labels: runs that share it were tested on the same samples in the same order."""
    # Read where they lie: the images may fill half of the memory.
    found = hashlib.sha256(images.pixels.flatten().numpy().data)
    found.update(images.labels.flatten().numpy().data)
    return found.hexdigest()[:32]


def save_right(right: Mapping[str, Tensor], folder: Path) -> None:
    """Write which samples were right, one byte each, whole or not at all."""
    temporary = folder / (RIGHT_FILE + ".tmp")
    temporary.write_bytes(save({key: value.to(torch.uint8) for key, value in right.items()}))
    temporary.replace(folder / RIGHT_FILE)


def read_right(folder: Path) -> dict[str, Tensor]:
    """Read what `save_right` wrote.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        with safe_open(folder / RIGHT_FILE, framework="pt") as file:
            return {key: file.get_tensor(key).bool() for key in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / RIGHT_FILE}: cannot be read ({error}); run hjepa-benchmark suite again") from error


def known(images: Images) -> Images:
    """The images whose label is known."""
    return images.part(images.labels >= 0)


def check_pair(train: FeatureSet, test: FeatureSet) -> None:
    """Refuse to probe where there is nothing to learn from or to test on."""
    if len(train) < 2 or not len(test):
        raise ValueError(f"{len(train)} labelled training and {len(test)} held-out images: a probe needs 2 and 1")
