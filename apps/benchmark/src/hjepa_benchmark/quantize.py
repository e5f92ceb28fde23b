"""What a run loses when its weights are kept in 8 bits: kNN of every level with both, and the bytes of both."""

from dataclasses import replace
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hjepa_benchmark.runs import Measured, open_run, read_config
from hjepa_eval import FeatureSet, Measurement, bootstrap, knn_predict, plus_minus, write_results
from hjepa_models.quantization import quantize_int8, weight_bytes
from hjepa_pretrain.config import PretrainConfig
from hjepa_pretrain.evaluation import Images, level_features
from hjepa_pretrain.model import Model, kept_part, load_run
from hjepa_pretrain.results import results_of
from hjepa_pretrain.uncut import uncut

FLOATS, INT8, LOST = "floats", "int8", "lost"


def measure_quantization(
    floats: Model, int8: Model, config: PretrainConfig, train: Images, test: Images, device: torch.device
) -> list[Measurement]:
    """Measures kNN of the features of every level, bank and held-out images by the same weights.

    Args:
        floats: the trained model.
        int8: its copy with quantised weights.
        config: of the run; says k.
        train: labelled images of the bank.
        test: held-out images.
        device: where features are computed.

    Returns:
        For each level `knn_<k>/floats` and `knn_<k>/int8`, top-1 accuracies, and `knn_<k>/lost`, the first minus the
        second on the same images.

    Raises:
        ValueError: there are fewer labelled images than k neighbours, or none to classify.
    """
    first, second = (
        [level_features(model.to(device), images, config, device) for images in (train, test)]
        for model in (floats, int8)
    )
    found = []
    for level, bank in first[0].items():
        before, after = (_right(banks[level], tests[level], config.eval.k) for banks, tests in (first, second))
        n_train = len(bank.labelled())
        for way, values in ((FLOATS, before), (INT8, after), (LOST, before.double() - after.double())):
            metric = f"knn_{config.eval.k}/{way}"
            found.append(Measurement.of(metric, bank.name, bootstrap(values), n_train=n_train))
    return found


def quantize_run(run_dir: Path, measured: Measured, *, output: Path | None) -> None:
    """Measures the model in a run folder with its weights in 8 bits and prints the table.

    Args:
        run_dir: holds `config.yaml`, `model.safetensors` and `config.json`.
        measured: images of the kNN bank, and those that are classified.
        output: also write the numbers and the bytes to this JSON file.

    Raises:
        ValueError: the folder holds no finished run, there is nothing to measure on, or torchao is not installed.
    """
    floats = load_run(run_dir, read_config(run_dir))
    int8 = quantize_int8(floats)  # before the images, which take longer, for it may be refused
    run = open_run(run_dir, measured)
    config = run.config
    found = measure_quantization(floats, int8, config, run.train, run.test, run.device)
    size = (weight_bytes(kept_part(floats)), weight_bytes(kept_part(int8)))
    Console(soft_wrap=True).print(_table(found, size, config.eval.k))
    if output is not None:
        results = results_of(found, run.steps, run_dir, config)
        about = {**results.about, "bytes.floats": size[0], "bytes.int8": size[1]}
        write_results(replace(results, about=about), output)


def _right(bank: FeatureSet, test: FeatureSet, k: int) -> Tensor:
    """Which of the labelled held-out images kNN classifies rightly."""
    bank, test = bank.labelled(), test.labelled()
    if len(bank) < k:
        raise ValueError(
            f"{k} neighbours cannot vote: {len(bank)} training images have a label; give more with --train or "
            "--train-samples"
        )
    if not len(test):
        raise ValueError("no held-out image has a label; give some that have with --eval")
    return knn_predict(bank.values, bank.labels, test.values, ks=(k,))[k] == test.labels


def _table(measured: list[Measurement], size: tuple[int, int], k: int) -> Table:
    table = Table(
        title="Weights of 8 bits", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.caption_justify = "left"
    table.caption = (
        f"kNN: k={k}, cosine, top-1, {measured[0].name.branch} branch, {measured[0].n_train} labelled "
        f"training and {measured[0].n} held-out images; after ± half the width of the 95 % interval; all weights: "
        f"{size[0]:,} -> {size[1]:,} bytes, {size[0] / size[1]:.2f} times fewer"
    )
    for column in ("level", "kNN floats", "kNN int8", "lost"):
        table.add_column(column, justify="left" if column == "level" else "right", no_wrap=True)
    levels: dict[str, list[str]] = {}
    for one in measured:
        levels.setdefault(one.name.level, []).append(plus_minus(one))
    for level, cells in levels.items():
        table.add_row(level, *cells)
    return uncut(table)
