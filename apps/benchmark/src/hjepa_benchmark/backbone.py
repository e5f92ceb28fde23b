"""Probes of a model of timm, on the same images and with the same measures as those of a run."""

from pathlib import Path

import torch
from rich.console import Console

from hjepa_benchmark.runs import Measured, device_of
from hjepa_data import EvalConfig
from hjepa_eval import Results, evaluate, extract, open_encoder, weights_hash, write_results
from hjepa_pretrain.config import EvaluationConfig
from hjepa_pretrain.evaluation import RANK_SAMPLES, load_images, open_pair
from hjepa_pretrain.results import TRAINED, UNTRAINED, branch_of, results_table


def probe_backbone(name: str, measured: Measured, *, pretrained: bool, output: Path | None) -> None:
    """Measures what a timm model gives without its classifier, at its own size and colours, and prints the table.

    Args:
        name: of the model.
        measured: images of the kNN bank and the probe, and those that are classified; shards have to be given.
        pretrained: take its published weights (a download), not random ones, which are those of seed 0.
        output: also write the results to this JSON file.

    Raises:
        ValueError: timm knows no such model or is not installed, or there is nothing to measure on.
    """
    if measured.train is None or measured.held_out is None:
        raise ValueError(
            f"{name}: there is no such folder; give that of an hjepa-pretrain run, or the name of a timm model with "
            "--train and --eval"
        )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = open_encoder(name, pretrained=pretrained)
    except ImportError as error:
        raise ValueError(str(error)) from error
    said, asked = model.pretrained_cfg, measured.counts(EvaluationConfig())
    assert isinstance(said, dict)
    counts = (asked.train_samples, asked.eval_samples)
    device = device_of()
    train, held_out = open_pair(measured.train, measured.held_out)
    assert held_out is not None
    bank, test = (
        extract(
            model.to(device),
            load_images(source, EvalConfig(size=said["input_size"][1:], max_samples=count)).batches(
                said["mean"], said["std"]
            ),
            branch=branch_of(TRAINED if pretrained else UNTRAINED, "online"),
            pooling="own",
        )["encoder"]
        for source, count in zip((train, held_out), counts, strict=True)
    )
    scores = evaluate(bank, test, ks=(asked.k,), rank_samples=RANK_SAMPLES, device=device)
    about = {"pretrained": pretrained, "side": said["input_size"][-1], "weights": weights_hash(model)[:32]}
    results = Results(model=name, data=measured.held_out, measurements=scores.measurements(), about=about)
    console = Console(soft_wrap=True)
    console.print(results_table(results, console.width))
    if output is not None:
        write_results(results, output)
