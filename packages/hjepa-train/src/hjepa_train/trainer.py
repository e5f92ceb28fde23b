"""The training loop: forward, backward, clip, step, EMA; everything else is a callback."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hjepa_train.callbacks.save import SaveEvery
from hjepa_train.checkpoint import Checkpoint, CheckpointConfig, CheckpointStore
from hjepa_train.checkpoint.state import collect, model_shapes, restore
from hjepa_train.ema import EMA
from hjepa_train.errors import CheckpointError, TrainingError, choice, one_line
from hjepa_train.optim import OptimizerConfig, OptimizerKind, set_rates
from hjepa_train.outcome import Outcome
from hjepa_train.parallel import ParallelConfig, ParallelKind, World, call, gradient_sync, init_world, wrap
from hjepa_train.precision import Precision, autocast
from hjepa_train.protocols import Batch, Callback, HasEMA, Stream
from hjepa_train.schedules import ScheduleConfig, ScheduleKind
from hjepa_train.sharded import whole
from hjepa_train.signals import StopSignals

logger = logging.getLogger(__name__)


def _cosine_rate() -> ScheduleConfig:
    return ScheduleConfig(kind=ScheduleKind.cosine, value=1e-3, final=1e-6)


def _constant_decay() -> ScheduleConfig:
    return ScheduleConfig(kind=ScheduleKind.constant, value=0.05)


def _linear_momentum() -> ScheduleConfig:
    return ScheduleConfig(kind=ScheduleKind.linear, value=0.996, final=1.0)


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    """A run, without its module and its data."""

    steps: int
    """Optimizer steps of the whole run, resumes included."""
    accumulate: int = 1
    """Micro-batches (batches of the stream) per optimizer step; their losses are averaged."""
    clip_norm: float | None = 1.0
    """Largest norm of the whole gradient; None means no clipping."""
    precision: Precision = Precision.bf16
    """`bf16` autocast, or `fp32`."""
    learning_rate: ScheduleConfig = field(default_factory=_cosine_rate)
    """Of AdamW, by optimizer step."""
    weight_decay: ScheduleConfig = field(default_factory=_constant_decay)
    """Of AdamW's decaying group, by optimizer step."""
    ema_momentum: ScheduleConfig = field(default_factory=_linear_momentum)
    """Share of the target that stays, by optimizer step; used where the module has EMA pairs."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """One process, DDP or FSDP."""
    log_every: int = 10
    """Steps between rows of training metrics; the first and the last step are always logged."""
    check_every: int = 10
    """CUDA only: steps between reads of the not-finite flag; a CPU checks each step."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        self.precision = choice(Precision, "precision", self.precision)
        for name in ("steps", "accumulate", "log_every", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: too small; allowed: 1 and more")
        if self.optimizer.kind is OptimizerKind.muon and self.parallel.kind is ParallelKind.fsdp:
            raise ValueError("optimizer.kind=muon: needs whole matrices, which fsdp shards; use adamw, or parallel=ddp")
        if self.clip_norm is not None and self.clip_norm <= 0.0:
            raise ValueError(f"clip_norm={self.clip_norm}: not positive; allowed: above 0, or null for no clipping")


@dataclass(kw_only=True, slots=True)
class StepResult:
    """What one optimizer step leaves on the device; nothing here has been waited for."""

    loss: Tensor
    """Mean over this rank's micro-batches, not yet over ranks."""
    metrics: dict[str, Tensor]
    """The module's own, averaged alike."""
    embeddings: Mapping[str, Tensor]
    """Of the last micro-batch, on this rank."""
    grad_norm: Tensor
    """Before clipping, over all ranks."""
    rates: dict[str, float]
    """`lr`, `weight_decay` and, with an EMA, `ema_momentum` of this step."""


class Trainer:
    """Trains a module on a stream, and goes on where an earlier run in the same directory has stopped.

    Args:
        module: Its forward takes (batch, step) and returns an `Output`; `ema_pairs()` is optional.
        stream: Yields this rank's batches and tells its state.
        config: Steps, rates, precision, parallelism.
        run_dir: Where `checkpoints/` lies; None means that nothing is saved.
        callbacks: Logging, monitors and the like, run in this order on every rank.
        checkpoint: When to save; None means the defaults of `CheckpointConfig`.
        world: From `init_world(config.parallel)`; None joins it here.
        blocks: FSDP only: classes of submodules that are sharded one at a time.
        metadata: JSON to keep in each checkpoint, e.g. the resolved configuration.
    """

    def __init__(
        self,
        module: nn.Module,
        stream: Stream,
        config: TrainerConfig,
        *,
        run_dir: Path | None = None,
        callbacks: Sequence[Callback] = (),
        checkpoint: CheckpointConfig | None = None,
        world: World | None = None,
        blocks: Sequence[type[nn.Module]] = (),
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.world = init_world(config.parallel) if world is None else world
        self.stream = stream
        self.module = module.to(self.world.device)
        self.model = wrap(self.module, config.parallel, self.world, blocks)
        self.optimizer = config.optimizer.build(self.module)
        self.ema = EMA(self.module.ema_pairs()) if isinstance(self.module, HasEMA) else None
        saving = CheckpointConfig() if checkpoint is None else checkpoint
        self.store = None if run_dir is None else CheckpointStore(run_dir / "checkpoints", keep=saving.keep)
        self.callbacks = [*callbacks] if self.store is None else [*callbacks, SaveEvery(saving)]
        self.metadata = {} if metadata is None else metadata
        self.step = 0
        """Optimizer steps done."""
        self.samples = 0
        """Samples seen by all ranks."""
        self.stop_reason: str | None = None
        self._schedules = self._build_schedules()
        self._trainable = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self._save_requested = False
        self._saved_step: int | None = None
        self._row: dict[str, float] = {}
        self._timer = (0.0, 0)
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=self.world.device)

    def fit(self) -> Outcome:
        """Train to the last step, or until a signal or a callback asks for a stop; save, and say which it was.

        Raises:
            TrainingError: Where the loss is not finite, the stream ends or a collapse is not tolerated.
            CheckpointError: Where a checkpoint is of another model, or cannot be written.
        """
        outcome: Outcome | None = None
        try:
            with StopSignals(self.request_stop):
                self.restore()
                self._call(lambda callback: callback.on_fit_start(self))
                self._timer = (time.perf_counter(), self.samples)
                self._loop()
            outcome = Outcome.DONE if self.step >= self.config.steps else Outcome.PREEMPTED
        except Exception as error:
            if self.world.size > 1:
                rank, size = self.world.rank, self.world.size
                logger.error("rank %d of %d failed at step %d: %s", rank, size, self.step, one_line(error))
            raise
        finally:
            self._end(outcome)
        return outcome

    def log(self, row: Mapping[str, float]) -> None:
        """Add scalars to the row of this step; call it with the same values on every rank."""
        self._row.update(row)

    def call(self, name: str, *arguments: Any) -> Any:  # noqa: ANN401
        """Call a method of the module without gradient, wherever its weights are; under FSDP all ranks call it."""
        return call(self.model, name, *arguments)

    def request_save(self) -> None:
        """Save a checkpoint when this step has ended."""
        self._save_requested = True

    def request_stop(self, reason: str) -> None:
        """Stop when this step has ended, after saving; every rank stops at the same step."""
        self.stop_reason = reason

    def save(self) -> None:
        """Write a checkpoint of the present step; all ranks call it."""
        if self.store is None or self._saved_step == self.step:
            return
        self._refuse_bad_step()
        tensors = collect(self.module, self.optimizer, self.world)
        problem: CheckpointError | None = None
        if self.world.is_main:
            try:
                self.store.save(self.step, tensors, self._state(), model_shapes(self.module))
            except CheckpointError as error:
                problem = error
        if any(self.world.any(problem is not None)):
            raise problem or CheckpointError("the main rank could not save the checkpoint")
        self._saved_step = self.step
        self._call(lambda callback: callback.on_save(self))

    def restore(self) -> None:
        """Go to the newest whole checkpoint of the run directory, if there is one; all ranks call it."""
        if self.store is None:
            return
        checkpoint: Checkpoint | None = None
        problem: CheckpointError | None = None
        if self.world.is_main:
            try:
                checkpoint = self.store.newest()
            except CheckpointError as error:
                problem = error
        if any(self.world.any(problem is not None)):
            raise problem or CheckpointError("the main rank found no whole checkpoint")
        step = self.world.from_main(-1 if checkpoint is None else int(checkpoint.state["step"]))
        if step >= 0:
            checkpoint = self.store.at(step) if checkpoint is None else checkpoint
            checkpoint.check_model(model_shapes(self.module))
            restore(self.module, self.optimizer, self.world, checkpoint.tensors())
            self._load_state(checkpoint.state)

    def _loop(self) -> None:
        self.module.train()
        batches = self._open_stream()
        stop = False
        while self.step < self.config.steps and not stop:
            result = self._train_step(batches)
            self.step += 1
            if self._is_logged():
                self.log(self._read(result))
            paused = time.perf_counter()
            for callback in self.callbacks:
                callback.on_step_end(self, result)
            self._flush_row()
            stop, save = self.world.any(self.stop_reason is not None, self._save_requested)
            if save or stop or self.step == self.config.steps:
                self._save_requested = False
                self.save()
            # What callbacks and checkpoints take is not the speed of training.
            self._timer = (self._timer[0] + time.perf_counter() - paused, self._timer[1])
        if stop and self.step < self.config.steps:
            reason = self.stop_reason or "asked by another rank"
            logger.info("stopped after step %d of %d (%s)", self.step, self.config.steps, reason)

    def _train_step(self, batches: Iterator[Batch]) -> StepResult:
        rates = {name: schedule(self.step) for name, schedule in self._schedules.items()}
        set_rates(self.optimizer, learning_rate=rates["lr"], weight_decay=rates["weight_decay"])
        loss, metrics, embeddings = self._backward(batches)
        grad_norm = self._clip()
        self._watch(loss, grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(rates["ema_momentum"])
        return StepResult(loss=loss, metrics=metrics, embeddings=embeddings, grad_norm=grad_norm, rates=rates)

    def _backward(self, batches: Iterator[Batch]) -> tuple[Tensor, dict[str, Tensor], Mapping[str, Tensor]]:
        count = self.config.accumulate
        total = torch.zeros((), device=self.world.device)
        sums: dict[str, Tensor] = {}
        embeddings: Mapping[str, Tensor] = {}
        for micro in range(count):
            batch = self._next(batches)
            with gradient_sync(self.model, enabled=micro == count - 1):
                with autocast(self.config.precision, self.world.device):
                    loss, metrics, embeddings = self.model(batch, self.step)
                (loss / count).backward()
            total = total + loss.detach() / count
            for name, value in metrics.items():
                mean = value.detach() / count
                sums[name] = sums[name] + mean if name in sums else mean
            self.samples += len(batch) * self.world.size
        return total, sums, embeddings

    def _open_stream(self) -> Iterator[Batch]:
        # A loader may draw a seed from the global generator when it starts; a resumed run starts it once more than
        # an uninterrupted one, so that draw must not move what dropout draws next.
        with torch.random.fork_rng(devices=[]):
            batches = iter(self.stream)
            first = list(itertools.islice(batches, 1 if self.step < self.config.steps else 0))
        return itertools.chain(first, batches)

    def _next(self, batches: Iterator[Batch]) -> Batch:
        try:
            batch = next(batches)
        except StopIteration:
            raise TrainingError(
                f"step {self.step}: the stream has ended before step {self.config.steps}; give a stream without end"
            ) from None
        return batch.to(self.world.device, non_blocking=True)

    def _clip(self) -> Tensor:
        gradients = [parameter.grad for parameter in self._trainable if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._trainable, self.config.clip_norm, norm)
        return whole(norm)

    def _watch(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Note the first step that is not finite; a GPU is asked for it only now and then."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        self._bad_step = torch.where((self._bad_step < 0) & bad, self.step + 1, self._bad_step)
        if self.world.device.type == "cpu" or (self.step + 1) % self.config.check_every == 0:
            self._refuse_bad_step()

    def _refuse_bad_step(self) -> None:
        step = int(self._bad_step)
        if step >= 0:
            raise TrainingError(
                f"step {step}: the loss or its gradient is not finite; start again to resume from the last checkpoint, "
                "with a lower learning rate, a longer warm-up or precision=fp32"
            )

    def _is_logged(self) -> bool:
        return self.step % self.config.log_every == 0 or self.step in (1, self.config.steps)

    def _read(self, result: StepResult) -> dict[str, float]:
        """Average the step's scalars over ranks and bring them to the host, all at once."""
        scalars = {**dict(sorted(result.metrics.items())), "loss": result.loss, "grad_norm": result.grad_norm}
        stacked = torch.stack([scalar.to(self.world.device, torch.float64) for scalar in scalars.values()])
        means = self.world.sum(stacked) / self.world.size
        row = {f"train/{name}": mean for name, mean in zip(scalars, means.tolist(), strict=True)}
        row |= {f"train/{name}": rate for name, rate in result.rates.items()}
        began, samples = self._timer
        self._timer = (time.perf_counter(), self.samples)
        row["train/images_per_second"] = (self.samples - samples) / max(1e-9, self._timer[0] - began)
        row["train/samples"] = float(self.samples)
        return row

    def _flush_row(self) -> None:
        if self._row:
            row: dict[str, float] = {"step": self.step, **self._row}
            self._row = {}
            try:
                self._call(lambda callback: callback.on_row(self, row))
            except OSError as error:
                raise CheckpointError(
                    f"step {self.step}: metrics not written ({one_line(error)}); make room, then start again to resume"
                ) from error

    def _end(self, outcome: Outcome | None) -> None:
        for callback in self.callbacks:
            try:
                callback.on_fit_end(self, outcome)
            except OSError as error:
                # A full disk has ended the run already: its own error is the one to show.
                logger.warning("%s: %s", callback.key, one_line(error))

    def _call(self, hook: Callable[[Callback], None]) -> None:
        for callback in self.callbacks:
            hook(callback)

    def _build_schedules(self) -> dict[str, Callable[[int], float]]:
        config = self.config
        schedules = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        if self.ema is not None:
            schedules["ema_momentum"] = config.ema_momentum
        return {name: schedule.build(config.steps) for name, schedule in schedules.items()}

    def _state(self) -> dict[str, Any]:
        states = {callback.key: callback.state_dict() for callback in self.callbacks}
        return {
            "step": self.step,
            "samples": self.samples,
            "world_size": self.world.size,
            "stream": self.stream.state_dict(),
            "callbacks": {key: state for key, state in states.items() if state},
            "torch": str(torch.__version__),
            "metadata": self.metadata,
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        self.step = self._saved_step = int(state["step"])
        self.samples = int(state["samples"])
        self.stream.load_state_dict(state["stream"])
        for callback in self.callbacks:
            if callback.key in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][callback.key])
        logger.info("resumed at step %d of %d", self.step, self.config.steps)
