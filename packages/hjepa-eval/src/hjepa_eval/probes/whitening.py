"""Whitening: features whose directions count alike in a cosine, learned without labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hjepa_eval.probes.accuracy import check_finite
from hjepa_eval.probes.knn import knn_predict

KNN, WHITE_KNN = "knn_", "white_knn_"  # what names of metrics begin with

FLOOR = 0.1  # of 0.01 to 1 as good as any on the features of hjepa and SimCLR that were tried
ROWS = 65_536  # rows turned into float64 at once


@dataclass(kw_only=True, slots=True, frozen=True)
class Whitening:
    """A linear map after which all directions of features have nearly the same variance.

    A cosine of features follows the few directions of largest variance, whatever these are of; a linear probe finds
    what lies in the others, neighbours do not. With C the covariance of the features it was fitted to,

        z -> (z - mean) (C + floor tr(C) / D I)^(-1/2)

    The floor, a share of the mean variance of a direction, keeps directions that hold little but noise from counting as
    much as the others.

    Attributes:
        mean: Of the features, float64.
        matrix: What is applied to the differences to it, symmetric, float64.

    Source:
        Jégou and Chum 2012, "Negative evidences and co-occurences in image retrieval: the benefit of PCA and whitening"
        (ECCV), section 3; the floor is that of ZCA in Coates, Ng and Lee 2011 (AISTATS), relative to the variance.

    Example:
        >>> rows = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([10.0, 1.0, 1.0])
        >>> [round(one, 2) for one in Whitening.fit(rows, floor=0.0)(rows).std(dim=0).tolist()]
        [1.0, 1.0, 1.0]
    """

    mean: Float[Tensor, " D"]
    matrix: Float[Tensor, "D D"]

    @classmethod
    def fit(cls, features: Float[Tensor, "n D"], *, floor: float = FLOOR) -> "Whitening":
        """Return the map for features of training samples; no label is looked at.

        Args:
            features: One row a sample, at least two, more than D where the floor is 0.
            floor: Share of the mean variance that is added to each direction's, 0 and up.

        Returns:
            The map, on the device of the features; it takes the mean away and no more where all rows are the same.

        Raises:
            ValueError: Where there are too few features or they are not finite, or some direction of them is constant
                and the floor is 0.
        """
        if features.ndim != 2 or len(features) < 2 or not features.shape[1]:
            raise ValueError(f"features {tuple(features.shape)}: whitening needs [n, D] of at least two samples")
        if not floor >= 0:
            raise ValueError(f"floor={floor}: allowed: 0 and more; 0.1 is the default")
        check_finite(features)
        width = features.shape[1]
        parts = torch.split(features, ROWS)
        mean = torch.stack([part.double().sum(dim=0) for part in parts]).sum(dim=0) / len(features)
        centred = (part.double() - mean for part in parts)
        covariance = torch.stack([part.T @ part for part in centred]).sum(dim=0) / len(features)
        variance = float(covariance.trace()) / width
        if not variance:
            return cls(mean=mean, matrix=torch.eye(width, dtype=mean.dtype, device=mean.device))
        values, directions = torch.linalg.eigh(covariance)
        values = values.clamp_min(0) + floor * variance
        if not float(values[0]) > torch.finfo(values.dtype).eps * width * float(values[-1]):
            raise ValueError(f"floor={floor}: some direction of the features is constant; give a floor above 0")
        return cls(mean=mean, matrix=(directions * values.rsqrt()) @ directions.T)

    def __call__(self, features: Float[Tensor, "m D"]) -> Float[Tensor, "m D"]:
        """Return features in the map's coordinates, in float32 or finer.

        Raises:
            ValueError: Where their width is another.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features {tuple(features.shape)}: the map is of [m, {len(self.mean)}]")
        dtype = torch.promote_types(features.dtype, torch.float32)
        return torch.cat(
            [((part.double() - self.mean) @ self.matrix).to(dtype) for part in torch.split(features, ROWS)]
        )


def knn_by_metric(
    train: Float[Tensor, "n D"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m D"],
    *,
    ks: Sequence[int] = (20,),
    temperature: float = 0.07,
    floor: float | None = FLOOR,
) -> dict[str, Int[Tensor, " m"]]:
    """Predict classes by the neighbours of features as they are, and of whitened ones.

    Args:
        train: Features of the bank, which the whitening is fitted to.
        train_labels: Their classes, 0 and up.
        test: Features to classify, on the same device.
        ks: Numbers of neighbours; none gives nothing.
        temperature: T of the votes.
        floor: Of the whitening; None: without it.

    Returns:
        What `knn_predict` gives, by metric: "knn_20", ..., and "white_knn_20", ...

    Raises:
        ValueError: As `knn_predict` and `Whitening.fit`.
    """
    if not ks:
        return {}
    spaces = {KNN: (train, test)}
    if floor is not None:
        white = Whitening.fit(train, floor=floor)
        spaces[WHITE_KNN] = (white(train), white(test))
    return {
        f"{metric}{k}": predicted
        for metric, (bank, rows) in spaces.items()
        for k, predicted in knn_predict(bank, train_labels, rows, ks=ks, temperature=temperature).items()
    }
