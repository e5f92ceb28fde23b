"""What was learned: every level of the trained model beside the untrained one and beside raw pixels."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.nn import functional

from hjepa_data import DataError, EvalConfig, MixtureSource, ShardSource, Source, normalize, open_source
from hjepa_data.random import spread
from hjepa_data.shards.show import read_classes
from hjepa_eval import FeatureName, FeatureSet, Measurement, evaluate, extract, knn_accuracy, rankme
from hjepa_eval import level_features as every_level
from hjepa_eval.probes.whitening import FLOOR
from hjepa_pretrain.config import PretrainConfig
from hjepa_pretrain.demo import CLASS_NAMES
from hjepa_pretrain.demo.shards import demo_shards
from hjepa_pretrain.model import Model, build_model, feature_branch
from hjepa_pretrain.results import PIXELS, TRAINED, UNTRAINED, branch_of
from hjepa_train import DivergedError, Trainer
from hjepa_train.precision import Precision, autocast

logger = logging.getLogger(__name__)

_AND = " + "
_BATCH = 256
_PIXELS = 32
# One number for all rows, so that their ranks compare.
RANK_SAMPLES = 2_000


@dataclass(kw_only=True, slots=True)
class Images:
    """Centre crops in memory, from all parts of a source.

    Attributes:
        pixels: uint8 [n, C, H, W].
        labels: class numbers [n], -1 where unknown.
        classes: names of the classes by number; none where the source knows only numbers.
    """

    pixels: UInt8[Tensor, "n C H W"]
    labels: Int[Tensor, " n"]
    classes: Sequence[str] = ()

    def batches(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised pixels with their labels."""
        for start in range(0, len(self.labels), _BATCH):
            part = slice(start, start + _BATCH)
            yield normalize(self.pixels[part], mean, std), self.labels[part]

    def head(self, count: int) -> "Images":
        """Return `count` of them, from all parts."""
        return self.part(torch.from_numpy(spread(len(self.labels), count)))

    def part(self, chosen: Int[Tensor, " m"]) -> "Images":
        """Return some of them, by number."""
        return replace(self, pixels=self.pixels[chosen], labels=self.labels[chosen])

    def class_name(self, label: int) -> str:
        """Return the name of a class, or its number."""
        return self.classes[label] if 0 <= label < len(self.classes) else str(label)


def load_images(source: Source, config: EvalConfig, classes: Sequence[str] = ()) -> Images:
    """Decode the samples that an evaluation stream gives, and say what it left out."""
    stream = config.build(source)
    batches = list(stream)
    if stream.skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(stream.skipped.items()))
        logger.warning("images left out of the evaluation: %s", reasons)
    if not batches:
        raise DataError("no image could be decoded for the evaluation; check data.eval, or set data.eval=null")
    return Images(
        pixels=torch.cat([batch.views[0] for batch in batches]),
        labels=torch.cat([batch.labels for batch in batches]),
        classes=classes,
    )


def open_sources(config: PretrainConfig) -> tuple[Source, Source | None]:
    """Open the images of a run, training and held-out; without `data.train` those of the demo, made if need be."""
    train, held_out = config.data.train, config.data.eval
    if train is None:
        try:
            train, demo_eval = demo_shards(config.data.cache)
        except (OSError, RuntimeError) as error:  # the latter is pathlib's for a user who has no home
            where = "~/.cache/hjepa" if config.data.cache is None else config.data.cache
            reason = getattr(error, "strerror", error)
            raise DataError(f"data.cache={where}: the demo cannot be written ({reason}); choose another") from error
        held_out = held_out or demo_eval
    return open_pair(train, held_out, config.data.weights or None)


