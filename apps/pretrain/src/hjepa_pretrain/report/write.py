"""Gathers what a run left and writes `report.html`."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from hjepa_data import normalize
from hjepa_data.transforms.crop import NUMBERS_PER_CROP, crop_numbers, crop_plans, cut_views
from hjepa_data.transforms.decode import Upright
from hjepa_eval import Results
from hjepa_models import Pooling, Prediction, coarsen
from hjepa_models.crops import relate_crops
from hjepa_pretrain.baselines import BaselineKind
from hjepa_pretrain.config import PretrainConfig
from hjepa_pretrain.evaluation import Images
from hjepa_pretrain.model import Model
from hjepa_pretrain.report import figures
from hjepa_pretrain.report.page import Section, code, notice, page, table
from hjepa_pretrain.results import COLUMNS, TRAINED, result_rows, results_caption

_SHOWN = 8
_QUERIES, _NEIGHBOURS = 6, 7


def write_report(
    folder: Path,
    config: PretrainConfig,
    model: Model,
    images: tuple[Images, Images] | None,
    results: Results,
) -> Path:
    """Write the page of a run: one file that opens offline.

    Args:
        folder: of the run; its `metrics.jsonl` and `config.yaml` are read.
        config: of the run.
        model: the trained model.
        images: training and held-out images, or None without held-out data.
        results: what `results.json` holds.

    Returns:
        The path of the page.
    """
    rows = read_rows(folder)
    sections = [_learned(results), loss_section(rows), rank_section(rows)]
    if images is not None:
        train, test = images
        sections += [*_masks(config, test), *_views(config, test)]
        sections += [feature_section(config, model, test), neighbour_section(config, model, train, test)]
    written = (folder / "config.yaml").read_text(encoding="utf-8")
    sections += [_speed(rows), Section(title="Configuration", body=code(written))]
    path = folder / "report.html"
    subtitle = f"{config.recipe}, {config.model}, {results.about['steps']:,} steps of {config.data.batch_size} images"
    path.write_text(page(f"hjepa run {folder.resolve().name}", subtitle, sections), "utf-8")
    return path


def read_rows(folder: Path, steps: float = math.inf) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl` up to a step; none where the run kept none.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [row for row in rows if row["step"] <= steps]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); remove the line, or the file: curves are drawn of it") from error


def _learned(results: Results) -> Section:
    if not results.measurements:
        note = "Nothing was measured: give data.eval, labels for accuracies, and leave eval.at_end=true."
        return Section(title="What was learned", note=note)
    rows = result_rows(results)
    body = table(COLUMNS, rows, own=[row[0] == TRAINED for row in rows])
    note = f"Frozen features, {results_caption(results, whitened=True)}. "
    note += "The same encoder untrained and raw pixels are what to beat."
    return Section(title="What was learned", note=note, body=body)


def loss_section(rows: list[dict[str, Any]]) -> Section:
    """Losses and accuracies on the way, from the rows of `metrics.jsonl`."""
    terms = sorted({key for row in rows for key in row if key.startswith("train/loss_level_")})
    levels = [key for key in terms if key.rpartition("_")[2].isdigit()]
    measured = sorted({key for row in rows for key in row if key.startswith("eval/")})
    knn = [key for key in measured if "/knn_" in key]
    ranks = [key for key in measured if key.endswith("/rankme")]
    window = max(1, len(rows) // 40)
    drawn = (
        figures.curves(rows, ["train/loss"], "training loss", smooth=window),
        figures.curves(rows, levels, "predicted levels, unweighted", smooth=window),
        # A baseline's only term is its loss.
        *(
            figures.curves(rows, [key], f"{key.removeprefix('train/loss_level_')}, unweighted", smooth=window)
            for key in terms
            if key not in levels and len(terms) > 1
        ),
        figures.curves(rows, knn, "kNN accuracy on the way"),
        figures.curves(rows, ranks, "RankMe of frozen features on the way"),
    )
    note = (
        "The loss of a JEPA is no measure of quality: its targets move. It may rise while the features improve; look "
        "at kNN, linear accuracy and RankMe."
    )
    return Section(title="Loss and accuracy", note=note, pictures=[picture for picture in drawn if picture])


def rank_section(rows: list[dict[str, Any]]) -> Section:
    """RankMe, effective rank and spread on the way, and the collapse alarm."""
    pictures = []
    for measure, title in (("rankme", "RankMe"), ("effective_rank", "centred effective rank"), ("spread", "spread")):
        keys = sorted(
            {key for row in rows for key in row if key.startswith("monitor/") and key.endswith(f"/{measure}")}
        )
        drawn = figures.curves(rows, keys, f"{title} of the embeddings")
        pictures += [drawn] if drawn else []
    readings = [row for row in rows if "monitor/alarm" in row]
    alarms = [str(row["step"]) for row in readings if row["monitor/alarm"]]
    text = "No collapse alarm." if readings else "Nobody looked for a collapse: metrics.jsonl has no monitor/alarm."
    if alarms:
        text = f"Collapse alarm at {len(alarms)} steps: {', '.join(alarms[:10])}{', ...' if len(alarms) > 10 else '.'}"
    note = "A collapsed level has a rank near 1 and no spread; compare ranks within one run only."
    return Section(
        title="RankMe of each level",
        note=note,
        pictures=pictures,
        body=notice(text, alarm=bool(alarms or not readings)),
    )


def _masks(config: PretrainConfig, test: Images) -> list[Section]:
    pixels = config.baseline is not None and config.baseline.kind is BaselineKind.mae
    if not config.hides_patches:
        return []
    shown = test.head(_SHOWN)
    drawn = config.masks.build(config.run.seed)(0, torch.arange(len(shown.labels)))
    context, targets = drawn.context, drawn.targets
    grid = config.hjepa.encoder.grid
    picture = figures.masks(_arrays(shown.pixels), (grid[-2], grid[-1]), context.numpy(), targets.numpy())
    note = (
        f"Of {config.hjepa.encoder.num_patches} patches the context encoder sees {context.shape[1]}; the predictor has "
        f"to predict the {'pixels' if pixels else 'features'} of {targets.shape[1]} blocks of {targets.shape[2]}."
    )
    return [Section(title="Masks", note=note, pictures=[picture])]


def _views(config: PretrainConfig, test: Images) -> list[Section]:
    """What the predictor sees and has to predict, on held-out images and crops as in training, without the colours."""
    if config.baseline is not None or config.hjepa.predicts is not Prediction.view:
        return []
    images = _arrays(test.head(_SHOWN).pixels)
    groups, (height, width) = config.data.stream(1).views, images.shape[1:3]
    views = [np.empty((len(images), 3, *group.size), np.uint8) for group in groups for _ in range(group.count)]
    crops = np.empty((len(views), len(images), NUMBERS_PER_CROP), np.float32)
    for row, image in enumerate(images):
        upright = Upright(image=Image.fromarray(image), turn=None, width=width, height=height)
        plans = crop_plans(upright, groups, (config.run.seed, row))
        cut_views(upright, plans, views, row)
        crops[:, row] = crop_numbers(upright, plans)
    seen, wanted = (torch.from_numpy(crop) for crop in crops[:2])
    grid = (config.hjepa.encoder.grid[-2], config.hjepa.encoder.grid[-1])
    inside = relate_crops(wanted, seen, grid).inside.bool().reshape(-1, *grid).numpy()
    first, second = (view.transpose(0, 2, 3, 1) for view in views[:2])
    note = (
        "The predictor sees the features of one view (blue) and has to predict those of the other (orange), and the "
        "other way round, knowing where both were cut. Patches outside of the seen view do not count."
    )
    note += "" if config.color is None else " In training the colours of the views differ."
    picture = figures.views(images, (first, second), crops[:2], inside)
    return [Section(title="Views", note=note, pictures=[picture])]


@torch.no_grad()
def feature_section(config: PretrainConfig, model: Model, test: Images) -> Section:
    """The tokens of every level on some images, coloured by their principal components."""
    shown = test.head(_SHOWN)
    model.eval()
    found = model.all_features(_normalized(config, model, shown), pool="none")
    on_grid = config.hjepa.pyramid.pooling is not Pooling.sequence
    levels = {}
    for level in ("encoder", *range(config.hjepa.pyramid.levels if on_grid else 1)):
        if level not in found:
            continue
        encoder = config.hjepa.encoder
        grid = coarsen(encoder.output_grid, level) if isinstance(level, int) else encoder.grid
        name = f"level {level}" if isinstance(level, int) else level
        tokens = found[level].float().cpu().numpy()
        levels[name] = tokens.reshape(len(tokens), *grid, -1)
    note = "Each token coloured by the first three principal components of its level over these images."
    return Section(title="Features", note=note, pictures=[figures.pca_features(_arrays(shown.pixels), levels)])


@torch.no_grad()
def neighbour_section(config: PretrainConfig, model: Model, train: Images, test: Images) -> Section:
    """Held-out images beside their nearest training images."""
    queries = test.head(_QUERIES)
    bank = train.head(5_000)
    model.eval()
    parts = torch.split(torch.arange(len(bank.labels)), 256)
    keys = torch.cat([_embed(config, model, bank, part) for part in parts])
    query = _embed(config, model, queries, torch.arange(len(queries.labels)))
    found = (query @ keys.T).topk(min(_NEIGHBOURS, len(keys))).indices
    labelled = bool((queries.labels >= 0).all() and (bank.labels >= 0).all())
    names = [queries.class_name(label) for label in queries.labels.tolist()]
    known = [[queries.class_name(label) for label in row] for row in bank.labels[found].tolist()]
    picture = figures.neighbours(
        _arrays(queries.pixels),
        np.stack([_arrays(bank.pixels[row]) for row in found]),
        names if labelled else None,
        known if labelled else None,
    )
    note = "Held-out images and the nearest training images by cosine of the pooled encoder features"
    note += "; green: same class." if labelled else "."
    return Section(title="Nearest neighbours", note=note, pictures=[picture])


def _speed(rows: list[dict[str, Any]]) -> Section:
    drawn = figures.curves(rows, ["train/images_per_second"], "images per second")
    rates = figures.curves(rows, ["train/lr"], "learning rate")
    return Section(title="Speed and rates", pictures=[picture for picture in (drawn, rates) if picture])


def _embed(config: PretrainConfig, model: Model, images: Images, chosen: Tensor) -> Tensor:
    features = model.features(_normalized(config, model, images.part(chosen)))
    return functional.normalize(features.float().cpu(), dim=-1)


def _normalized(config: PretrainConfig, model: Model, images: Images) -> Tensor:
    device = next(model.parameters()).device
    return normalize(images.pixels.to(device), config.data.mean, config.data.std)


def _arrays(pixels: Tensor) -> figures.Array:
    return pixels.permute(0, 2, 3, 1).numpy()
