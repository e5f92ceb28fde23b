"""DCI: is each factor held by its own dimensions (disentanglement, completeness), and how well (informativeness)?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from hjepa_eval.factors.probes import check_varies
from hjepa_eval.probes.accuracy import check_finite, check_known, check_widths, split
from hjepa_eval.probes.logistic import moments
from hjepa_eval.results.interval import Interval, bootstrap, group_of_each, of_parts

PENALTIES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # shares of the penalty that makes all weights 0


@dataclass(kw_only=True, slots=True, frozen=True)
class DCI:
    """Disentanglement, completeness and informativeness of a code.

    Attributes:
        disentanglement: 1 where each dimension matters for one factor only; mean weighted by importance.
        completeness: 1 where each factor needs one dimension only, by factor.
        mean_completeness: Mean over the factors.
        informativeness: Normalised root mean square error on the test samples, by factor: 0 is perfect, 1 is no better
            than the mean.
        intervals: Of "disentanglement" and "mean_completeness" by a jackknife over the training samples, which they are
            of, with the penalties of the whole; of "mean_informativeness" by bootstrap over the test samples.
        importance: |weights| of standardised dimensions for each standardised factor [D, K].
        n_train: Training samples.
        n_test: Test samples.
    """

    disentanglement: float
    completeness: dict[str, float]
    mean_completeness: float
    informativeness: dict[str, float]
    intervals: dict[str, Interval]
    importance: Float[Tensor, "D K"]
    n_train: int
    n_test: int


def dci(
    train: Float[Tensor, "n D"],
    train_factors: Mapping[str, Tensor],
    test: Float[Tensor, "m D"],
    test_factors: Mapping[str, Tensor],
    *,
    seed: int = 0,
    groups: int = 10,
) -> DCI:
    """Fit a lasso from the code to every factor, and measure how its weights are spread.

    R [D, K] = |weights|,   D_i = 1 - H_K(R_i. / sum),   C_j = 1 - H_D(R_.j / sum),   D = sum_i rho_i D_i with
    rho_i = sum_j R_ij / sum R; H_K has the base K. The penalty of each factor is chosen on a fifth of the training
    samples. A factor of floats is divided by its deviation over them, so that its unit does not matter; one of integers
    is a class: one column for each of its classes, whose weights are added.

    Args:
        train: Codes.
        train_factors: At least two factors: integers [n] (classes) or floats [n].
        test: Codes of the test samples.
        test_factors: The same factors of the test samples.
        seed: Of the split, and of the bootstrap.
        groups: Groups of the jackknife, at least two samples each; every factor is fitted once more for each.

    Returns:
        The scores.

    Raises:
        ValueError: With fewer than two factors or dimensions, or where a factor lacks values or is constant, a class
            is unknown or something is not finite; with fewer than two groups or four training samples.

    Source:
        Eastwood and Williams 2018 (ICLR), "A framework for the quantitative evaluation of disentangled
        representations", section 2; lasso as in section 4.
    """
    if len(train_factors) < 2 or train.ndim != 2 or train.shape[1] < 2:
        raise ValueError(
            f"factors={sorted(train_factors)} code {tuple(train.shape)}: at least two factors and two dimensions"
        )
    if groups < 2 or len(train) < 4:
        raise ValueError(f"groups={groups}: of {len(train)} training samples; allowed: 2 and more, of 4 and more")
    check_widths(train, test)
    check_finite(test, "test")
    groups = min(groups, len(train) // 2)
    mean, scale = moments(train)
    x, test_x = ((part.detach().double() - mean) / scale for part in (train, test))
    group = group_of_each(len(x), groups).to(x.device)
    importance, left, errors = [], [], []
    for name, values in train_factors.items():
        if name not in test_factors or len(values) != len(train) or len(test_factors[name]) != len(test):
            raise ValueError(f"factor {name!r}: give a value for each training and each test sample")
        if values.ndim != 1:
            raise ValueError(f"factor {name!r} {tuple(values.shape)}: give each of its columns as a factor of its own")
        for each in (values, test_factors[name]):
            if not each.is_floating_point():
                check_known(each, f"factor {name!r}")
        y, test_y = _columns(values, test_factors[name], x.device)
        check_varies(y, test_y, name)
        offset = y.mean(dim=0)
        penalty = _chosen_penalty(x, y - offset, seed)
        weight = lasso(x, y - offset, penalty)
        importance.append(weight.abs().sum(dim=1))
        parts = [_without(x, y, group != number, penalty, weight) for number in range(groups)]
        left.append(torch.stack(parts).abs().sum(dim=2))
        error = (test_y - offset - test_x @ weight).square().sum(dim=1)
        errors.append(torch.stack((error, (test_y - offset).square().sum(dim=1)), dim=1))
    found = torch.stack(importance, dim=1)
    disentanglement, completeness = _structure(found)
    structures = [_structure(part) for part in torch.stack(left, dim=2)]
    of = {
        "disentanglement": (disentanglement, [one for one, _ in structures]),
        "mean_completeness": (float(completeness.mean()), [float(one.mean()) for _, one in structures]),
    }
    rows = torch.stack(errors, dim=1)
    intervals = {name: of_parts(value, parts, len(train), (0.0, 1.0)) for name, (value, parts) in of.items()}
    intervals["mean_informativeness"] = bootstrap(rows, lambda means: _relative(means).mean(dim=1), seed=seed)
    return DCI(
        disentanglement=disentanglement,
        completeness=dict(zip(train_factors, completeness.tolist(), strict=True)),
        mean_completeness=float(completeness.mean()),
        informativeness=dict(zip(train_factors, _relative(rows.mean(dim=0)).tolist(), strict=True)),
        intervals=intervals,
        importance=found,
        n_train=len(train),
        n_test=len(test),
    )


def lasso(
    x: Float[Tensor, "n D"],
    y: Float[Tensor, "n c"],
    penalty: Float[Tensor, " c"],
    *,
    iterations: int = 5000,
    start: Float[Tensor, "D c"] | None = None,
) -> Float[Tensor, "D c"]:
    """Minimise |y - x w|^2 / (2 n) + penalty |w|_1 for each column by accelerated proximal gradients (FISTA).

    Args:
        x: Centred features, float64.
        y: Centred targets.
        penalty: One for each column.
        iterations: Steps, at most; ends earlier where nothing moves by more than 1e-9.
        start: Where to start; None: at 0.

    Returns:
        The weights.

    Source:
        Beck and Teboulle 2009 (SIAM J. Imaging Sciences 2), with restarts where the objective would rise.
    """
    gram, target = x.T @ x / len(x), x.T @ y / len(x)
    step = 1 / torch.linalg.eigvalsh(gram)[-1].clamp_min(1e-12)
    weight = torch.zeros_like(target) if start is None else start
    ahead, momentum = weight, 1.0
    for _ in range(iterations):
        moved = ahead - step * (gram @ ahead - target)
        new = torch.sign(moved) * F.relu(moved.abs() - step * penalty)
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        if float(((ahead - new) * (new - weight)).sum()) > 0:
            following = 1.0
        ahead = new + (momentum - 1) / following * (new - weight) if following > 1 else new
        change = float((new - weight).abs().max())
        weight, momentum = new, following
        if change < 1e-9:
            break
    return weight


def _structure(importance: Float[Tensor, "D K"]) -> tuple[float, Float[Tensor, " K"]]:
    """Disentanglement, and the completeness of each factor."""
    share = importance.sum(dim=1) / importance.sum().clamp_min(torch.finfo(importance.dtype).tiny)
    return float((share * _concentration(importance)).sum()), _concentration(importance.T)


def _relative(means: Float[Tensor, "*r 2"]) -> Float[Tensor, "*r"]:
    """Root mean square error over the root mean square of the target, of means of both squares."""
    return (means[..., 0] / means[..., 1]).sqrt()


def _without(x: Tensor, y: Tensor, kept: Tensor, penalty: Tensor, start: Tensor) -> Tensor:
    """Weights without one group of samples."""
    x, y = x[kept], y[kept]
    return lasso(x - x.mean(dim=0), y - y.mean(dim=0), penalty, start=start)


def _chosen_penalty(x: Tensor, y: Tensor, seed: int) -> Tensor:
    kept, held = (part.to(x.device) for part in split(len(x), 0.2, seed))
    errors = []
    for share in PENALTIES:
        weight = lasso(x[kept], y[kept], share * _largest(x[kept], y[kept]))
        errors.append(float((y[held] - x[held] @ weight).square().sum()))
    return PENALTIES[errors.index(min(errors))] * _largest(x, y)


def _largest(x: Tensor, y: Tensor) -> Tensor:
    """The penalty of each column at which all its weights are 0."""
    return (x.T @ y / len(x)).abs().amax(dim=0)


def _columns(values: Tensor, test_values: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    values, test_values = values.to(device), test_values.to(device)
    if values.is_floating_point():
        scale = values.double().std(correction=0)
        scale = torch.where(scale > 0, scale, 1.0)
        return values.double()[:, None] / scale, test_values.double()[:, None] / scale
    values, test_values = values.long(), test_values.long()
    classes = int(torch.maximum(values.max(), test_values.max())) + 1
    return F.one_hot(values, classes).double(), F.one_hot(test_values, classes).double()


def _concentration(importance: Float[Tensor, "a b"]) -> Float[Tensor, " a"]:
    """1 - entropy of each row to the base of its length; 0 for a row of zeros."""
    total = importance.sum(dim=1, keepdim=True)
    p = importance / total.clamp_min(torch.finfo(importance.dtype).tiny)
    entropy = torch.special.entr(p).sum(dim=1) / math.log(importance.shape[1])
    return torch.where(total[:, 0] > 0, 1 - entropy, 0.0)
