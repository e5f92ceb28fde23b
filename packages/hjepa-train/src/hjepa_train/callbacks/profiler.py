"""A trace of a few steps, for torch-tb-profiler in TensorBoard and for Perfetto, and the memory of a GPU in them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from hjepa_train.protocols import Callback

if TYPE_CHECKING:
    from hjepa_train.outcome import Outcome
    from hjepa_train.trainer import StepResult, Trainer

logger = logging.getLogger(__name__)

_ALLOCATIONS = 200_000
"""Events of the memory snapshot; older ones go."""


@dataclass(kw_only=True, slots=True)
class ProfilerConfig:
    """Which steps of this process are traced."""

    wait: int = 10
    """Steps before, so that caches and compilers have settled."""
    warmup: int = 2
    """Steps that are traced and thrown away."""
    active: int = 3
    """Steps in the trace."""
    with_stack: bool = False
    """Record the Python lines of each operation (slow, large)."""
    memory: bool = True
    """CUDA only: also record each allocation of the steps in the trace."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        for name, least in (("wait", 0), ("warmup", 0), ("active", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: too small; allowed: {least} and more")


class Profiler(Callback):
    """Writes `<folder>/<rank>.<time>.pt.trace.json` once; the extra `profiler` installs what shows it in TensorBoard.

    On a GPU `<folder>/<rank>.memory.pickle` beside it is the snapshot of its memory, for pytorch.org/memory_viz.

    Args:
        folder: Where the traces go, e.g. `run/profile`.
        config: Which steps.
    """

    def __init__(self, folder: Path, config: ProfilerConfig | None = None) -> None:
        self.folder = folder
        self.config = ProfilerConfig() if config is None else config
        self._profile: profile | None = None
        self._memory = False
        self._steps = 0

    def on_fit_start(self, trainer: Trainer) -> None:
        """Start the profiler's schedule."""
        config = self.config
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=config.wait, warmup=config.warmup, active=config.active, repeat=1),
            on_trace_ready=tensorboard_trace_handler(str(self.folder), worker_name=f"rank{trainer.world.rank}"),
            record_shapes=True,
            profile_memory=True,
            with_stack=config.with_stack,
        )
        self._profile.start()
        self._memory = config.memory and trainer.world.device.type == "cuda"
        self._steps = 0
        self._record_memory(trainer)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Tell the profiler that a step has ended."""
        if self._profile is not None:
            self._profile.step()
            self._steps += 1
            self._record_memory(trainer)

    def on_fit_end(self, trainer: Trainer, outcome: Outcome | None) -> None:
        """Stop the profiler; a trace that has begun is written, and that none has is said."""
        before = self.config.wait + self.config.warmup
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
            if self._steps <= before and trainer.world.is_main:
                said = (
                    "no profile: %d steps were trained here, and the trace begins after wait=%d and warmup=%d of them"
                )
                logger.warning(said, self._steps, self.config.wait, self.config.warmup)
        if self._memory and self._steps > before:
            self._write_memory(trainer)

    def _record_memory(self, trainer: Trainer) -> None:
        first = self.config.wait + self.config.warmup
        if self._memory and self._steps == first:
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        elif self._memory and self._steps == first + self.config.active:
            self._write_memory(trainer)

    def _write_memory(self, trainer: Trainer) -> None:
        self._memory = False
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(  # type: ignore[no-untyped-call]
            str(self.folder / f"rank{trainer.world.rank}.memory.pickle")
        )
        torch.cuda.memory._record_memory_history(enabled=None)
