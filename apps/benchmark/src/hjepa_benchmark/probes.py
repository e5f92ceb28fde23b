"""Probes of a finished run: its levels beside the untrained model and raw pixels, on any shards."""

from pathlib import Path

from rich.console import Console

from hjepa_benchmark.runs import Measured, open_run
from hjepa_eval import write_results
from hjepa_pretrain.evaluation import measure
from hjepa_pretrain.model import load_run
from hjepa_pretrain.results import results_of, results_table


def probe_run(run_dir: Path, measured: Measured, *, output: Path | None) -> None:
    """Measures every level of the model in a run folder and prints the table.

    Args:
        run_dir: holds `config.yaml`, `model.safetensors` and `config.json`.
        measured: images of the kNN bank and the probe, and those that are classified.
        output: also write the results to this JSON file.

    Raises:
        ValueError: the folder holds no finished run, or there is nothing to measure on.
    """
    run = open_run(run_dir, measured)
    found = measure(load_run(run_dir, run.config), run.config, run.train, run.test, run.device)
    results = results_of(found, run.steps, run_dir, run.config)
    console = Console(soft_wrap=True)
    console.print(results_table(results, console.width))
    if output is not None:
        write_results(results, output)
