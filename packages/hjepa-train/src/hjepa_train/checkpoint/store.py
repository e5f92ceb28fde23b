"""The folder of checkpoints: each is written aside, verified, renamed; then `latest` is moved.

A checkpoint is a safetensors file of each rank with its parts of the tensors (`tensors.py`), one JSON file (step,
stream, callbacks) and a manifest. Any number of ranks can read it.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hjepa_train.checkpoint.files import (
    DamagedError,
    Written,
    describe,
    read_json,
    read_manifest,
    replace_text,
    sync,
    write_json,
    write_manifest,
)
from hjepa_train.checkpoint.parts import Part
from hjepa_train.checkpoint.state import MODEL
from hjepa_train.checkpoint.tensors import SUFFIX, SavedTensors, write_tensors
from hjepa_train.errors import CheckpointError, one_line
from hjepa_train.parallel import World

logger = logging.getLogger(__name__)

STATE, LATEST = "state.json", "latest"
_NAME = re.compile(r"step_(\d{8,})")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay; the end of a run, done or preempted, is always saved."""

    every_steps: int | None = 1000
    """Save each so many optimizer steps; None means never by steps."""
    every_minutes: float | None = 15.0
    """Save when so many minutes have passed since the last save; None means never by the clock."""
    keep: int | None = 2
    """Number of newest checkpoints that stay, without those that were found damaged; None means all."""
    keep_every_steps: int | None = None
    """Save each so many optimizer steps too, and let those checkpoints stay for good; None means that none does."""
    grace_seconds: float | None = None
    """Time that a signal leaves to finish the step and save; what takes longer ends at once; None means no limit."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        for field in ("every_steps", "every_minutes", "keep", "keep_every_steps", "grace_seconds"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise ValueError(f"{field}={value}: not positive; allowed: above 0, or null for no limit of that kind")


@dataclass(kw_only=True, slots=True, frozen=True)
class Checkpoint:
    """A verified checkpoint on the disk."""

    path: Path
    files: tuple[str, ...]
    """Names of the files that hold tensors."""
    model: dict[str, list[int]]
    """Name and shape of each tensor of the model."""
    state: dict[str, Any]
    """Step, stream, callbacks: what is no tensor."""

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> Checkpoint:
        """Verify a checkpoint directory and read what is small; raise DamagedError where it is not whole."""
        manifest = read_manifest(path, verify=verify)
        files = tuple(name for name in sorted(manifest["files"]) if name.endswith(SUFFIX))
        return cls(path=path, files=files, model=manifest["model"], state=read_json(path / STATE))

    def tensors(self) -> SavedTensors:
        """Return the saved tensors, whole, read from the disk one at a time."""
        return SavedTensors(self.path / name for name in self.files)

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

    def check_optimizer(self, kind: str) -> None:
        """Raise CheckpointError where another kind of optimizer has left its state; an earlier version names none."""
        saved = self.state.get("optimizer", kind)
        if saved != kind:
            raise CheckpointError(
                f"optimizer.kind={kind}: {self.path} has the state of {saved}; allowed: {saved}; go on with that, or "
                "use another run directory"
            )


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: Where they lie; made when the first one is saved.
        keep: Number of newest checkpoints that stay; None means all.
        keep_every: Checkpoints of steps that this divides stay for good; None means that none does.
    """

    def __init__(self, folder: Path, *, keep: int | None = 2, keep_every: int | None = None) -> None:
        self.folder = folder
        self.keep, self.keep_every = keep, keep_every
        self._damaged: set[Path] = set()

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
                self._damaged.add(path)
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
        self,
        step: int,
        parts: Mapping[str, Part],
        state: dict[str, Any],
        model: dict[str, list[int]],
        world: World | None = None,
    ) -> Path:
        """Write the checkpoint of a step, or leave everything as it was; all ranks call it with their parts.

        Raises:
            CheckpointError: Where the disk is full or not writable, on all ranks.
        """
        world = World() if world is None else world
        path, aside = self.folder / _name(step), self.folder / f".tmp-{_name(step)}"
        mine = aside / f"rank_{world.rank:05d}{SUFFIX}"
        problem: Exception | None = None
        written = Written(0, "0" * 64)
        try:
            if world.is_main:
                self.clean()
                aside.mkdir(parents=True)
        except OSError as error:
            problem = error
        self._agree(problem, path, world)
        try:
            written = write_tensors(mine, parts)
            if describe(mine) != written:
                raise DamagedError(f"{mine.name} does not read as it was written")
        except (OSError, DamagedError) as error:
            problem = error
        files = _gathered(written, world)
        self._agree(problem, path, world)
        try:
            if world.is_main:
                self._finish(aside, path, files, state, model)
        except (OSError, DamagedError) as error:
            problem = error
        self._agree(problem, path, world)
        return path

    def _agree(self, problem: Exception | None, path: Path, world: World) -> None:
        """Go on where no rank has a problem; else clean up and raise it everywhere."""
        if not any(world.any(problem is not None)):
            return
        if world.is_main:
            self.clean()
        if problem is None:
            raise CheckpointError(f"{path}: not saved; another rank could not write its part, and says why")
        kept = next((p.name for p in self.paths() if p not in self._damaged), "none yet")
        shared = ", which all ranks have to share" if world.size > 1 else ""
        raise CheckpointError(
            f"{path}: not saved ({one_line(problem)}); newest checkpoint that is whole: {kept}; "
            f"make room or choose another run directory{shared}, then start again to resume"
        ) from problem

    def _finish(
        self, aside: Path, path: Path, files: list[Written], state: dict[str, Any], model: dict[str, list[int]]
    ) -> None:
        write_json(aside / STATE, state)
        names = {f"rank_{rank:05d}{SUFFIX}": written for rank, written in enumerate(files)}
        write_manifest(aside, model, {STATE: describe(aside / STATE), **names})
        # Each rank has read its file back; here it counts that all of them are there and make whole tensors.
        shapes = Checkpoint.open(aside, verify=False).tensors().shapes
        missing = [name for name, shape in model.items() if shapes.get(f"{MODEL}/{name}") != shape]
        if missing:
            raise DamagedError(f"{len(missing)} tensors of the model were not written ({', '.join(missing[:3])})")
        self._commit(aside, path)
        try:
            replace_text(self.folder / LATEST, f"{path.name}\n")
            self._retain(_step(path))
        except OSError as error:
            logger.warning("%s is saved, but the folder is not in order: %s", path, one_line(error))

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
        self._damaged.discard(path)
        sync(self.folder)

    def _retain(self, step: int) -> None:
        self.clean()
        past = [path for path in self.paths() if _step(path) <= step]
        # A damaged one keeps no place from one that is whole, and goes with those before the last that stays.
        whole = [path for path in past if path not in self._damaged]
        if self.keep is None or len(whole) < self.keep:
            return
        for old in past[past.index(whole[self.keep - 1]) + 1 :]:
            if self.keep_every is not None and _step(old) % self.keep_every == 0:
                continue
            # Out of the way first: half a checkpoint must never look like one.
            doomed = self.folder / f".tmp-old-{old.name}"
            old.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _gathered(written: Written, world: World) -> list[Written]:
    """Return what each rank has written."""
    row = torch.tensor([[*written.size.to_bytes(8, "little"), *bytes.fromhex(written.sha256)]], dtype=torch.uint8)
    rows = world.gather(row).tolist()
    return [Written(int.from_bytes(row[:8], "little"), bytes(row[8:]).hex()) for row in rows]


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
