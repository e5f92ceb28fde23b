"""A finished run, opened: configuration, images, what it logged."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hjepa_data import DataError, Source
from hjepa_eval import read_results
from hjepa_pretrain import settings
from hjepa_pretrain.config import EvaluationConfig, PretrainConfig
from hjepa_pretrain.evaluation import Images, load_pair, open_sources
from hjepa_pretrain.model import Model, build_model, command
from hjepa_pretrain.results import RESULTS_FILE, data_name
from hjepa_train import Checkpoint
from hjepa_train.checkpoint.files import DamagedError


@dataclass(kw_only=True, slots=True, frozen=True)
class Measured:
    """What to measure on; None takes what the run took.

    Attributes:
        train: shards that are learned from.
        held_out: shards that are classified.
        train_samples: at most so many of the first.
        eval_samples: at most so many of the second.
    """

    train: str | None = None
    held_out: str | None = None
    train_samples: int | None = None
    eval_samples: int | None = None

    def given(self) -> list[str]:
        """Settings of the run that these take the place of."""
        of = {
            "data.train": self.train,
            "data.eval": self.held_out,
            "eval.train_samples": self.train_samples,
            "eval.eval_samples": self.eval_samples,
        }
        return [setting for setting, value in of.items() if value is not None]

    def counts(self, config: EvaluationConfig) -> EvaluationConfig:
        """Return the settings with these numbers of images.

        Raises:
            ValueError: for too few.
        """
        least = max(2, config.k)
        if self.train_samples is not None and self.train_samples < least:
            raise ValueError(
                f"--train-samples={self.train_samples}: too few where {config.k} neighbours vote; allowed: {least} and "
                "more"
            )
        if self.eval_samples is not None and self.eval_samples < 1:
            raise ValueError(f"--eval-samples={self.eval_samples}: too few; allowed: 1 and more")
        return replace(
            config,
            train_samples=config.train_samples if self.train_samples is None else self.train_samples,
            eval_samples=config.eval_samples if self.eval_samples is None else self.eval_samples,
        )


@dataclass(kw_only=True, slots=True)
class Run:
    """What is needed to measure a run.

    Attributes:
        folder: where it lies.
        config: of the run, with other shards where they were asked for.
        steps: those that its weights have behind them; a run that goes on or stopped early was given others.
        train: training images.
        test: held-out images.
        device: where models run.
    """

    folder: Path
    config: PretrainConfig
    steps: int
    train: Images
    test: Images
    device: torch.device

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.folder.resolve().name

    @property
    def data(self) -> str:
        """What it is measured on, for results."""
        return data_name(self.config)


def read_config(folder: Path) -> PretrainConfig:
    """Read the configuration of a run.

    Raises:
        ValueError: the folder holds no run.
    """
    if not (folder / settings.CONFIG_FILE).is_file():
        raise ValueError(f"{folder}: no {settings.CONFIG_FILE}; give the folder of an hjepa-pretrain run")
    return settings.load([f"run.dir={folder}"])[0]


def finished_steps(folder: Path) -> int:
    """Steps behind the weights of a run, as its own results say, which are written after them.

    Raises:
        ValueError: the run has not come to its end.
    """
    path = folder / RESULTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: no {RESULTS_FILE}, the run is not finished; go on with: {command(folder)}")
    try:
        return int(str(read_results(path).about.get("steps")))
    except ValueError as error:
        why = f"damaged, or an earlier version wrote it ({str(error).removeprefix(f'{path}: ')})"
        raise ValueError(f"{path}: {why}; write it again with: {command(folder)}") from error


def measured_by(config: PretrainConfig) -> dict[str, str | int | float | bool | None]:
    """What the numbers of a suite depend on beside the weights and the suite."""
    return {
        "k": config.eval.k,
        "eval.precision": str(config.eval.precision),
        "eval.train_samples": config.eval.train_samples,
        "eval.eval_samples": config.eval.eval_samples,
        "data.train": config.data.train,
        "data.eval": config.data.eval,
        "data.eval_crop_fraction": config.data.eval_crop_fraction,
    }


def open_run(folder: Path, measured: Measured | None = None) -> Run:
    """Open a run with its number of threads, and load the images that it is measured on.

    Args:
        folder: holds `config.yaml`, `results.json`, `model.safetensors` and `config.json`.
        measured: on what; None is all as in the run.

    Raises:
        ValueError: the folder holds no finished run, or there is nothing to measure on.
    """
    config, steps = read_config(folder), finished_steps(folder)
    measured = measured or Measured()
    if measured.train is not None:
        # Weights are of the sources that the run learned from.
        config.data.train, config.data.weights = measured.train, ()
    if measured.held_out is not None:
        # Nothing was chosen on other images.
        config.data.eval, config.early_stop = measured.held_out, None
    config.eval = measured.counts(config.eval)
    images = load_pair(config, open_data(folder, config), config.eval.train_samples, config.eval.eval_samples)
    assert images is not None
    torch.set_num_threads(config.run.threads or torch.get_num_threads())
    return Run(
        folder=folder, config=config, steps=steps, train=images[0], test=images[1], device=device_of(config.run.device)
    )


def device_of(asked: str = "auto") -> torch.device:
    """Where something is measured: on a GPU where there is one, unless `run.device` is cpu."""
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


def open_data(folder: Path, config: PretrainConfig) -> tuple[Source, Source]:
    """Open the images that a run learned from and those that it is measured on, and read none.

    Args:
        folder: of the run, for what is said.
        config: of the run, with other shards where they were asked for.

    Raises:
        ValueError: they are not there, or there are no held-out ones.
    """
    try:
        train, held_out = open_sources(config)
    except DataError as error:
        again = "paths are as the run was given them: go where it was started, or give --train and --eval"
        raise ValueError(f"{folder}: {error}; {again}") from error
    if held_out is None:
        raise ValueError(
            f"{folder}: the run has no data.eval; give held-out shards with --eval of suite, probes or quantize"
        )
    return train, held_out


def load_checkpoint(path: Path) -> Model:
    """Read the model of a checkpoint of a run that may not have ended: a `load_folder` for `hjepa_eval.open_encoder`.

    Args:
        path: `RUN/checkpoints/step_...`; the configuration is that of the run.

    Raises:
        ValueError: there is no run around it, or it is no whole checkpoint of its model.
    """
    config = read_config(path.parent.parent)
    model = build_model(config)
    try:
        checkpoint = Checkpoint.open(path)
        saved = checkpoint.tensors()
    except (DamagedError, OSError) as error:
        raise ValueError(f"{path}: no whole checkpoint ({error}); give RUN/checkpoints/step_...") from error
    kept = checkpoint.model.items()
    shapes = {name.removeprefix("model."): shape for name, shape in kept if name.startswith("model.")}
    if shapes != {name: list(tensor.shape) for name, tensor in model.state_dict().items()}:
        raise ValueError(f"{path}: its weights are not those of the model of {path.parent.parent}; take its own run")
    model.load_state_dict({name: saved[f"model/model.{name}"] for name in shapes})
    return model.eval()


def training_seconds(rows: Iterable[Mapping[str, float]]) -> Iterator[tuple[Mapping[str, float], float]]:
    """Each row of `metrics.jsonl` with the seconds that training steps have taken until then."""
    seconds, before = 0.0, 0.0
    for row in rows:
        if "train/step_ms" in row:
            seconds += row["train/step_ms"] / 1e3 * (row["step"] - before)
            before = row["step"]
        yield row, seconds
