"""Probes of a finished run: its levels beside the untrained model and raw pixels, on any shards."""

import json
from pathlib import Path

from rich.console import Console

from hjepa_benchmark.runs import open_run
from hjepa_pretrain.evaluation import measure, results_content, results_table
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
    run = open_run(run_dir, train=train, held_out=held_out)
    rows = measure(load_run(run_dir, run.config), run.config, run.train, run.test, run.device)
    results = results_content(rows, run.steps, run.config)
    Console(soft_wrap=True).print(results_table(results))
    if output is not None:
        output.write_text(json.dumps(results, indent=2) + "\n")
