"""What a run loses when its weights are kept in 8 bits: kNN of every level with both, and the bytes of both."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hjepa_benchmark.runs import open_run, read_config
from hjepa_eval import FeatureSet, knn_accuracy
from hjepa_models.quantization import quantize_int8, weight_bytes
from hjepa_pretrain.config import PretrainConfig
from hjepa_pretrain.evaluation import Images, level_features
from hjepa_pretrain.model import Model, kept_part, load_run
from hjepa_pretrain.uncut import uncut


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelAccuracy:
    """Top-1 accuracy of kNN with the features of one level, as shares of the held-out images.

    Attributes:
        level: name of the level.
        floats: with the weights as they were trained.
        int8: with weights of 8 bits.
        drop: what is lost, percentage points; below 0 where something is gained.
    """

    level: str
    floats: float
    int8: float
    drop: float


def measure_quantization(
    floats: Model, int8: Model, config: PretrainConfig, train: Images, test: Images, device: torch.device
) -> list[LevelAccuracy]:
    """Measures kNN of the mean-pooled features of every level, bank and held-out images by the same weights.

    Args:
        floats: the trained model.
        int8: its copy with quantised weights.
        config: of the run; says k.
        train: labelled images of the bank.
        test: held-out images.
        device: where features are computed.

    Raises:
        ValueError: there are fewer labelled images than k neighbours, or none to classify.
    """
    first, second = (_accuracies(model, config, train, test, device) for model in (floats, int8))
    return [
        LevelAccuracy(level=level, floats=first[level], int8=second[level], drop=100 * (first[level] - second[level]))
        for level in first
    ]


def quantize_run(run_dir: Path, *, train: str | None, held_out: str | None, output: Path | None) -> None:
    """Measures the model in a run folder with its weights in 8 bits and prints the table.

    Args:
        run_dir: holds `config.yaml`, `model.safetensors` and `config.json`.
        train: shards of the kNN bank; None takes those of the run.
        held_out: shards that are classified; None takes those of the run.
        output: also write the rows and the bytes to this JSON file.

    Raises:
        ValueError: the folder holds no finished run, there is nothing to measure on, or torchao is not installed.
    """
    floats = load_run(run_dir, read_config(run_dir))
    int8 = quantize_int8(floats)  # before the images, which take longer, for it may be refused
    run = open_run(run_dir, train=train, held_out=held_out)
    config = run.config
    rows = measure_quantization(floats, int8, config, run.train, run.test, run.device)
    size = (weight_bytes(kept_part(floats)), weight_bytes(kept_part(int8)))
    Console(soft_wrap=True).print(_table(rows, size, config.eval.k))
    if output is not None:
        content = {
            "k": config.eval.k,
            "bytes": {"floats": size[0], "int8": size[1]},
            "rows": [asdict(row) for row in rows],
        }
        output.write_text(json.dumps(content, indent=2) + "\n")


def _accuracies(
    model: Model, config: PretrainConfig, train: Images, test: Images, device: torch.device
) -> dict[str, float]:
    bank, held_out = (level_features(model.to(device), images, config, device) for images in (train, test))
    return {level: _knn(bank[level].labelled(), held_out[level].labelled(), config.eval.k) for level in bank}


def _knn(bank: FeatureSet, test: FeatureSet, k: int) -> float:
    if len(bank) < k:
        raise ValueError(f"eval.k={k}: more than the {len(bank)} labelled training images; give more with --train")
    if not len(test):
        raise ValueError("no held-out image has a label; give some that have with --eval")
    return knn_accuracy(bank.values, bank.labels, test.values, test.labels, ks=(k,))[k]


def _table(rows: list[LevelAccuracy], size: tuple[int, int], k: int) -> Table:
    table = Table(
        title="Weights of 8 bits", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.caption_justify = "left"
    table.caption = (
        f"kNN: k={k}, cosine, top-1, mean-pooled; all weights: "
        f"{size[0]:,} -> {size[1]:,} bytes, {size[0] / size[1]:.2f} times fewer"
    )
    for column in ("level", "kNN floats", "kNN int8", "drop, points"):
        table.add_column(column, justify="left" if column == "level" else "right", no_wrap=True)
    for row in rows:
        table.add_row(row.level, f"{row.floats:.3f}", f"{row.int8:.3f}", f"{row.drop:+.2f}")
    return uncut(table)
