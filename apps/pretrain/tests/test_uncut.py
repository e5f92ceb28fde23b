"""What a narrow terminal is shown."""

import io

from rich.console import Console

from hjepa_pretrain.evaluation import results_caption, results_table

ROW = {
    "features": "untrained", "branch": "online", "level": "encoder", "pooling": "mean", "width": 1024, "n_train": 24,
    "n_test": 12, "knn_20": 0.123, "linear": 0.456, "rankme": 17.8, "effective_rank": 19.7, "n_rank": 24,
}  # fmt: skip


def test_a_narrow_terminal_cuts_no_cell():
    shown = io.StringIO()
    Console(file=shown, width=30, soft_wrap=True).print(results_table({"step": 2, "rows": [ROW]}))
    assert "untrained online encoder mean 1024 0.123 0.456 17.8 19.7" in " ".join(shown.getvalue().split())


def test_the_caption_counts_what_has_labels():
    assert "24 labelled training and 12 held-out images" in results_caption({"step": 2, "rows": [ROW]})
    bare = {**ROW, "n_train": 24, "n_test": 0, "linear": None}
    assert (
        results_caption({"step": 2, "rows": [bare]})
        == "step 2; without labels no accuracies; ranks of 24 training images"
    )
