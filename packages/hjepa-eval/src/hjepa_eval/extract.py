"""Features of every sample of a finite stream, in one pass for all the levels that a model gives."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

FeatureFunction = Callable[[Tensor], Tensor | Mapping[str, Tensor]]


@dataclass(kw_only=True, slots=True, frozen=True)
class FeatureName:
    """Where features come from; printed beside every number that is made from them.

    Attributes:
        branch: The encoder that gave them: "target", "online", or a word for what has no branches ("pixels").
        level: The hierarchy level, "encoder" for the encoder's own output.
        pooling: How the tokens of an image became one vector: "mean", "flatten", ...
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


def extract(
    features: FeatureFunction | nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | str | None = None,
    branch: str = "-",
    pooling: str = "-",
    level: str = "encoder",
) -> dict[str, FeatureSet]:
    """Collect the features of every sample, each exactly once, in the order of the stream.

    The module is put in eval mode for the pass, and every submodule gets its own mode back afterwards; a function
    that is the bound method of a module (``model.features``) counts as that module. Nothing is recorded for autograd.

    Args:
        features: Maps images [B, ...] to features [B, D], or to a mapping from level to features [B, D].
        batches: Pairs of images [B, ...] and labels [B] (-1 unknown); finite.
        device: Where images are sent before the call; None: the device of the module's first parameter, and where
            there is none the images stay where they are.
        branch: Name of the encoder branch, for the results.
        pooling: Name of the pooling, for the results.
        level: Name of the level where ``features`` gives a single tensor, and its key in the result.

    Returns:
        One FeatureSet a level (float32, on the CPU); a single tensor comes under the key ``level``.

    Raises:
        ValueError: Where there is no sample, a batch has not one row a label, levels change between batches, or
            features are not finite.
    """
    module = _module_of(features)
    target = _device_of(module) if device is None else torch.device(device)
    rows: dict[str, list[Tensor]] = {}
    labels: list[Tensor] = []
    with torch.inference_mode(), _eval_mode(module):
        for images, batch_labels in batches:
            out = features(images if target is None else images.to(target, non_blocking=True))
            named = out if isinstance(out, Mapping) else {level: out}
            if labels and named.keys() != rows.keys():
                raise ValueError(
                    f"levels={sorted(named)}: earlier batches gave {sorted(rows)}; give the same each time"
                )
            for key, values in named.items():
                if values.shape[:1] != batch_labels.shape:
                    raise ValueError(
                        f"features of level {key!r} of shape {tuple(values.shape)} for labels of shape "
                        f"{tuple(batch_labels.shape)}: give one row and one label a sample"
                    )
                rows.setdefault(key, []).append(values.detach().to("cpu", torch.float32))
            labels.append(batch_labels.to("cpu", torch.int64))
    if not labels:
        raise ValueError("batches: the stream gave no batch, so there is nothing to evaluate; check the data")
    # Clones made outside inference mode are ordinary tensors, with which autograd can be used.
    all_labels = torch.cat(labels).clone()
    sets = {}
    for key in list(rows):
        name = FeatureName(branch=branch, level=key, pooling=pooling)
        values = torch.cat(rows.pop(key)).clone()
        if not bool(values.isfinite().all()):
            raise ValueError(f"features ({name}) are not finite: the model gives NaN or infinity on some images")
        sets[key] = FeatureSet(values=values, labels=all_labels, name=name)
    return sets


def _module_of(features: FeatureFunction | nn.Module) -> nn.Module | None:
    owner = features if isinstance(features, nn.Module) else getattr(features, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _device_of(module: nn.Module | None) -> torch.device | None:
    parameter = None if module is None else next(module.parameters(), None)
    return None if parameter is None else parameter.device


@contextmanager
def _eval_mode(module: nn.Module | None) -> Iterator[None]:
    modes = [] if module is None else [(part, part.training) for part in module.modules()]
    if module is not None:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
