"""Probes of a finished run: its levels beside the untrained model and raw pixels, on any shards."""

import json
from pathlib import Path

import torch
from rich.console import Console

from hjepa_pretrain import settings
from hjepa_pretrain.evaluation import load_pair, measure, open_sources, results_content, results_table
from hjepa_pretrain.model import load_run


def probe_run(run_dir: Path, *, train: str | None, held_out: str | None, output: Path | None) -> None:
    """Measures every level of the model in a run folder and prints the table.

    Args:
        run_dir: holds `config.yaml`, `model.safetensors` and `config.json`.
        train: shards of the kNN bank and the probe; None takes those of the run.
        held_out: shards that are classified; None takes those of the run.
        output: also write the rows to this JSON file.

    Raises:
        ValueError: the folder holds no finished run, or there is nothing to measure on.
    """
    if not (run_dir / settings.CONFIG_FILE).is_file():
        raise ValueError(f"{run_dir}: no {settings.CONFIG_FILE}; give the folder of an hjepa-pretrain run")
    config, _ = settings.load([f"run.dir={run_dir}"])
    config.data.train = train or config.data.train
    config.data.eval = held_out or config.data.eval
    images = load_pair(config, open_sources(config), config.eval.train_samples, config.eval.eval_samples)
    if images is None:
        raise ValueError(f"{run_dir}: the run has no data.eval; give held-out shards with --eval")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = measure(load_run(run_dir, config), config, *images, device)
    results = results_content(rows, config.run.steps, config)
    Console().print(results_table(results))
    if output is not None:
        output.write_text(json.dumps(results, indent=2) + "\n")
