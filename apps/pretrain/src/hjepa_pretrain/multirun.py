"""Several runs from one command, by hydra's multirun: one after the other here, or each as a Slurm job.

`hjepa-pretrain --multirun run.seed=0,1,2 recipe=ijepa,hjepa` runs every combination. With
`hydra/launcher=submitit_slurm hydra.launcher.nodes=4 hydra.launcher.tasks_per_node=8` each of them is a job of 32
processes. A job that is preempted, or whose time is almost over, saves, asks Slurm to queue it again and goes on.
"""

import logging
import math
import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from hjepa_pretrain import settings
from hjepa_pretrain.duration import seconds
from hjepa_train import EXIT_DONE, EXIT_ERROR, EXIT_PREEMPTED, EXIT_WRONG_INPUT

logger = logging.getLogger(__name__)

# What the trainer saves on; Slurm sends it `hydra.launcher.signal_delay_s` before the end.
_SIGNAL = "USR1"
_SWEEP_DIR = "hydra.sweep.dir=runs/multirun-${now:%Y%m%d-%H%M%S}"
_ended: dict[Path, int] = {}


def multirun(words: Sequence[str]) -> int:
    """Run every combination that the words describe, each in a folder of its own below `hydra.sweep.dir`.

    Args:
        words: overrides in hydra's sweep syntax (`a=1,2`, `a=range(1,4)`), and hydra's own settings.

    Returns:
        0, or the largest exit code of the runs of this machine; 1 where a Slurm job failed, 2 for wrong words.
    """
    try:
        check(words)
    except settings.SettingsError as error:
        print(f"hjepa-pretrain: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    _ended.clear()
    settings.register()
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", _SIGNAL)
    own = [] if any(word.startswith("hydra.sweep.dir=") for word in words) else [_SWEEP_DIR]
    silent = ("hydra/job_logging=none", "hydra/hydra_logging=none")
    sys.argv = [sys.argv[0], "--multirun", *silent, *own, *(settings.quoted(word) for word in words)]
    # The error itself, in place of hydra's paragraphs about it.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(config_path="pkg://hjepa_pretrain.conf", config_name="config", version_base="1.3")(_run_one)()
    except (HydraException, OmegaConfBaseException, OSError) as error:
        print(f"hjepa-pretrain: {settings.one_line(error)}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    except RuntimeError as error:
        # Of submitit, which is an extra and need not be there: a job that left no result, and then the end of its log.
        if type(error).__name__ != "UncompletedJobError":
            raise
        said = " ".join(str(error).splitlines()[:2])
        print(f"hjepa-pretrain: {said}; the logs beside that path say why", file=sys.stderr)
        return EXIT_ERROR
    return max(_ended.values(), default=0)


def check(words: Sequence[str]) -> None:
    """Refuse what has no meaning for several runs.

    Args:
        words: as `multirun` takes them.

    Raises:
        SettingsError: a word names one folder, or is an option.
    """
    for word in words:
        if word.startswith("-") or word.startswith("run.dir="):
            raise settings.SettingsError(
                f"{word}: not with --multirun; allowed: key=value, and hydra.sweep.dir=FOLDER for the folders of all "
                "runs"
            )


def ended_runs() -> list[Path]:
    """Return the folders of the runs that the last `multirun` of this process has done here, in their order."""
    return list(_ended)


def _run_one(_: DictConfig) -> int:
    """Do one run, in this process or in a task of a Slurm job."""
    from hjepa_pretrain.cli import main

    slurm = "SLURM_JOB_ID" in os.environ
    if slurm:
        _join_ranks()
    words = HydraConfig.get().overrides.task
    folder = Path(HydraConfig.get().runtime.output_dir)
    print(f"{folder}: {' '.join(words)}", flush=True)
    # The run composes its own configuration: a hydra inside this one.
    outer, began = Singleton.get_state(), time.monotonic()
    GlobalHydra.instance().clear()
    try:
        code = main([f"run.dir={folder}", *words])
    except Exception:
        if not slurm:
            raise
        # hydra would hand the error to whoever waits for the job, which would itself end well.
        traceback.print_exc()
        code = EXIT_ERROR
    finally:
        Singleton.set_state(outer)
    if slurm and code == EXIT_PREEMPTED:
        if os.environ["RANK"] != "0":
            # A task that fails may end the others, and the main one has yet to ask Slurm.
            return code
        _queue_again()
    if slurm and code != EXIT_DONE:
        # Without a result submitit waits for the job's next life, or calls it failed where there is none.
        raise SystemExit(code)
    _ended[folder] = code
    if not slurm and code == EXIT_PREEMPTED and time.monotonic() - began < _time_limit(words):
        word = shlex.quote(f"hydra.sweep.dir={HydraConfig.get().sweep.dir}")
        print(f"the runs after it: the same command with {word}", file=sys.stderr)
        # hydra would go on with the next run, which a stopped program must not.
        raise SystemExit(code)
    return code


def _time_limit(words: Sequence[str]) -> float:
    """Return the seconds that a run may take: one that stopped before got a signal."""
    texts = [word.partition("=")[2].strip("'\"") for word in words if word.startswith("run.time_limit=")]
    return math.inf if not texts or texts[-1] == "null" else seconds(texts[-1], "run.time_limit")


def _join_ranks() -> None:
    """Tell torch which of the job's processes this one is, as torchrun would; MASTER_PORT may be given."""
    import submitit

    # What a job inherits from the one that submitted it is not its own.
    submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def _queue_again() -> None:
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        logger.error("Slurm did not queue job %s again (%s); start it anew", job, error)
