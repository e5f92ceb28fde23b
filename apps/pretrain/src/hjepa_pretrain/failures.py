"""What ended a run, as an exit code and one line: wrong input, training that went wrong, machines that broke."""

import errno
import re
import traceback
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch.distributed import DistError

from hjepa_data import WorkerError
from hjepa_train import (
    EXIT_ERROR,
    EXIT_PREEMPTED,
    EXIT_UNSTABLE,
    EXIT_WRONG_INPUT,
    TrainingError,
    UnstableError,
)
from hjepa_train.lr_finder import SweepStoppedError

# What torch's CPU back end and Triton say.
_NO_COMPILER = re.compile(r"No working C\+\+ compiler found|Failed to find C compiler")
# What safetensors, written in Rust, says where Python has an OSError.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}
_AGAIN = "start again with the same run.dir: it goes on from the last checkpoint"


class OtherRankError(ValueError):
    """Another process of this run has failed, and says why itself."""


class Stopped(BaseException):
    """An end before the first step, or when the last one had been saved; no error that is caught as one."""

    @classmethod
    def by(cls, name: str, remedy: str = "") -> NoReturn:
        """Stop here.

        Args:
            name: of the signal, or the setting that asked for it.
            remedy: what helps where the same command would stop here again.
        """
        raise cls(f"stopped by {name}, not in training: nothing is lost, and the same run.dir goes on{remedy}")


@dataclass(kw_only=True, slots=True, frozen=True)
class Failure:
    """How a program ends that has not done its work."""

    code: int
    """Exit code."""
    line: str | None
    """What to say; None where another process says it."""
    alike: bool = False
    """Whether all processes of a run fail so at the same moment, and one line is enough."""


def judge(error: BaseException) -> Failure | None:
    """Return what an error means to the user; None for an error of the program itself, whose traceback is needed.

    Args:
        error: what ended the run.
    """
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
        # rich exits so, without a word.
        return Failure(code=EXIT_ERROR, line=f"nobody reads what is printed any more (a closed pipe); {_AGAIN}")
    if isinstance(error, OtherRankError):
        return Failure(code=EXIT_WRONG_INPUT, line=None)
    if isinstance(error, ValueError) and _is_refusal(error):
        return Failure(code=EXIT_WRONG_INPUT, line=str(error))
    if isinstance(error, UnstableError):
        return Failure(code=EXIT_UNSTABLE, line=str(error), alike=True)
    if isinstance(error, Stopped | SweepStoppedError):
        return Failure(code=EXIT_PREEMPTED, line=str(error), alike=True)
    return _broken(error)


def _broken(error: BaseException) -> Failure | None:
    if isinstance(error, KeyboardInterrupt):
        said = "interrupted; the last checkpoint stands, run.dir goes on from it"
        return Failure(code=EXIT_ERROR, line=said, alike=True)
    line = str(error) if isinstance(error, TrainingError | WorkerError) else broken_machine(error)
    if line is not None:
        return Failure(code=EXIT_ERROR, line=line)
    if isinstance(error, OSError):
        number = error.errno
    elif found := _OS_ERROR.search(str(error)):
        number = int(found[1])
    else:
        return None
    if number in _NO_ROOM:
        remedy = "make room or give the permission, in run.dir where no path is named"
        return Failure(code=EXIT_WRONG_INPUT, line=f"{error}; {remedy}; then {_AGAIN}")
    return Failure(code=EXIT_ERROR, line=str(error))


def _is_refusal(error: ValueError) -> bool:
    """Tell a value that this project or its configuration refuses from an error of arithmetic deep inside."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return not modules or modules[-1].startswith("hjepa_") or type(error) is not ValueError


def broken_machine(error: BaseException) -> str | None:
    """Say which part of a machine has failed, and what helps; None where none has.

    Args:
        error: what ended the run.
    """
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"out of GPU memory ({said}); raise trainer.accumulate, which keeps the batch of a step and splits it, or "
            "lower data.batch_size or the model"
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return f"out of memory ({said}); lower the model, data.batch_size, data.workers or data.cache_mib"
    if isinstance(error, torch.AcceleratorError):
        return f"the accelerator failed ({said}); {_AGAIN}, on another machine if it fails again"
    missing = _NO_COMPILER.search(str(error))
    if isinstance(error, RuntimeError) and missing:
        return f"trainer.compile=true: {missing[0]}; install one (CXX or CC name it), or trainer.compile=false"
    if isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        return f"another process of the run is gone ({said}); its own lines say why, if it had time to; {_AGAIN}"
    return None
