"""Logistic probe: multinomial logistic regression on frozen, standardised features, solved by L-BFGS."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from hjepa_eval.probes.accuracy import check_finite, check_known, count_classes, split, top1
from hjepa_eval.probes.precision import full_precision

MAX_LOGITS = 2**24  # held at once: 64 MiB of float32
MAX_DIRECTIONS = 256  # of features that are wider, only so many directions get a scale of their own

_Solution: TypeAlias = tuple[Float[Tensor, "C D"], Float[Tensor, " C"]]  # weights and biases


@dataclass(kw_only=True, slots=True)
class LogisticProbeConfig:
    """How a logistic probe is fitted.

    Attributes:
        l2: Candidate weights of the penalty l2 / 2 * |W|^2 beside the mean cross-entropy (scikit-learn's C is
            1 / (n * l2)); the best on a held-out part of the training set is taken. They are tried from the strongest
            on, until two in a row are worse than the best: weak ones take most of the time.
        held_out: Share of the training samples that chooses among them, in (0, 1).
        max_iterations: L-BFGS iterations for each candidate.
        tolerance: A fit ends where no component of the gradient exceeds this share of the loss that it started from.
        seed: Seed of the split into fitted and held-out samples.
    """

    l2: tuple[float, ...] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    held_out: float = 0.2
    max_iterations: int = 300
    tolerance: float = 1e-7
    seed: int = 0

    def __post_init__(self) -> None:
        self.l2 = tuple(self.l2)
        if not self.l2 or min(self.l2) <= 0:
            raise ValueError(f"l2={self.l2}: at least one value, all of them above 0; the default is a good start")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: a share of the training samples, in (0, 1); 0.2 is usual")
        if self.max_iterations < 1:
            raise ValueError(f"max_iterations={self.max_iterations}: at least 1; 300 is usual")
        if self.tolerance <= 0:
            raise ValueError(f"tolerance={self.tolerance}: above 0; 1e-7 is usual")


class LogisticProbe:
    """A classifier on frozen features, whose penalty is chosen on a held-out part of the *training* set.

    The test set is never seen by ``fit``. The result is a function of the data, the config and its seed.

    Attributes:
        l2: The chosen penalty, after ``fit``.
        held_out_accuracy: Accuracy on the held-out part for each penalty that was tried, after ``fit``.
        weight: Weights on the standardised features [C, D], after ``fit``.
        bias: Biases [C], after ``fit``.
    """

    def __init__(self, config: LogisticProbeConfig | None = None) -> None:
        self.config = LogisticProbeConfig() if config is None else config
        self.l2 = 0.0
        self.held_out_accuracy: dict[float, float] = {}
        self.weight = torch.empty(0, 0)
        self.bias = torch.empty(0)
        self._mean = torch.empty(0)
        self._scale = torch.empty(0)

    def fit(self, features: Float[Tensor, "n D"], labels: Int[Tensor, " n"], num_classes: int | None = None) -> Self:
        """Choose the penalty on a held-out part of these samples, then fit all of them with it.

        Args:
            features: Training features, on the device where the fit is to run.
            labels: Their classes, 0 and up.
            num_classes: Number of classes; None: the largest label + 1.

        Returns:
            The probe itself.

        Raises:
            ValueError: Where shapes disagree, a label is unknown or there are fewer than two samples.
        """
        check_samples(features, labels)
        classes = count_classes(labels, num_classes)
        config = self.config
        self._mean, self._scale = moments(features)
        x = self._standardise(features)
        self.l2, start = self._choose(x, labels, classes)
        whole = _Regression(x, labels, classes, config.max_iterations, config.tolerance)
        self.weight, self.bias = whole.minimum(self.l2, start)
        return self

    def predict(self, features: Float[Tensor, "m D"]) -> Int[Tensor, " m"]:
        """Classes of features.

        Args:
            features: Features of the same kind as those of ``fit``.

        Returns:
            The class with the largest logit for each row.

        Raises:
            RuntimeError: Before ``fit``.
            ValueError: Where the features have another width or are not finite.
        """
        if self.weight.numel() == 0:
            raise RuntimeError("the probe is not fitted yet: call fit(features, labels) first")
        if features.ndim != 2 or features.shape[1] != self.weight.shape[1]:
            raise ValueError(f"features {tuple(features.shape)}: fitted on a width of {self.weight.shape[1]}")
        check_finite(features)
        with full_precision(features.device.type):
            return (self._standardise(features) @ self.weight.T + self.bias).argmax(dim=1)

    def accuracy(self, features: Float[Tensor, "m D"], labels: Int[Tensor, " m"]) -> float:
        """Share of rows that are classified rightly, in [0, 1].

        Args:
            features: Test features.
            labels: Their classes.

        Returns:
            Top-1 accuracy. A class that ``fit`` never saw counts as an error.
        """
        return top1(self.predict(features), labels)

    def _choose(self, x: Tensor, labels: Tensor, classes: int) -> tuple[float, _Solution | None]:
        """Return the penalty that does best on the held-out part, and what the rest came to with it."""
        config = self.config
        penalties = sorted(config.l2, reverse=True)
        self.held_out_accuracy = {}
        if len(penalties) == 1:
            return penalties[0], None
        kept, held = (part.to(x.device) for part in split(len(x), config.held_out, config.seed))
        rest = _Regression(x[kept], labels[kept], classes, config.max_iterations, config.tolerance)
        found: dict[float, _Solution] = {}
        scores, last = self.held_out_accuracy, None
        for penalty in penalties:
            weight, bias = last = found[penalty] = rest.minimum(penalty, last)
            with full_precision(x.device.type):
                scores[penalty] = top1((x[held] @ weight.T + bias).argmax(1), labels[held])
            if all(score < max(scores.values()) for score in [*scores.values()][-2:]):
                break
        best = max(scores, key=scores.__getitem__)  # the first, and strongest, among equals
        return best, found[best]

    def _standardise(self, features: Tensor) -> Tensor:
        return (features.detach().float() - self._mean) / self._scale


def fit_logistic(
    x: Float[Tensor, "n D"],
    labels: Int[Tensor, " n"],
    num_classes: int,
    l2: Sequence[float],
    max_iterations: int = 300,
    tolerance: float = 1e-7,
) -> list[_Solution]:
    """Minimise the penalised cross-entropy for each penalty in turn, each started at the solution before.

    mean_i -log softmax(W x_i + b)[y_i] + l2 / 2 * |W|^2

    The Hessian lies below (x^T x / n) / 2 + l2 for every class, so the weights are sought in coordinates in which
    that bound is near the identity: correlated features then need tens of iterations, not thousands.

    Args:
        x: Features, standardised.
        labels: Their classes.
        num_classes: C.
        l2: Penalties, strongest first.
        max_iterations: L-BFGS iterations for each.
        tolerance: Largest component of the gradient at the end, as a share of the loss at the start.

    Returns:
        Weights and biases for each penalty.

    Source:
        The bound is Böhning 1992, "Multinomial logistic regression algorithm".
    """
    regression = _Regression(x, labels, num_classes, max_iterations, tolerance)
    path, last = [], None
    for penalty in l2:
        path.append(last := regression.minimum(penalty, last))
    return path


class _Regression:
    """The penalised cross-entropy of some samples, to be minimised for one penalty after another."""

    def __init__(
        self, x: Float[Tensor, "n D"], labels: Int[Tensor, " n"], classes: int, max_iterations: int, tolerance: float
    ) -> None:
        # Features of an encoder that ran with gradients: only the weights are fitted.
        self._kind, x, self._labels = x.dtype, x.detach(), labels.long()
        self._classes, self._max_iterations, self._tolerance = classes, max_iterations, tolerance
        self._space: Tensor | None = None
        if len(x) < x.shape[1]:
            # Separable samples: the loss and the pull on the biases fall below what float32 tells apart. And the
            # penalty keeps weights in the span of the samples, which has as many axes as there are samples.
            x = x.double()
            self._space = torch.linalg.qr(x.T)[0]
            x = x @ self._space
        self._x = x
        with full_precision(x.device.type):
            self._basis, self._curvature = _leading_directions(x)

    def minimum(self, l2: float, start: _Solution | None = None) -> _Solution:
        """Return weights and biases at the minimum, sought from a start, or else from zero."""
        x, space = self._x, self._space
        weight, bias = (x.new_zeros(self._classes, x.shape[1]), x.new_zeros(self._classes))
        with full_precision(x.device.type):
            if start is not None:
                weight, bias = (part.to(x.dtype) for part in start)
                weight = weight if space is None else weight @ space
            stretch = _Stretch(self._basis, (self._curvature / 2 + l2).rsqrt())
            first = torch.cat((stretch.undo(weight), bias[:, None]), dim=1)
            found = _lbfgs(stretch(x), self._labels, stretch, l2, first, self._max_iterations, self._tolerance)
            weight, bias = stretch(found[:, :-1]), found[:, -1]
            weight = weight if space is None else weight @ space.T
        return weight.to(self._kind), bias.to(self._kind)


@dataclass(slots=True)
class _Stretch:
    """The symmetric map that scales each leading direction by its own factor and all others by the last one."""

    basis: Float[Tensor, "D r"]
    factors: Float[Tensor, " r"]

    def __call__(self, rows: Tensor) -> Tensor:
        return self._apply(rows, self.factors)

    def undo(self, rows: Tensor) -> Tensor:
        return self._apply(rows, self.factors.reciprocal())

    def _apply(self, rows: Tensor, factors: Tensor) -> Tensor:
        rest = factors[-1]
        return torch.addmm(rest * rows, (rows @ self.basis) * (factors - rest), self.basis.T)


def _leading_directions(x: Float[Tensor, "n D"]) -> tuple[Float[Tensor, "D r"], Float[Tensor, " r"]]:
    """Leading eigenvectors and eigenvalues of x^T x / n: all of them if they are few, else by subspace iteration."""
    basis = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    if x.shape[1] > MAX_DIRECTIONS:
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(x.shape[1], MAX_DIRECTIONS, generator=generator).to(x)
        for _ in range(2):
            basis = torch.linalg.qr(x.T @ (x @ basis))[0]
    projected = x @ basis
    values, vectors = torch.linalg.eigh((projected.T @ projected).double() / len(x))
    # eigh sorts upwards; the last factor of a stretch must be that of the smallest direction.
    return basis @ vectors.flip(1).to(x.dtype), values.flip(0).clamp_min(0).to(x.dtype)


def _lbfgs(
    z: Float[Tensor, "n D"],
    labels: Int[Tensor, " n"],
    stretch: _Stretch,
    l2: float,
    start: Float[Tensor, "C D+1"],
    max_iterations: int,
    tolerance: float,
) -> Float[Tensor, "C D+1"]:
    """Weights on z, which is the stretched x, and biases in the last column."""
    # torch's L-BFGS ends, and forgets curvature, by absolute sizes; under a weak penalty all sizes are small.
    unit = max(float(_loss_and_gradient(start, z, labels, stretch, l2)[0]), torch.finfo(z.dtype).eps)
    u = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [u],
        max_iter=max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        loss, gradient = _loss_and_gradient(u.detach(), z, labels, stretch, l2)
        u.grad = gradient / unit
        return float(loss) / unit

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return u.detach()


def _loss_and_gradient(
    u: Float[Tensor, "C D+1"], z: Float[Tensor, "n D"], labels: Int[Tensor, " n"], stretch: _Stretch, l2: float
) -> tuple[Tensor, Tensor]:
    rows = max(1, MAX_LOGITS // len(u))
    real = stretch(u[:, :-1])
    loss = real.square().sum() * (l2 / 2)
    gradient = torch.cat((l2 * stretch(real), torch.zeros_like(u[:, -1:])), dim=1)
    for part, part_labels in zip(torch.split(z, rows), torch.split(labels, rows), strict=True):
        log_p = F.log_softmax(torch.addmm(u[:, -1], part, u[:, :-1].T), dim=1)
        loss = loss - log_p.gather(1, part_labels[:, None]).sum() / len(z)
        residual = log_p.exp()
        residual.scatter_add_(1, part_labels[:, None], residual.new_full((len(part), 1), -1.0))
        gradient[:, :-1].addmm_(residual.T, part, alpha=1 / len(z))
        gradient[:, -1].add_(residual.sum(dim=0), alpha=1 / len(z))
    return loss, gradient


def moments(features: Float[Tensor, "n D"]) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
    """Mean and scale with which features are standardised: (x - mean) / scale.

    Args:
        features: Training features; computed in float64.

    Returns:
        Mean and standard deviation of each dimension, float32; the scale of one that does not vary is 1.

    Raises:
        ValueError: Where features are not finite.
    """
    # Some rows at a time: tokens of many images would not fit in float64.
    parts = torch.split(features.detach(), max(1, MAX_LOGITS // features.shape[1]))
    mean = torch.stack([part.double().sum(dim=0) for part in parts]).sum(dim=0) / len(features)
    squares = torch.stack([(part.double() - mean).square().sum(dim=0) for part in parts]).sum(dim=0)
    deviation = (squares / len(features)).sqrt()
    check_finite(deviation)
    # A dimension that does not vary tells nothing; dividing by its rounding noise would make it loud.
    quiet = deviation <= 1e-6 * mean.abs().clamp_min(1e-6)
    return mean.float(), torch.where(quiet, 1.0, deviation).float()


def check_samples(features: Tensor, labels: Tensor, name: str = "features") -> None:
    """Raise a ValueError for training samples that no probe can be fitted on; ``name`` is what to call them."""
    if features.ndim != 2 or not features.shape[1] or labels.shape != features.shape[:1]:
        raise ValueError(
            f"{name} {tuple(features.shape)} and labels {tuple(labels.shape)}: features must be [n, D] with one "
            "label a row"
        )
    if len(features) < 2:
        raise ValueError(f"features: {len(features)} training samples; a probe needs at least two")
    check_known(labels)