def open_pair(train: str, held_out: str | None, weights: Sequence[float] | None = None) -> tuple[Source, Source | None]:
    """Open images to learn from and held-out ones.

    Args:
        train: what `data.train` names: one source, or several as in ``A + B``; a path that is there is one.
        held_out: likewise; None for none.
        weights: of the sources of `train`.

    Raises:
        DataError: they are not there, or number classes differently.
    """
    opened = [[(name, open_source(name)) for name in _names(names)] for names in (train, held_out)]
    if set.intersection(*map(_places, opened)):
        logger.warning("data.eval=%s: images of data.train find themselves, and accuracies say nothing", held_out)
    trained, measured = ([source for _, source in one] for one in opened)
    _check_classes([*trained, *measured])
    return _joined(trained, weights), _joined(measured) if measured else None


def _names(sources: str | None) -> list[str]:
    """Return the names of several sources; a path that is there may have the mark between them in its own name."""
    parts = [] if sources is None else sources.split(_AND)
    names = []
    while parts:
        joined = (_AND.join(parts[:count]).strip() for count in range(len(parts), 1, -1))
        names.append(next(filter(_is_path, joined), parts[0].strip()))
        parts = parts[names[-1].count(_AND) + 1 :]
    return names


def _is_path(name: str) -> bool:
    """Tell whether there is such a file or folder, or a folder of a pattern that holds the mark of a mixture."""
    path = os.path.expanduser(name)
    folder = os.path.dirname(path)
    return os.path.lexists(path) or (_AND in folder and os.path.isdir(folder))


def _places(opened: Sequence[tuple[str, Source]]) -> set[str]:
    """Where images lie, however it is written: a shard may be under several patterns."""
    return {os.path.realpath(place) for name, source in opened for place in (name, *getattr(source, "shards", ()))}


def _joined(sources: Sequence[Source], weights: Sequence[float] | None = None) -> Source:
    return sources[0] if len(sources) == 1 and weights is None else MixtureSource(sources, weights)


def class_names(source: Source) -> list[str]:
    """Return the names of classes by number; none where the source knows only numbers."""
    if isinstance(source, MixtureSource):
        return next(filter(None, map(class_names, source.sources)), [])
    if isinstance(source, ShardSource):
        local = [shard for shard in source.shards if isinstance(shard, Path)]
        return read_classes(local) if local else []
    return list(getattr(source, "classes", ()))


def _check_classes(sources: Sequence[Source]) -> None:
    """Refuse sources of which one's class 1 is known to be another's class 2."""
    known = [classes for source in sources if (classes := class_names(source))]
    for other in known[1:]:
        if other != known[0]:
            differ = sorted(set(other) ^ set(known[0]))[:3] or known[0][:3]
            raise DataError(
                f"data.train, data.eval: they number classes differently ({', '.join(differ)}, ...), so labels would "
                "not mean the same; give them the same class folders, or make shards of one folder with a split"
            )


def load_pair(
    config: PretrainConfig, sources: tuple[Source, Source | None], train: int, held_out: int
) -> tuple[Images, Images] | None:
    """Load so many training and held-out images; None without held-out shards."""
    if sources[1] is None:
        return None
    crops = config.data.evaluation()
    demo = config.data.train is None and config.data.eval is None
    classes = CLASS_NAMES if demo else class_names(sources[1]) or class_names(sources[0])
    return (
        load_images(sources[0], replace(crops, max_samples=train), classes),
        load_images(sources[1], replace(crops, max_samples=held_out), classes),
    )


def measure(
    model: Model, config: PretrainConfig, train: Images, test: Images, device: torch.device
) -> list[Measurement]:
    """Measure every level of a trained model, of the same model untrained, and raw pixels.

    Args:
        model: the trained model.
        config: of the run; its seed makes the untrained model.
        train: labelled images for the kNN bank and the linear probe.
        test: held-out images.
        device: where features are computed, and measured.

    Returns:
        Accuracies and ranks with their intervals; of raw pixels no ranks, to which none compares.
    """
    found = []
    for subject, one in ((TRAINED, model), (UNTRAINED, build_model(config))):
        bank, held_out = (
            level_features(one.to(device), images, config, device, subject=subject) for images in (train, test)
        )
        for level in bank:
            found += _measured(bank[level], held_out[level], config, device)
    bank, held_out = (extract(_pixels, images.batches(config.data.mean, config.data.std), branch="-", level=PIXELS,
                              pooling="flatten") for images in (train, test))  # fmt: skip
    return found + _measured(bank[PIXELS], held_out[PIXELS], config, device, pixels=True)


