"""What a narrow terminal is shown."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from hjepa_eval import FeatureName, Measurement, Results
from hjepa_pretrain import settings
from hjepa_pretrain.results import result_rows, results_caption, results_of, results_table

NAME = FeatureName(branch="untrained online", level="encoder", pooling="mean")
SEEN = {"n": 12, "n_train": 24, "method": "bootstrap", "details": {"width": 1024}}
ACCURACIES = [
    Measurement(metric="knn_20", name=NAME, value=0.123, low=0.113, high=0.135, **SEEN),
    Measurement(metric="linear", name=NAME, value=0.456, low=0.406, high=0.496, **SEEN),
]
RANKS = [
    Measurement(metric="rankme", name=NAME, value=17.8, low=16.5, high=19.1, method="jackknife", n=23),
    Measurement(metric="effective_rank", name=NAME, value=19.7, n=23),
]


def results(measured):
    return Results(model="run", data="demo", measurements=measured, about={"steps": 2})


def test_a_narrow_terminal_cuts_no_cell():
    shown = io.StringIO()
    Console(file=shown, width=30, soft_wrap=True).print(results_table(results(ACCURACIES + RANKS), 30))
    assert "untrained online encoder mean 1024 0.123±.011 0.456±.045 17.8±1.3" in " ".join(shown.getvalue().split())


@pytest.mark.parametrize("width", [80, 106])
def test_the_table_fits_a_terminal_and_a_wide_one_has_all_columns(width):
    widest = [replace(one, name=replace(NAME, pooling="flatten")) for one in (*ACCURACIES, *RANKS)]
    measured = [*widest[:2], replace(widest[0], metric="white_knn_20"), replace(widest[2], value=1017.8), widest[3]]
    shown = io.StringIO()
    Console(file=shown, width=200, soft_wrap=True).print(results_table(results(measured), width))
    lines = [line.rstrip() for line in shown.getvalue().splitlines()]
    assert max(map(len, lines[:5])) <= width
    assert ("whitened kNN" in lines[2]) == (width > 80)
    said = " ".join(shown.getvalue().split())
    assert ("left out in fewer than 106 columns: eff.rank, whitened kNN" in said) == (width <= 80)
    assert ("nearly the same variance" in shown.getvalue()) == (width > 80)


def test_the_page_has_more_columns_and_says_what_was_not_measured():
    white = replace(ACCURACIES[0], metric="white_knn_20", value=0.234, low=0.224, high=0.244)
    assert result_rows(results([*ACCURACIES, white, *RANKS]))[0][-5:] == [
        "0.123±.011", "0.456±.045", "17.8±1.3", "19.7", "0.234±.010"
    ]  # fmt: skip
    pixels = [replace(one, name=FeatureName(branch="-", level="pixels", pooling="flatten")) for one in ACCURACIES]
    assert result_rows(results(pixels)) == [
        ["pixels", "-", "pixels", "flatten", "1024", "0.123±.011", "0.456±.045", "-", "-", "-"]
    ]


def test_the_caption_counts_what_has_labels():
    caption = results_caption(results(ACCURACIES + RANKS))
    assert "kNN: k=20, cosine, top-1;" in caption
    assert "24 labelled training and 12 held-out images; ranks of 23 training images; after ±" in caption
    assert "chosen" not in caption
    bare = results_caption(results(RANKS))
    assert bare.startswith("step 2; without labels no accuracies; ranks of 23 training images; after ±")


@pytest.mark.parametrize("metric", ["eval/encoder/knn_20", "eval/encoder/rankme", "train/loss", None])
def test_an_end_that_was_chosen_on_the_held_out_images_is_told(metric, tmp_path):
    words = [] if metric is None else [f"early_stop={{metric: {metric}}}"]
    config, _ = settings.load([f"run.dir={tmp_path}", *words], quiet=True)
    found = results_of(ACCURACIES, 2, tmp_path, config)
    chosen = metric == "eval/encoder/knn_20"
    assert found.about.get("early_stop") == (metric if chosen else None)
    told = f"the end was chosen by {metric}, on some of the same held-out images"
    assert (told in results_caption(found)) == chosen
