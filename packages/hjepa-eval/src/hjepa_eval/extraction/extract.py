"""Features of every sample of a finite stream, in one pass for all the levels that a model gives."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from hjepa_eval.extraction.features import FeatureName, FeatureSet
from hjepa_eval.extraction.gather import gather_names, gather_rows

Features: TypeAlias = Tensor | Mapping[str, Tensor] | Mapping[FeatureName, Tensor]
FeatureFunction: TypeAlias = Callable[[Tensor], Features]


def extract(
    features: FeatureFunction | nn.Module,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    device: torch.device | str | None = None,
    branch: str = "-",
    pooling: str = "-",
    level: str = "encoder",
    gather: bool = False,
) -> dict[str, FeatureSet]:
    """Collect the features of every sample, each exactly once, in the order of the stream.

    The module is put in eval mode for the pass, and every submodule gets its own mode back afterwards; a function
    that is the bound method of a module (``model.features``) counts as that module, and so does one that has a
    ``module`` (BlockFeatures). Nothing is recorded for autograd.

    Batches may hold a third tensor: the number of each sample in the data set, -1 for padding. Padding is left out, a
    number that comes twice counts once, and rows come in the order of the numbers, whatever the processes. Without
    numbers every row counts, in the order of the stream.

    Args:
        features: Maps images [B, ...] to features [B, D], or to a mapping from level, or from a whole FeatureName, to
            features [B, D].
        batches: Images [B, ...], labels [B] (-1 unknown) and, where wanted, sample numbers [B]; finite.
        device: Where images are sent before the call; None: the device of the module's first parameter, and where
            there is none the images stay where they are.
        branch: Name of the encoder branch, for the results.
        pooling: Name of the pooling, for the results.
        level: Name of the level where ``features`` gives a single tensor, and its key in the result.
        gather: Whether the stream is one rank's part: all ranks then get the features of all, those of rank 0 first
            unless sample numbers say otherwise. Does nothing in a single process.

    Returns:
        One FeatureSet a level (float32, on the CPU). A single tensor comes under the key ``level``, a FeatureName
        under its words that are not "-": "block11/mean", "online/2/mean".

    Raises:
        ValueError: Where a module takes more than images, there is no sample, a batch has no labels or not one row a
            label, levels change between batches, or features are not finite.
    """
    _check_inputs(features)
    module = _module_of(features)
    target = _device_of(module) if device is None else torch.device(device)
    rows: dict[str, list[Tensor]] = {}
    names: dict[str, FeatureName] = {}
    labels: list[Tensor] = []
    numbers: list[Tensor] = []
    # Features are copied after the next batch is under way, so that an accelerator does not wait for the copy.
    waiting: dict[str, Tensor] = {}
    with torch.inference_mode(), _eval_mode(module):
        for batch in batches:
            images, batch_labels, *rest = _parts(batch)
            out = features(images if target is None else images.to(target, non_blocking=True))
            named = _named(out, FeatureName(branch=branch, level=level, pooling=pooling))
            _keep(waiting, rows)
            if labels and named.keys() != names.keys():
                raise ValueError(
                    f"levels={sorted(named)}: earlier batches gave {sorted(names)}; give the same each time"
                )
            if rest and rest[0].shape != batch_labels.shape:
                raise ValueError(
                    f"batches: sample numbers of shape {tuple(rest[0].shape)} for labels of shape "
                    f"{tuple(batch_labels.shape)}; give one number a sample"
                )
            if labels and bool(rest) != bool(numbers):
                raise ValueError("batches: some have sample numbers and some have none; give them always or never")
            for key, (name, values) in named.items():
                if values.ndim != 2:
                    raise ValueError(
                        f"features of level {key!r} of shape {tuple(values.shape)}: they must be [B, D]; "
                        "pool or flatten the tokens of an image first"
                    )
                if values.shape[:1] != batch_labels.shape:
                    raise ValueError(
                        f"features of level {key!r} of shape {tuple(values.shape)} for labels of shape "
                        f"{tuple(batch_labels.shape)}: give one row and one label a sample"
                    )
                names[key] = name
                # A copy: a stream may fill the same batch again, and features may be a view of it.
                waiting[key] = values.to(torch.float32, copy=True)
            labels.append(batch_labels.to("cpu", torch.int64, copy=True))
            numbers += [number.to("cpu", torch.int64, copy=True) for number in rest[:1]]
        _keep(waiting, rows)
    return _collect(rows, names, labels, numbers, gather)


def _check_inputs(features: FeatureFunction | nn.Module) -> None:
    """Refuse a module that takes more than images, such as a whole H-JEPA, whose forward is a step of training."""
    if isinstance(features, nn.Module):
        try:
            signature = inspect.signature(features.forward)
        except ValueError:  # of compiled code, which has none
            return
        try:
            signature.bind(None)
        except TypeError as error:
            raise ValueError(
                f"features: {type(features).__name__}.forward is not for images alone ({error}); give a function of "
                "images, as level_features(model) makes of a model with levels"
            ) from None


def _parts(batch: object) -> Sequence[Tensor]:
    """Refuse images alone, whose rows would be taken for images and labels."""
    parts = list(batch) if isinstance(batch, tuple | list) else []
    if len(parts) < 2 or not all(isinstance(part, Tensor) for part in parts[:3]):
        said = [type(part).__name__ for part in parts] if parts else type(batch).__name__
        raise ValueError(
            f"batches: a batch is {said}; give tensors (images, labels) or (images, labels, sample numbers), with "
            "labels of -1 where there are none"
        )
    return parts


def _keep(waiting: dict[str, Tensor], rows: dict[str, list[Tensor]]) -> None:
    for key, values in waiting.items():
        rows.setdefault(key, []).append(values.to("cpu"))
    waiting.clear()


def _collect(
    rows: dict[str, list[Tensor]],
    names: dict[str, FeatureName],
    labels: list[Tensor],
    numbers: list[Tensor],
    gather: bool,
) -> dict[str, FeatureSet]:
    # What is joined outside of inference mode is an ordinary tensor, with which autograd can be used.
    tensors = {key: torch.cat(rows.pop(key)) for key in list(rows)}
    columns = {"labels": torch.cat(labels)} if labels else {}
    if numbers:
        columns["numbers"] = torch.cat(numbers)
    if gather:
        tensors, names = gather_rows(tensors), gather_names(names)
        columns = gather_rows(columns)
    if not tensors:
        raise ValueError("batches: the stream gave no batch, so there is nothing to evaluate; check the data")
    order = _order(columns["numbers"]) if "numbers" in columns else None
    all_labels = columns["labels"] if order is None else columns["labels"][order]
    if not len(all_labels):
        raise ValueError("batches: no sample, or padding only, so there is nothing to evaluate; check the data")
    sets = {}
    for key in list(tensors):
        values = tensors.pop(key)
        values = values if order is None else values[order]
        if not bool(values.isfinite().all()):
            raise ValueError(f"features ({names[key]}) are not finite: the model gives NaN or infinity on some images")
        sets[key] = FeatureSet(values=values, labels=all_labels, name=names[key])
    return sets


def _order(numbers: Tensor) -> Tensor:
    """Positions of the first row of each sample, by sample number, without padding."""
    order = numbers.argsort(stable=True)
    ordered = numbers[order]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return order[first & (ordered >= 0)]


def _named(out: Features, single: FeatureName) -> dict[str, tuple[FeatureName, Tensor]]:
    if isinstance(out, Tensor):
        return {single.level: (single, out)}
    if not isinstance(out, Mapping):
        raise ValueError(f"features give {type(out).__name__}: they must give a tensor, or a mapping from level to one")
    named = {}
    for key, values in out.items():
        if isinstance(key, FeatureName):
            full = replace(key, branch=single.branch) if key.branch == "-" else key
            named["/".join(word for word in (key.branch, key.level, key.pooling) if word != "-")] = (full, values)
        else:
            named[str(key)] = (FeatureName(branch=single.branch, level=str(key), pooling=single.pooling), values)
    if len(named) < len(out):
        raise ValueError(f"levels={[str(key) for key in out]}: two have one name, and one would be lost; rename it")
    return named


def _module_of(features: FeatureFunction | nn.Module) -> nn.Module | None:
    if isinstance(features, nn.Module):
        return features
    owner = getattr(features, "__self__", None) or getattr(features, "module", None)
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