def level_features(
    model: Model, images: Images, config: PretrainConfig, device: torch.device, *, subject: str = TRAINED
) -> Mapping[str, FeatureSet]:
    """Extract the features of every level in one pass, as `feature_function` names them, by level."""
    model.eval()
    features = feature_function(model, subject=subject, precision=config.eval.precision)
    found = extract(features, images.batches(config.data.mean, config.data.std), device=device)
    model.train()
    return {one.name.level: one for one in found.values()}


def feature_function(
    model: Model, *, subject: str = TRAINED, precision: Precision = Precision.fp32
) -> Callable[[Tensor], dict[FeatureName, Tensor]]:
    """Return what maps normalised images to the features of every level, of the target branch where there is one.

    Tokens are pooled by their mean; what the model gives as a vector has the pooling `none`.

    Args:
        model: in evaluation mode when it is called.
        subject: trained or untrained, for the name of the branch.
        precision: arithmetic of the model.

    Raises:
        DivergedError: when it is called, where features are not finite.
    """
    branch = feature_branch(model)
    levels = every_level(model, branches=(branch,))

    def features(images: Tensor) -> dict[FeatureName, Tensor]:
        with autocast(precision, images.device):
            found = levels(images)
        _finite({name.level: values for name, values in found.items()})
        return {replace(name, branch=branch_of(subject, branch)): values for name, values in found.items()}

    return features


def _measured(
    train: FeatureSet, test: FeatureSet, config: PretrainConfig, device: torch.device, *, pixels: bool = False
) -> list[Measurement]:
    # To whiten so many dimensions as pixels takes longer than all else of the table.
    ranks, whitening = (0, None) if pixels else (RANK_SAMPLES, FLOOR)
    scores = evaluate(train, test, ks=(config.eval.k,), whitening=whitening, rank_samples=ranks, device=device)
    return scores.measurements()


def _finite(features: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return features, or say of those that are not finite that the model has diverged."""
    for level, values in features.items():
        if not bool(values.isfinite().all()):
            raise DivergedError(
                f"features of level {level} are not finite: the model has diverged; start anew with a lower "
                "trainer.learning_rate.value"
            )
    return features


def _pixels(images: Tensor) -> Tensor:
    return functional.interpolate(images, size=(_PIXELS, _PIXELS), mode="area").flatten(1)


class OnlineEvaluation:
    """Measures every level on the way, in one pass: `eval/<level>/knn_<k>` and `eval/<level>/rankme`.

    Args:
        config: of the run.
        train: bank of the kNN; RankMe is theirs.
        test: held-out images.
    """

    def __init__(self, config: PretrainConfig, train: Images, test: Images) -> None:
        self._config = config
        self._train, self._test = train, test

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        """Return the measurements of the model as it is."""
        config, k, device = self._config, self._config.eval.k, trainer.world.device
        trainer.module.eval()
        with autocast(config.eval.precision, device):
            banks, tests = (
                extract(
                    lambda pixels: _finite(trainer.call("all_features", pixels)),
                    images.batches(config.data.mean, config.data.std),
                    device=device,
                )
                for images in (self._train, self._test)
            )
        trainer.module.train()
        row: dict[str, float] = {}
        for level, features in banks.items():
            row[f"eval/{level}/rankme"] = float(rankme(features.some(RANK_SAMPLES).values.to(device)))
            bank, test = features.labelled(), tests[level].labelled()
            if len(bank) >= k and len(test):
                on_device = [part.to(device) for part in (bank.values, bank.labels, test.values, test.labels)]
                found = knn_accuracy(*on_device, ks=(k,))
                row[f"eval/{level}/knn_{k}"] = found[k]
        return row
