"""Errors on changed images: which samples stay right, and mean corruption errors against a reference."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from hjepa_eval.probes.accuracy import check_known
from hjepa_eval.robustness.severity import SEVERITIES, Corruption

Change = Callable[[UInt8[Tensor, "B 3 H W"], Int[Tensor, " B"]], UInt8[Tensor, "B 3 H W"]]
Predict = Callable[[UInt8[Tensor, "B 3 H W"]], Mapping[str, Int[Tensor, " B"]]]
Errors = Mapping[str, Sequence[float]]

# Top-1 errors of AlexNet on the published ImageNet-C, by which published mCE are divided. Means over severities are
# published, and no more is needed: each stands for all five.
_ALEXNET = (
    0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816, 0.826572, 0.819324, 0.564592,
    0.853204, 0.646056, 0.717840, 0.606500,
)  # fmt: skip
ALEXNET: Errors = {name: (error,) * len(SEVERITIES) for name, error in zip(Corruption, _ALEXNET, strict=True)}
ALEXNET_CLEAN = 0.435


def right_on_changed(
    predict: Predict,
    images: UInt8[Tensor, "n 3 H W"],
    labels: Int[Tensor, " n"],
    change: Change | None = None,
    *,
    batch_size: int = 256,
) -> dict[str, Bool[Tensor, " n"]]:
    """Which images are still classified rightly once they are changed, for all classifiers of a model in one pass.

    Args:
        predict: Maps pixels to predicted classes by the name of a classifier (a level).
        images: Pixels.
        labels: Their classes.
        change: Maps pixels and sample numbers to changed pixels; None: leaves them as they are.
        batch_size: Images of a call.

    Returns:
        One boolean an image for each name; the error is 1 - mean.

    Raises:
        ValueError: Where there is no image, not one label an image, or a label is unknown.
    """
    if not len(images) or labels.shape != images.shape[:1]:
        raise ValueError(f"images {tuple(images.shape)} labels {tuple(labels.shape)}: give some, with one label each")
    check_known(labels)
    found: dict[str, list[Tensor]] = {}
    for part in torch.split(torch.arange(len(images)), batch_size):
        pixels = images[part] if change is None else change(images[part], part)
        for name, predicted in predict(pixels).items():
            found.setdefault(name, []).append(predicted.cpu() == labels[part].cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


@dataclass(kw_only=True, slots=True, frozen=True)
class CorruptionError:
    """Corruption errors against a reference.

    Attributes:
        by_corruption: CE of each corruption: 1 is as bad as the reference.
        mean: Their mean, mCE. Publications give it in percent.
    """

    by_corruption: dict[str, float]
    mean: float


def mean_corruption_error(errors: Errors, reference: Errors) -> CorruptionError:
    """Errors summed over severities and divided by the reference's, averaged over corruptions.

    CE_c = sum_s E(s, c) / sum_s E_ref(s, c),   mCE = mean_c CE_c

    Args:
        errors: Top-1 error, 1 - accuracy, by corruption and severity.
        reference: Those of the reference model at the same severities: ALEXNET for the mCE of publications, which is of
            ImageNet's classes at 224 pixels.

    Returns:
        CE of each corruption, and mCE.

    Raises:
        ValueError: Where the two are not of the same corruptions and severities, or the reference makes no error.

    Source:
        Hendrycks and Dietterich 2019 (arXiv 1903.12261), section 4.2.
    """
    return _ratio(errors, reference, 0.0, 0.0)


def relative_corruption_error(
    errors: Errors, reference: Errors, *, clean: float, reference_clean: float
) -> CorruptionError:
    """How much corruption adds to the error, divided by what it adds to the reference's.

    CE_c = sum_s (E(s, c) - E_clean) / sum_s (E_ref(s, c) - E_ref_clean),   relative mCE = mean_c CE_c

    Args:
        errors: Top-1 error by corruption and severity.
        reference: Those of the reference model.
        clean: Top-1 error on the images as they are.
        reference_clean: That of the reference model: ALEXNET_CLEAN.

    Returns:
        Relative CE of each corruption, and relative mCE.

    Raises:
        ValueError: Where the two are not of the same corruptions and severities, or corruption adds nothing to the
            reference's error.

    Source:
        Hendrycks and Dietterich 2019 (arXiv 1903.12261), section 4.2.
    """
    return _ratio(errors, reference, clean, reference_clean)


def _ratio(errors: Errors, reference: Errors, clean: float, reference_clean: float) -> CorruptionError:
    if not errors or errors.keys() != reference.keys():
        theirs = ", ".join(sorted(reference))
        raise ValueError(f"errors of ({', '.join(sorted(errors))}), reference of ({theirs}): give the same corruptions")
    found = {}
    for name, row in errors.items():
        if len(row) != len(reference[name]) or not row:
            raise ValueError(f"{name}: {len(row)} and {len(reference[name])} severities; give the same ones")
        below = sum(reference[name]) - reference_clean * len(row)
        if below <= 0:
            raise ValueError(f"{name}: the reference makes no more errors than without corruption; take another one")
        found[name] = (sum(row) - clean * len(row)) / below
    return CorruptionError(by_corruption=found, mean=sum(found.values()) / len(found))
