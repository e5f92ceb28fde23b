"""Features of n samples with their labels and the name of where they come from."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(kw_only=True, slots=True, frozen=True)
class FeatureName:
    """Where features come from; printed beside every number that is made from them.

    Attributes:
        branch: The encoder that gave them: "target", "online", or a word for what has no branches ("pixels").
        level: The hierarchy level or the block, "encoder" for the encoder's own output.
        pooling: How the tokens of an image became one vector: "mean", "cls", "concat", "flatten", ...
    """

    branch: str = "-"
    level: str = "-"
    pooling: str = "-"

    def __str__(self) -> str:
        return f"branch={self.branch} level={self.level} pooling={self.pooling}"


@dataclass(kw_only=True, slots=True)
class FeatureSet:
    """The features of n samples with their labels, on the CPU.

    Attributes:
        values: One row a sample.
        labels: The class of each sample, -1 where it is unknown.
        name: Branch, level and pooling of the features.
    """

    values: Float[Tensor, "n D"]
    labels: Int[Tensor, " n"]
    name: FeatureName = field(default_factory=FeatureName)

    def __post_init__(self) -> None:
        self.values = self.values.detach()
        if self.values.ndim != 2:
            raise ValueError(
                f"values of shape {tuple(self.values.shape)} ({self.name}): features must be [n, D]; "
                "pool or flatten the tokens of an image first"
            )
        if self.labels.shape != self.values.shape[:1]:
            raise ValueError(
                f"labels of shape {tuple(self.labels.shape)} for {len(self.values)} rows of features ({self.name}): "
                "give one label a sample, -1 where it is unknown"
            )

    def __len__(self) -> int:
        return len(self.values)

    def labelled(self) -> "FeatureSet":
        """The samples whose label is known (label >= 0)."""
        known = self.labels >= 0
        return FeatureSet(values=self.values[known], labels=self.labels[known], name=self.name)

    def some(self, count: int) -> "FeatureSet":
        """At most so many samples, drawn by a fixed seed, in their order: every n-th could be of a single class."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:count].sort().values
        return FeatureSet(values=self.values[chosen], labels=self.labels[chosen], name=self.name)


def concatenate(sets: Sequence[FeatureSet]) -> FeatureSet:
    """Join features of the same samples side by side, as the last four blocks are for a linear probe.

    Args:
        sets: Features of the same samples in the same order.

    Returns:
        Features [n, sum of the D], named by all levels and poolings joined with "+" (a shared word stands once).

    Raises:
        ValueError: Where there are none, or the labels differ.
    """
    if not sets:
        raise ValueError("sets: there are none to join; give at least one")
    for other in sets[1:]:
        if not torch.equal(other.labels, sets[0].labels):
            raise ValueError(
                f"sets: ({other.name}) and ({sets[0].name}) do not hold the same samples in the same order; "
                "take both from one pass"
            )
    words = zip(*((one.name.branch, one.name.level, one.name.pooling) for one in sets), strict=True)
    branch, level, pooling = ("+".join(dict.fromkeys(kind)) for kind in words)
    return FeatureSet(
        values=torch.cat([one.values for one in sets], dim=1),
        labels=sets[0].labels,
        name=FeatureName(branch=branch, level=level, pooling=pooling),
    )
