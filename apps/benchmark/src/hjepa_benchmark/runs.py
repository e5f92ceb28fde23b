"""A finished run, opened: configuration, images, what it logged."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from hjepa_pretrain import settings
from hjepa_pretrain.config import PretrainConfig
from hjepa_pretrain.demo import CLASS_NAMES
from hjepa_pretrain.evaluation import Images, load_pair, open_sources

WEIGHTS_FILE = "model.safetensors"


@dataclass(kw_only=True, slots=True)
class Run:
    """What is needed to measure a run.

    Attributes:
        folder: where it lies.
        config: of the run, with other shards where they were asked for.
        train: training images.
        test: held-out images.
        device: where models run.
    """

    folder: Path
    config: PretrainConfig
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
        return self.config.data.eval or "demo composites"

    def class_name(self, label: int) -> str:
        """Name of a class, where there is one."""
        demo = self.config.data.eval is None and 0 <= label < len(CLASS_NAMES)
        return CLASS_NAMES[label] if demo else str(label)


def read_config(folder: Path) -> PretrainConfig:
    """Read the configuration of a run.

    Raises:
        ValueError: the folder holds no run.
    """
    if not (folder / settings.CONFIG_FILE).is_file():
        raise ValueError(f"{folder}: no {settings.CONFIG_FILE}; give the folder of an hjepa-pretrain run")
    return settings.load([f"run.dir={folder}"])[0]


def open_run(folder: Path, *, train: str | None = None, held_out: str | None = None) -> Run:
    """Open a run and load the images that it is measured on.

    Args:
        folder: holds `config.yaml`, `model.safetensors` and `config.json`.
        train: shards that are learned from; None takes those of the run.
        held_out: shards that are classified; None takes those of the run.

    Raises:
        ValueError: the folder holds no finished run, or there is nothing to measure on.
    """
    config = read_config(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(
            f"{folder}: no {WEIGHTS_FILE}, the run is not finished; go on with: hjepa-pretrain run.dir={folder}"
        )
    config.data.train = train or config.data.train
    config.data.eval = held_out or config.data.eval
    images = load_pair(config, open_sources(config), config.eval.train_samples, config.eval.eval_samples)
    if images is None:
        raise ValueError(f"{folder}: the run has no data.eval; give held-out shards with --eval")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Run(folder=folder, config=config, train=images[0], test=images[1], device=device)


def training_cost(folder: Path, batch_size: int) -> dict[str, float | int | None]:
    """Images seen and seconds of training steps, from `metrics.jsonl`; None where it does not say."""
    rows = read_rows(folder)
    seconds, before = 0.0, 0
    for row in rows:
        if "train/step_ms" in row:
            seconds += row["train/step_ms"] / 1e3 * (row["step"] - before)
            before = int(row["step"])
    last = max((int(row["step"]) for row in rows), default=0)
    return {"images_seen": last * batch_size or None, "training_seconds": round(seconds, 1) or None}


def read_rows(folder: Path) -> list[dict[str, float]]:
    """Rows of `metrics.jsonl`; none where the run kept none."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
