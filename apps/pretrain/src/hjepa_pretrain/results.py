"""`results.json` of a run: what was measured, in the schema of hjepa-eval, and the table of it."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hjepa_eval import FeatureName, Measurement, Results, plus_minus
from hjepa_eval import read_results as read_file
from hjepa_eval.probes.whitening import KNN, WHITE_KNN
from hjepa_pretrain.config import PretrainConfig
from hjepa_pretrain.uncut import uncut

logger = logging.getLogger(__name__)

RESULTS_FILE = "results.json"
TRAINED, UNTRAINED, PIXELS = "trained", "untrained", "pixels"
COLUMNS = ("features", "branch", "level", "pooling", "D", "kNN", "linear", "RankMe", "eff.rank", "whitened kNN")
# Those of a terminal of 80 columns; a wider one has them all, as the page.
_NARROW, _WIDE = COLUMNS[:-2], 106
_NAMES = 4


def branch_of(subject: str, branch: str) -> str:
    """Return what results call a branch of the trained or the untrained model."""
    return branch if subject == TRAINED else f"{subject} {branch}"


def subject_of(branch: str) -> str:
    """Return which of the three the features of a branch are of."""
    return PIXELS if branch == "-" else UNTRAINED if branch.startswith(UNTRAINED) else TRAINED


def data_name(config: PretrainConfig) -> str:
    """Return what a run is measured on, for results."""
    return config.data.eval or ("demo composites" if config.data.train is None else "nothing")


def results_of(measured: Sequence[Measurement], steps: int, folder: Path, config: PretrainConfig) -> Results:
    """Return what `results.json` holds.

    Args:
        measured: what was measured.
        steps: those that the weights have behind them.
        folder: of the run.
        config: of the run.
    """
    about = {"recipe": config.recipe, "encoder": config.model, "seed": config.run.seed, **_measured(steps, config)}
    # The other measurements on the way are of training images.
    if (
        config.early_stop is not None
        and config.early_stop.metric.startswith("eval/")
        and "knn" in config.early_stop.metric
    ):
        about["early_stop"] = config.early_stop.metric
    return Results(model=folder.resolve().name, data=data_name(config), measurements=measured, about=about)


def _measured(steps: int, config: PretrainConfig) -> dict[str, Any]:
    """Return what numbers depend on, apart from the training."""
    how = {f"eval.{key}": value for key, value in asdict(config.eval).items()}
    crop = config.data.eval_crop_fraction
    data = {"data.train": config.data.train, "data.eval": config.data.eval, "data.eval_crop_fraction": crop}
    return {"steps": steps, **how, **data}


def measured_before(config: PretrainConfig, steps: int, folder: Path) -> Results | None:
    """Return the results of this step, if they were measured before, and in the same way."""
    path = folder / RESULTS_FILE
    if not path.is_file():
        return None
    try:
        results = read_file(path)
    except ValueError as error:
        logger.warning("%s; it is written again", error)
        return None
    same = _measured(steps, config).items() <= results.about.items()
    return results if same else None


def result_rows(results: Results) -> list[list[str]]:
    """Return the results as rows of cells with `COLUMNS`."""
    rows = []
    for name, found in _by_name(results).items():
        subject = subject_of(name.branch)
        width = next((str(one.details["width"]) for one in found.values() if "width" in one.details), "-")
        knn, white = (
            next((one for metric, one in found.items() if metric.startswith(start)), None) for start in (KNN, WHITE_KNN)
        )
        numbers = [knn, *(found.get(metric) for metric in ("linear", "rankme", "effective_rank")), white]
        branch = name.branch.removeprefix(branch_of(subject, ""))
        rows.append([subject, branch, name.level, name.pooling, width, *map(plus_minus, numbers)])
    return rows


def results_caption(results: Results, *, whitened: bool = False) -> str:
    """Say what the numbers of a table were measured on; and what whitened kNN is, where that is shown."""
    measured = {one.metric: one for one in results.measurements}
    said = [f"step {results.about['steps']}"] if "steps" in results.about else []
    if "linear" in measured:
        k = next((metric.removeprefix("knn_") for metric in measured if metric.startswith("knn_")), "-")
        one = measured["linear"]
        said += [
            f"kNN: k={k}, cosine, top-1",
            f"linear: logistic regression, top-1; {one.n_train} labelled training and {one.n} held-out images",
        ]
        if whitened and any(metric.startswith(WHITE_KNN) for metric in measured):
            said.append("whitened kNN: of features all of whose directions have nearly the same variance")
    else:
        said.append("without labels no accuracies")
    if "early_stop" in results.about:
        said.append(f"the end was chosen by {results.about['early_stop']}, on some of the same held-out images")
    if "rankme" in measured:
        said.append(f"ranks of {measured['rankme'].n} training images")
    return "; ".join([*said, "after ± half the width of the 95 % interval"])


def results_table(results: Results, width: int) -> Table:
    """Return the results as a table for a terminal of so many columns."""
    columns = COLUMNS if width >= _WIDE else _NARROW
    table = Table(title="What was learned", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    caption = results_caption(results, whitened=columns is COLUMNS)
    if columns is _NARROW:
        caption += f"; left out in fewer than {_WIDE} columns: {', '.join(COLUMNS[len(_NARROW) :])}"
    table.caption, table.caption_justify = caption, "left"
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < _NAMES else "right", no_wrap=True)
    rows = [row[: len(columns)] for row in result_rows(results)]
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        ends = following is None or following[0] != row[0]
        table.add_row(*row, style="bold" if row[0] == TRAINED else None, end_section=ends)
    return uncut(table)


def _by_name(results: Results) -> Mapping[FeatureName, dict[str, Measurement]]:
    found: dict[FeatureName, dict[str, Measurement]] = {}
    for one in results.measurements:
        found.setdefault(one.name, {})[one.metric] = one
    return found
