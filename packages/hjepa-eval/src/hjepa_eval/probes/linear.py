"""Linear probe: learning rates, weight decays and features trained at once by SGD, chosen on a part of *train*."""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hjepa_eval.extraction.features import FeatureSet
from hjepa_eval.probes.accuracy import check_finite, count_classes, split, top1
from hjepa_eval.probes.heads import Candidate, HeadTraining, best_candidate, train_heads
from hjepa_eval.probes.logistic import check_samples, moments
from hjepa_eval.probes.precision import full_precision

Sets = Mapping[str, Float[Tensor, "n D"]]


class LinearProbe:
    """The best of many linear classifiers on frozen, standardised features; the test set is never seen by ``fit``.

    All heads read a batch in one product [S, P * C, D] x [S, D, B]: S sets of features (blocks, levels, poolings; the
    narrower are padded with zeros), P pairs of learning rate and weight decay, C classes.

    Attributes:
        candidates: Every head with its held-out accuracy, after ``fit``.
        chosen: The head with the highest one, after ``fit``.
    """

    def __init__(self, config: HeadTraining | None = None) -> None:
        self.config = HeadTraining() if config is None else config
        self.candidates: list[Candidate] = []
        self.chosen: Candidate | None = None
        self._classes = 0
        self._head = _Head(0, 0)
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}

    def fit(self, features: Sets, labels: Int[Tensor, " n"], num_classes: int | None = None) -> Self:
        """Train all heads on one part of these samples, choose on the other, and train the chosen one on all.

        Args:
            features: Training features of the same samples by name, on the device where the fit is to run.
            labels: Their classes, 0 and up.
            num_classes: Number of classes; None: the largest label + 1.

        Returns:
            The probe itself.

        Raises:
            ValueError: Where shapes disagree, a label is unknown, there are fewer than two samples, or all heads
                diverge.
        """
        _check(features, labels)
        config, labels = self.config, labels.long()
        self._classes = count_classes(labels, num_classes)
        self._moments = {name: moments(values) for name, values in features.items()}
        kept, held = (part.to(labels.device) for part in split(len(labels), config.held_out, config.seed))
        names, grid = list(features), config.grid()
        heads = self._train(features, labels, names, grid, kept)
        self.candidates = []
        for s, name in enumerate(names):
            x = self._standardise(name, features[name][held])
            for (rate, decay), head in zip(grid, heads[s * len(grid) : (s + 1) * len(grid)], strict=True):
                logits = head(x)
                accuracy = top1(logits.argmax(dim=1), labels[held])
                finite = bool(logits.isfinite().all())
                self.candidates.append(
                    Candidate(
                        features=name,
                        learning_rate=rate,
                        weight_decay=decay,
                        held_out=accuracy if finite else -torch.inf,
                    )
                )
        best = best_candidate(self.candidates, config)
        self.chosen, self._head = self.candidates[best], heads[best]
        if config.refit:
            everyone = torch.arange(len(labels), device=labels.device)
            setting = (self.chosen.learning_rate, self.chosen.weight_decay)
            (self._head,) = self._train(features, labels, [self.chosen.features], [setting], everyone)
        return self

    def predict(self, features: Sets) -> Int[Tensor, " m"]:
        """Classes of features.

        Args:
            features: Features by name; those that the chosen head reads are enough.

        Returns:
            The class with the largest logit for each row.

        Raises:
            RuntimeError: Before ``fit``.
            ValueError: Where those that the chosen head reads are missing, of another width or not finite.
        """
        if self.chosen is None:
            raise RuntimeError("the probe is not fitted yet: call fit(features, labels) first")
        name = self.chosen.features
        if name not in features:
            raise ValueError(f"features={sorted(features)}: the chosen head reads {name!r}; give that too")
        values, width = features[name], self._head.weight.shape[1]
        if values.ndim != 2 or values.shape[1] != width:
            raise ValueError(f"features[{name!r}] {tuple(values.shape)}: fitted on a width of {width}")
        check_finite(values, f"features[{name!r}]")
        logits: Tensor = self._head(self._standardise(name, values))
        return logits.argmax(dim=1)

    def accuracy(self, features: Sets, labels: Int[Tensor, " m"]) -> float:
        """Share of rows that are classified rightly, in [0, 1].

        Args:
            features: Test features by name.
            labels: Their classes.

        Returns:
            Top-1 accuracy. A class that ``fit`` never saw counts as an error.
        """
        return top1(self.predict(features), labels)

    def _train(
        self,
        features: Sets,
        labels: Tensor,
        names: Sequence[str],
        grid: Sequence[tuple[float, float]],
        samples: Tensor,
    ) -> list["_Head"]:
        width = max(features[name].shape[1] for name in names)
        heads = [_Head(width, self._classes).to(labels.device) for _ in range(len(names) * len(grid))]

        def loss(batch: Tensor) -> Tensor:
            x = torch.stack(
                [F.pad(self._standardise(n, features[n][batch]), (0, width - features[n].shape[1])) for n in names]
            )
            weight = torch.stack([head.weight for head in heads]).view(len(names), len(grid), self._classes, width)
            bias = torch.stack([head.bias for head in heads]).view(len(names), len(grid), 1, self._classes)
            logits = torch.einsum("spcd,sbd->spbc", weight, x) + bias
            target = labels[batch].expand(len(heads), -1)
            losses = F.cross_entropy(logits.reshape(-1, self._classes), target.reshape(-1), reduction="none")
            return losses.view(len(heads), -1).mean(dim=1)

        with full_precision(labels.device.type):
            train_heads(heads, list(grid) * len(names), loss, samples, self.config)
        for head, name in zip(heads, (n for n in names for _ in grid), strict=True):
            head.narrow(features[name].shape[1])
        return heads

    def _standardise(self, name: str, values: Tensor) -> Tensor:
        mean, scale = self._moments[name]
        return (values.detach().float() - mean) / scale


class _Head(nn.Module):
    """A linear classifier that starts at zero."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, width))
        self.bias = nn.Parameter(torch.zeros(classes))

    def narrow(self, width: int) -> None:
        """Leave out the weights of the padding."""
        self.weight = nn.Parameter(self.weight.detach()[:, :width].clone())

    def forward(self, x: Tensor) -> Tensor:
        """Logits, without gradient."""
        with full_precision(x.device.type):
            return F.linear(x, self.weight, self.bias).detach()


def as_sets(sets: Mapping[str, FeatureSet]) -> dict[str, Tensor]:
    """The values of feature sets by name, as ``fit`` takes them."""
    return {key: one.values for key, one in sets.items()}


def _check(features: Sets, labels: Tensor) -> None:
    if not features:
        raise ValueError("features: there are none; give at least one set by name")
    for name, values in features.items():
        check_samples(values, labels, f"features[{name!r}]")
