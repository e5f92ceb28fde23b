"""Checkpoints written while the training goes on: a copy of the tensors is taken, a thread writes it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hjepa_train.checkpoint.parts import Part, own_parts
from hjepa_train.checkpoint.store import CheckpointStore
from hjepa_train.parallel import World


@dataclass(kw_only=True, slots=True)
class SaveTimes:
    """What checkpoints have cost, in seconds."""

    stalls: list[float] = field(default_factory=list)
    """For how long each save has held the training up: the copy, and the wait for the save before it."""
    writes: list[float] = field(default_factory=list)
    """How long each has been written in the background."""

    def summary(self, elapsed: float) -> str:
        """Say it in a line; `elapsed` is the time of the run so far.

        >>> SaveTimes(stalls=[0.01, 0.03], writes=[0.5, 0.7]).summary(10.0)
        '2 checkpoints: training stalled 0.020 s each (at most 0.030 s, 0.40 % of the run), written in 0.60 s each'
        """
        count, total = len(self.stalls), sum(self.stalls)
        write = sum(self.writes) / max(1, len(self.writes))
        return (
            f"{count} checkpoint{'s' if count > 1 else ''}: training stalled {total / count:.3f} s each (at most "
            f"{max(self.stalls):.3f} s, {100 * total / elapsed:.2f} % of the run), written in {write:.2f} s each"
        )


class Saver:
    """Writes checkpoints in a thread of its own, one at a time.

    Args:
        store: Where they go.
        world: The ranks; they get a second process group, so that writing does not meet training.
    """

    def __init__(self, store: CheckpointStore, world: World) -> None:
        self.store = store
        self.times = SaveTimes()
        self._world = world.beside()
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether the last save has failed on this rank; `wait` raises what happened."""
        return self._error is not None

    def take(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        state: dict[str, Any],
        model: dict[str, list[int]],
    ) -> None:
        """Copy this rank's parts and let them be written; the save before is waited for first. All ranks call it.

        Args:
            step: Of the checkpoint.
            tensors: Those that all ranks know by the same names.
            own: Those of this rank alone.
            state: JSON.
            model: Shapes of the model's tensors.

        Raises:
            CheckpointError: Where the save before has failed.
        """
        self.wait()
        # A copy, since training changes what callbacks hold while the thread writes; and what is no JSON fails here.
        state = json.loads(json.dumps(state))
        parts = own_parts(tensors, self._world.rank, self._world.size)
        parts |= {name: Part(offsets=(0,) * tensor.ndim, values=tensor) for name, tensor in own.items()}
        copies = self._copied(parts)
        self._thread = threading.Thread(
            target=self._write, args=(step, copies, state, model), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last save is done.

        Raises:
            CheckpointError: Where it has failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _copied(self, parts: Mapping[str, Part]) -> dict[str, Part]:
        """Copy to the CPU's memory (pinned where the values lie on a GPU), which the next save uses again."""
        copies, on_gpu = {}, False
        for name, part in parts.items():
            values, buffer = part.values, self._buffers.get(name)
            on_gpu |= values.is_cuda
            if buffer is None or buffer.shape != values.shape or buffer.dtype != values.dtype:
                buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
                self._buffers[name] = buffer
            buffer.copy_(values, non_blocking=True)
            copies[name] = Part(offsets=part.offsets, values=buffer)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies

    def _write(self, step: int, parts: dict[str, Part], state: dict[str, Any], model: dict[str, list[int]]) -> None:
        began = time.perf_counter()
        try:
            self.store.save(step, parts, state, model, self._world)
        except Exception as error:
            self._error = error
        self.times.writes.append(time.perf_counter() - began)
