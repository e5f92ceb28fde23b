"""The folder of checkpoints: each is written aside, verified, renamed; then `latest` is moved.

A checkpoint is one safetensors file (whole tensors, so that any number of ranks can read it), one JSON file (step,
stream, callbacks) and a manifest. `torch.distributed.checkpoint` would write shards in parallel, but its `.metadata`
is a pickle, and nothing that came from a file is ever unpickled here.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hjepa_train.checkpoint.files import (
    DamagedError,
    read_json,
    read_manifest,
    replace_text,
    sync,
    write_json,
    write_manifest,
)
from hjepa_train.errors import CheckpointError, one_line

logger = logging.getLogger(__name__)

TENSORS, STATE, LATEST = "tensors.safetensors", "state.json", "latest"
_NAME = re.compile(r"step_(\d{8,})")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay; the end of a run, done or preempted, is always saved."""

    every_steps: int | None = 1000
    """Save each so many optimizer steps; None means never by steps."""
    every_minutes: float | None = 15.0
    """Save when so many minutes have passed since the last save; None means never by the clock."""
    keep: int | None = 2
    """Number of newest checkpoints that stay; None means all."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        for field in ("every_steps", "every_minutes", "keep"):
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise ValueError(f"{field}={value}: not positive; allowed: above 0, or null for no limit of that kind")


@dataclass(kw_only=True, slots=True, frozen=True)
class Checkpoint:
    """A verified checkpoint on the disk."""

    path: Path
    model: dict[str, list[int]]
    """Name and shape of each tensor of the model."""
    state: dict[str, Any]
    """Step, stream, callbacks: what is no tensor."""

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> Checkpoint:
        """Verify a checkpoint directory and read what is small; raise DamagedError where it is not whole."""
        manifest = read_manifest(path, verify=verify)
        return cls(path=path, model=manifest["model"], state=read_json(path / STATE))

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the saved tensors, read from the disk one at a time."""
        return _LazyTensors(self.path / TENSORS)

    def check_model(self, shapes: Mapping[str, list[int]]) -> None:
        """Raise CheckpointError, naming what differs, where this is the checkpoint of another model."""
        missing = sorted(shapes.keys() - self.model.keys())
        unexpected = sorted(self.model.keys() - shapes.keys())
        reshaped = sorted(
            f"{name} {self.model[name]} saved, {shape} here"
            for name, shape in shapes.items()
            if name in self.model and self.model[name] != shape
        )
        parts = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
            if names
        ]
        if parts:
            remedy = "resume with the model that began the run, or use another run directory"
            raise CheckpointError(f"{self.path}: checkpoint of another model: {'; '.join(parts)}; {remedy}")


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: Where they lie; made when the first one is saved.
        keep: Number of newest checkpoints that stay; None means all.
    """

    def __init__(self, folder: Path, *, keep: int | None = 2) -> None:
        self.folder = folder
        self.keep = keep

    def paths(self) -> list[Path]:
        """Return the checkpoint directories, newest first, whole or not."""
        found = self.folder.iterdir() if self.folder.is_dir() else iter(())
        return sorted((p for p in found if p.is_dir() and _NAME.fullmatch(p.name)), key=_step, reverse=True)

    def newest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint; damaged ones are skipped with a warning; None where there is none.

        Raises:
            CheckpointError: Where there are checkpoints and all are damaged: a run never starts again in silence.
        """
        paths = self.paths()
        for path in paths:
            try:
                return Checkpoint.open(path)
            except DamagedError as error:
                logger.warning("%s is damaged (%s); trying the checkpoint before it", path, error)
        if paths:
            raise CheckpointError(
                f"{self.folder}: all {len(paths)} checkpoints are damaged; remove the folder to start from step 0"
            )
        return None

    def at(self, step: int) -> Checkpoint:
        """Return the checkpoint of a step that another rank has verified."""
        path = self.folder / _name(step)
        try:
            return Checkpoint.open(path, verify=False)
        except DamagedError as error:
            raise CheckpointError(f"{path}: {error}; the run directory must be shared by all ranks") from error

    def save(
        self, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any], model: dict[str, list[int]]
    ) -> Path:
        """Write the checkpoint of a step, or leave everything as it was.

        Raises:
            CheckpointError: Where the disk is full or not writable.
        """
        path, aside = self.folder / _name(step), self.folder / f".tmp-{_name(step)}"
        try:
            self.clean()
            aside.mkdir(parents=True)
            save_file(dict(tensors), aside / TENSORS)
            write_json(aside / STATE, state)
            write_manifest(aside, model)
            Checkpoint.open(aside)
            self._commit(aside, path)
        except (OSError, SafetensorError, DamagedError) as error:
            self.clean()
            kept = next((p.name for p in self.paths()), "none yet")
            raise CheckpointError(
                f"{path}: not saved ({one_line(error)}); newest checkpoint that is whole: {kept}; "
                "make room or choose another run directory, then start again to resume"
            ) from error
        self._retain(step)
        return path

    def clean(self) -> None:
        """Remove what an interrupted save has left."""
        for path in self.folder.glob(".tmp-*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _commit(self, aside: Path, path: Path) -> None:
        if path.exists():
            # A damaged checkpoint of this step that the run has come past again.
            path.rename(self.folder / f".tmp-old-{path.name}")
        aside.rename(path)
        sync(self.folder)
        replace_text(self.folder / LATEST, f"{path.name}\n")

    def _retain(self, step: int) -> None:
        self.clean()
        if self.keep is None:
            return
        for old in [path for path in self.paths() if _step(path) <= step][self.keep :]:
            # Out of the way first: half a checkpoint must never look like one.
            doomed = self.folder / f".tmp-old-{old.name}"
            old.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


class _LazyTensors(Mapping[str, Tensor]):
    def __init__(self, path: Path) -> None:
        self._file = _open_tensors(path)
        self._names = frozenset(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def _open_tensors(path: Path) -> Any:  # noqa: ANN401 (whether its methods are typed depends on the version)
    return safe_open(path, framework="pt", device="cpu")


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
