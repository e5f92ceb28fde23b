"""Train every combination of settings, then compare them, seeds together."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hjepa_benchmark.comparison.compare import read_candidates
from hjepa_benchmark.comparison.run import show
from hjepa_benchmark.runs import WEIGHTS_FILE
from hjepa_benchmark.suite.run import FOLDER, RESULTS_FILE, run_suite
from hjepa_pretrain import settings
from hjepa_pretrain.multirun import multirun

_DIR = "hydra.sweep.dir="


def sweep(words: Sequence[str], *, suite: str = "quick", page: Path | None, output: Path | None) -> None:
    """Run `hjepa-pretrain --multirun` with these words, measure every run, and compare them over seeds.

    Args:
        words: settings in hydra's sweep syntax (`a=1,2`); `hydra.sweep.dir` says where the runs go.
        suite: quick or full.
        page: also write an HTML file.
        output: also write a JSON file.

    Raises:
        ValueError: a setting is wrong, or a run did not end.
    """
    given = [word.removeprefix(_DIR) for word in words if word.startswith(_DIR)]
    folder = Path(given[0] if given else f"runs/sweep-{time.strftime('%Y%m%d-%H%M%S')}")
    command = list(sys.argv)
    try:
        code = multirun([*words, *([] if given else [f"{_DIR}{folder}"])])
    finally:
        sys.argv = command
    if code:
        raise ValueError(f"a run below {folder} ended with exit code {code}; its line above says why")
    folders = sorted(
        (one for one in folder.iterdir() if (one / settings.CONFIG_FILE).is_file()),
        key=lambda one: (len(one.name), one.name),
    )
    open_ones = [one for one in folders if not (one / WEIGHTS_FILE).is_file()]
    if open_ones or not folders:
        raise ValueError(
            f"{folder}: {len(open_ones)} of {len(folders)} runs have not ended; compare them when they have: "
            "hjepa-benchmark compare RUN_DIR ..."
        )
    for one in folders:
        if not (one / FOLDER / RESULTS_FILE).is_file():
            run_suite(one, suite=suite)
    show(read_candidates(folders), grouped=True, page_file=page, output=output)
