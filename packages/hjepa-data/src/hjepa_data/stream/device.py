"""Batches on a device: the next one is copied, on a CUDA stream of its own, while the present one is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from hjepa_data.stream.batch import Batch

__all__ = ["BatchStream", "DevicePrefetcher"]


class BatchStream(Protocol):
    """An iterator of batches that says where it stands, such as a ``TrainStream``."""

    @property
    def skipped(self) -> dict[str, int]:
        """Images left out, by reason."""

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]:
        """Say where the stream stands."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go where another stream stood."""

    def close(self) -> None:
        """End what loads the batches."""


class DevicePrefetcher(Iterator[Batch]):
    """The same batches and states as those of a stream, on a device.

    One batch is taken from the stream ahead of those that were handed out; the state does not count it. From pinned
    memory its copy runs beside the computation. On a CPU nothing is copied.

    Args:
        stream: gives the batches.
        device: where they go.
    """

    def __init__(self, stream: BatchStream, device: torch.device | str) -> None:
        self.stream = stream
        self.device = torch.device(device)
        self._copies: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call, unused-ignore]
        self._ahead: Batch | Exception | None = None
        self._state: dict[str, Any] | None = None
        self._skipped: dict[str, int] = stream.skipped

    @property
    def skipped(self) -> dict[str, int]:
        """Images left out by this rank in the batches that were handed out, by reason."""
        return self._skipped

    def __next__(self) -> Batch:
        if self._ahead is None:
            self._state, self._ahead = self.stream.state_dict(), self._take()
        batch = self._ahead
        if isinstance(batch, Exception):
            self._ahead = self._state = None
            raise batch
        if self._copies is not None:
            present = torch.cuda.current_stream(self.device)
            present.wait_stream(self._copies)
            # Its memory belongs to the stream of the copies, which must not use it again before this one is done.
            batch.record_stream(present)
        state, skipped = self.stream.state_dict(), self.stream.skipped
        # What is ahead is let go when the next one is here, so that an interrupt loses no batch.
        self._ahead, self._state, self._skipped = self._take(), state, skipped
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Say where the stream stands after the batches that were handed out."""
        return self.stream.state_dict() if self._state is None else self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go where another stream stood; the batch ahead is dropped."""
        self.stream.load_state_dict(state)
        self._ahead = self._state = None

    def close(self) -> None:
        """End the workers; the batch ahead is kept for the next that is asked for."""
        self.stream.close()

    def _take(self) -> Batch | Exception:
        """Take the next batch and start its copy; an error waits until the batch before it was handed out."""
        with torch.cuda.stream(self._copies):
            try:
                batch = next(self.stream)
            except Exception as error:
                return error
            return batch.to(self.device, non_blocking=True)
