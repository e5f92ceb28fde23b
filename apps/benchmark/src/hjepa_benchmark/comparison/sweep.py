"""Train every combination of settings, then compare them, seeds together."""

import itertools
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from hjepa_benchmark.comparison.compare import group_by_settings, read_candidates
from hjepa_benchmark.comparison.run import measure_missing, show
from hjepa_pretrain import settings
from hjepa_pretrain.multirun import check, ended_runs, multirun
from hjepa_pretrain.results import RESULTS_FILE
from hjepa_train import EXIT_UNSTABLE, UnstableError

_DIR = "hydra.sweep.dir="


def sweep(words: Sequence[str], *, suite: str = "quick", page: Path | None, output: Path | None) -> None:
    """Run `hjepa-pretrain --multirun` with these words, measure every run, and compare them over seeds.

    Args:
        words: settings in hydra's sweep syntax (`a=1,2`); `hydra.sweep.dir` says where the runs go.
        suite: quick or full.
        page: also write an HTML file.
        output: also write a JSON file.

    Raises:
        ValueError: a setting is wrong, which is said before anything is trained, or a run did not end.
        UnstableError: a run has diverged or collapsed.
    """
    given = [word.removeprefix(_DIR) for word in words if word.startswith(_DIR)]
    folder = Path(given[0] if given else f"runs/sweep-{time.strftime('%Y%m%d-%H%M%S')}")
    check(words)
    chosen = list(combinations(words))
    for combination in chosen:
        settings.load(combination, quiet=True)
    command = list(sys.argv)
    try:
        code = multirun([*words, *([] if given else [f"{_DIR}{folder}"])])
    finally:
        sys.argv = command
    if code:
        raise (UnstableError if code == EXIT_UNSTABLE else ValueError)(
            f"a run below {folder} ended with exit code {code}; its line above says why; the same words with "
            f"{shlex.quote(f'{_DIR}{folder}')} go on"
        )
    # Jobs of Slurm ran in processes of their own; hydra numbers their folders. Others are of an earlier sweep.
    folders = ended_runs() or [folder / str(number) for number in range(len(chosen))]
    open_ones = [one for one in folders if not (one / RESULTS_FILE).is_file()]
    if open_ones:
        raise ValueError(
            f"{folder}: {len(open_ones)} of {len(folders)} runs have not ended; compare them when they have: "
            "hjepa-benchmark compare RUN_DIR ..."
        )
    measure_missing(folders, suite)
    runs = read_candidates(folders)
    show(runs, groups=group_by_settings(runs), page_file=page, output=output)


def combinations(words: Sequence[str]) -> Iterator[list[str]]:
    """Every combination of settings that the words describe, without hydra's own.

    Raises:
        ValueError: a word is no setting.
    """
    parser, overrides = OverridesParser.create(), []
    for word in words:
        if word.startswith("hydra"):
            continue
        try:
            overrides.append(parser.parse_override(settings.quoted(word)))
        except HydraException as error:
            raise ValueError(f"{word!r} is not a setting; write key=a,b, as in run.seed=0,1") from error
    choices = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
        if one.is_sweep_override()
        else [str(one.input_line)]
        for one in overrides
    ]
    return (list(chosen) for chosen in itertools.product(*choices))
