"""The training loop: forward, backward, clip, step, EMA; everything else is a callback."""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hjepa_train.callbacks.save import SaveEvery
from hjepa_train.checkpoint import Checkpoint, CheckpointConfig, CheckpointStore, Saver
from hjepa_train.checkpoint.state import MODEL, generator_states, model_shapes, of_rank, restore, run_tensors
from hjepa_train.checkpoint.tensors import check_dtypes
from hjepa_train.config import TrainerConfig
from hjepa_train.ema import EMA
from hjepa_train.errors import CheckpointError, TrainingError, UnstableError, one_line
from hjepa_train.graph import compile_module, multiply_in_fp8, recompute_activations
from hjepa_train.guard import Guard, step_unless
from hjepa_train.optim import set_rates
from hjepa_train.outcome import Outcome
from hjepa_train.parallel import ParallelKind, World, call, gradient_sync, init_world, wrap
from hjepa_train.precision import autocast
from hjepa_train.protocols import Batch, Callback, HasEMA, Stream
from hjepa_train.sharded import is_sharded, whole
from hjepa_train.signals import StopSignals, spare_children
from hjepa_train.throughput import Throughput

logger = logging.getLogger(__name__)

_CPU_COMPILES = (
    "compile=true on a CPU: the first step of each kind (with or without masks, another level, ...) waits for the C++ "
    "compiler, some minutes on two cores; later runs of the same model find its work in a cache"
)


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
    skipped: Tensor
    """Whether the guard has left the step out."""


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
        blocks: Classes of submodules that FSDP shards, and compiles, one at a time.
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
        recompute_activations(self.module, config.recompute)
        if config.fp8:
            multiply_in_fp8(self.module, blocks)
        if config.compile:
            one_graph = config.parallel.kind is not ParallelKind.fsdp
            mode = config.compile_mode
            compile_module(self.module, blocks, whole=one_graph, backend=config.compile_backend, mode=mode)
            if self.world.is_main and self.world.device.type == "cpu" and config.compile_backend == "inductor":
                logger.info(_CPU_COMPILES)
        self.model = wrap(self.module, config.parallel, self.world, blocks)
        self.optimizer = config.optimizer.build(self.module)
        self.ema = EMA(self.module.ema_pairs()) if isinstance(self.module, HasEMA) else None
        saving = CheckpointConfig() if checkpoint is None else checkpoint
        self.store: CheckpointStore | None = None
        self._saver: Saver | None = None
        self.callbacks = [*callbacks]
        if run_dir is not None:
            self.store = CheckpointStore(run_dir / "checkpoints", keep=saving.keep, keep_every=saving.keep_every_steps)
            self._saver = Saver(self.store, self.world)
            self.callbacks.append(SaveEvery(saving))
        self._grace_seconds = saving.grace_seconds
        self.metadata = {} if metadata is None else metadata
        self.step = 0
        """Optimizer steps done."""
        self.samples = 0
        """Samples seen by all ranks."""
        self.lr_scale = 1.0
        """What the learning rate's schedule is multiplied by."""
        self.module_step: Callable[[int], int] = lambda step: step
        """Which step the module is told of at a step."""
        self.announced_seconds = 0.0
        """How long callbacks will be at work after the next step, by their own account."""
        self.stop_reason: str | None = None
        self.end_reason: str | None = None
        self._schedules = self._build_schedules()
        self._trainable = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self._save_requested = False
        self._saved_step: int | None = None
        self._stall: float | None = None
        self._row: dict[str, float] = {}
        self._speed = Throughput()
        dumps = None if run_dir is None else run_dir / "dumps"
        self.guard = Guard(config.guard, self.module, self.world, check_every=config.check_every, folder=dumps)

    def fit(self) -> Outcome:
        """Train to the last step, or until a signal or a callback asks for a stop; save, and say which it was.

        Raises:
            UnstableError: Where too many steps in a row are bad, or a collapse is not tolerated.
            TrainingError: Where the stream ends.
            CheckpointError: Where a checkpoint is of another model, another optimizer or a later step, or cannot be
                written.
        """
        outcome: Outcome | None = None
        try:
            with StopSignals(self.request_stop, self._grace_seconds):
                self.restore()
                with self._sparing():
                    self._call(lambda callback: callback.on_fit_start(self))
                self._speed.start(step=self.step, samples=self.samples)
                ended = self._train()
            outcome = Outcome.DONE if ended else Outcome.PREEMPTED
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

    def announce(self, seconds: float) -> None:
        """Tell, when a step has ended, of long work after the next one: a `TimeLimit` stops where it has no time."""
        self.announced_seconds += seconds

    def request_save(self) -> None:
        """Save a checkpoint when this step has ended."""
        self._save_requested = True

    def request_stop(self, reason: str) -> None:
        """Stop when this step has ended, after saving; every rank stops at the same step."""
        self.stop_reason = reason

    def request_end(self, reason: str) -> None:
        """End the run as done when this step has ended, after saving; every rank ends at the same step."""
        self.end_reason = reason

    def save(self) -> None:
        """Take a checkpoint of the present step, to be written while the training goes on; all ranks call it.

        Raises:
            CheckpointError: Where the checkpoint before could not be written.
        """
        if self._saver is None or self._saved_step == self.step:
            return
        self.guard.check(self.step, now=True)
        began = time.perf_counter()
        self._call(lambda callback: callback.on_save(self))
        tensors, own = run_tensors(self.module, self.optimizer), generator_states(self.world)
        # Buffers may differ between ranks: DDP gives all of them the main rank's, under FSDP each goes on with its own.
        names = [f"{MODEL}/{name}" for name, _ in self.module.named_buffers(remove_duplicate=False)]
        buffers = {name: tensors.pop(name) for name in names if name in tensors and not is_sharded(tensors[name])}
        if self.world.is_main:
            own |= buffers
        elif self.config.parallel.kind is ParallelKind.fsdp:
            own |= {of_rank(name, self.world): tensor for name, tensor in buffers.items()}
        self._saver.take(self.step, tensors, own, self._state(), model_shapes(self.module))
        self._saved_step = self.step
        stall = time.perf_counter() - began
        self._stall = (self._stall or 0.0) + stall
        self._saver.times.stalls.append(stall)
        if self.world.is_main:
            logger.info("checkpoint of step %d: training stalled %.3f s", self.step, stall)

    def restore(self) -> None:
        """Go to the newest whole checkpoint of the run directory, if there is one; all ranks call it."""
        if self.store is None:
            return
        check_dtypes(run_tensors(self.module, self.optimizer))
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
        if step > self.config.steps:
            raise CheckpointError(
                f"steps={self.config.steps}: {self.store.folder} has a checkpoint of step {step}; allowed: {step} "
                "(nothing is left to do) and more; raise steps or choose another run directory"
            )
        if step >= 0:
            checkpoint = self.store.at(step) if checkpoint is None else checkpoint
            checkpoint.check_model(model_shapes(self.module))
            checkpoint.check_optimizer(self.config.optimizer.kind)
            restore(self.module, self.optimizer, self.world, checkpoint.tensors())
            self._load_state(checkpoint.state)

    def _train(self) -> bool:
        """Run the loop, and let the last checkpoint come to its end; tell whether the run is done."""
        began = time.perf_counter()
        self.module.train()
        batches = self._open_stream()
        try:
            with self._sparing():
                ended = self._loop(batches)
        except Exception:
            self._let_save_end()
            raise
        if self._saver is not None:
            times, waiting = self._saver.times, time.perf_counter()
            self._saver.wait()
            if times.stalls and self.world.is_main:
                ended_at = time.perf_counter()
                waited = ended_at - waiting
                times.stalls[-1] += waited
                logger.info("checkpoint of step %d: waited %.3f s more until it was written", self.step, waited)
                logger.info(times.summary(ended_at - began))
        return ended

    def _sparing(self) -> AbstractContextManager[None]:
        """Let compilers do their work where all of the process group is asked to stop."""
        return spare_children() if self.config.compile else nullcontext()

    def _let_save_end(self) -> None:
        try:
            if self._saver is not None:
                self._saver.wait()
        except Exception as error:
            logger.warning("the last checkpoint was not saved: %s", one_line(error))

    def _loop(self, batches: Iterator[Batch]) -> bool:
        stop, ended = False, self.end_reason is not None
        while self.step < self.config.steps and not (stop or ended):
            result = self._train_step(batches)
            self.step += 1
            if self._is_logged():
                self.log(self._read(result))
            with self._speed.paused():
                self._end_step(result)
            wishes = (self.stop_reason is not None, self.end_reason is not None, self._save_requested)
            unsaved = self._saver is not None and self._saver.failed
            # A rank that is late is waited for here: that is time of the step.
            stop, ended, save, unsaved = self.world.any(*wishes, unsaved)
            if unsaved:
                break
            if save or stop or ended or self.step == self.config.steps:
                self._save_requested = False
                with self._speed.paused():
                    self.save()
        if (stop or ended) and self.step < self.config.steps and self.world.is_main:
            reason = (self.end_reason if ended else self.stop_reason) or "asked by another rank"
            what = "ended" if ended else "stopped"
            logger.info("%s after step %d of %d (%s)", what, self.step, self.config.steps, reason)
        return ended or self.step >= self.config.steps

    def _end_step(self, result: StepResult) -> None:
        self.announced_seconds = 0.0
        try:
            self._call(lambda callback: callback.on_step_end(self, result))
        except UnstableError:
            # The row says why.
            self._flush_row()
            raise
        self._flush_row()

    def _train_step(self, batches: Iterator[Batch]) -> StepResult:
        rates = {name: schedule(self.step) for name, schedule in self._schedules.items()}
        rates["lr"] *= self.lr_scale
        set_rates(self.optimizer, learning_rate=rates["lr"], weight_decay=rates["weight_decay"])
        self.guard.begin(self.step)
        loss, metrics, embeddings = self._backward(batches)
        grad_norm = self._clip()
        bad = self.guard.judge(loss, grad_norm, rates)
        self.guard.check(self.step + 1, now=self.step + 1 == self.config.steps)
        on_host = self.guard.on_host
        step_unless(self.optimizer, bad, on_host=on_host)
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None and not (on_host and bool(bad)):
            self.ema.update(rates["ema_momentum"], unless=None if on_host else bad)
        return StepResult(
            loss=loss, metrics=metrics, embeddings=embeddings, grad_norm=grad_norm, rates=rates, skipped=bad
        )

    def _backward(self, batches: Iterator[Batch]) -> tuple[Tensor, dict[str, Tensor], Mapping[str, Tensor]]:
        count = self.config.accumulate
        total = torch.zeros((), device=self.world.device)
        sums: dict[str, Tensor] = {}
        embeddings: Mapping[str, Tensor] = {}
        for micro in range(count):
            batch = self._next(batches)
            self.guard.saw(batch)
            with gradient_sync(self.model, enabled=micro == count - 1):
                with autocast(self.config.precision, self.world.device):
                    loss, metrics, embeddings = self.model(batch, self.module_step(self.step))
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
            with self._speed.waiting():
                first = list(itertools.islice(batches, 1 if self.step < self.config.steps else 0))
        return itertools.chain(first, batches)

    def _next(self, batches: Iterator[Batch]) -> Batch:
        with self._speed.waiting():
            batch = next(batches, None)
        if batch is None:
            raise TrainingError(
                f"step {self.step}: the stream has ended before step {self.config.steps}; give a stream without end"
            )
        return batch.to(self.world.device, non_blocking=True)

    def _clip(self) -> Tensor:
        gradients = [parameter.grad for parameter in self._trainable if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.clip_norm is not None:
            # A norm that is not finite would make every gradient so: a dump could not tell which were to blame.
            finite = norm.nan_to_num(nan=0.0, posinf=0.0)
            torch.nn.utils.clip_grads_with_norm_(self._trainable, self.config.clip_norm, finite)
        return whole(norm)

    def _is_logged(self) -> bool:
        return self.step % self.config.log_every == 0 or self.step in (1, self.config.steps)

    def _read(self, result: StepResult) -> dict[str, float]:
        """Average the step's scalars over ranks and bring them to the host, all at once."""
        scalars = {**dict(sorted(result.metrics.items())), "loss": result.loss, "grad_norm": result.grad_norm}
        scalars |= {"skipped": self.guard.skipped, "data_wait": torch.tensor(self._speed.waited)}
        stacked = torch.stack([scalar.to(self.world.device, torch.float64) for scalar in scalars.values()])
        means = self.world.sum(stacked) / self.world.size
        row = {f"train/{name}": mean for name, mean in zip(scalars, means.tolist(), strict=True)}
        row |= {f"train/{name}": rate for name, rate in result.rates.items()}
        speed = self._speed.read(step=self.step, samples=self.samples)
        row |= {"train/images_per_second": speed.images_per_second, "train/step_ms": speed.step_ms}
        row["train/data_wait"] /= speed.seconds
        row["train/samples"] = float(self.samples)
        if self._stall is not None:
            row["checkpoint/stall_seconds"], self._stall = self._stall, None
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
        """Let every callback end, whatever others do; the error that has ended the run is the one to show."""
        failed: Exception | None = None
        for callback in self.callbacks:
            try:
                callback.on_fit_end(self, outcome)
            except Exception as error:
                logger.warning("%s: %s", callback.key, one_line(error))
                # A full disk takes nothing from what has been done and saved.
                failed = failed or (None if isinstance(error, OSError) else error)
        if failed is not None and outcome is not None:
            raise failed

    def _call(self, hook: Callable[[Callback], None]) -> None:
        for callback in self.callbacks:
            hook(callback)

    def _build_schedules(self) -> dict[str, Callable[[int], float]]:
        config = self.config
        schedules = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        if self.ema is not None:
            schedules["ema_momentum"] = config.ema_momentum
        length = config.length
        for name, schedule in schedules.items():
            first = length.to_steps(schedule.warmup_steps, schedule.unit)
            if first >= config.steps and self.world.is_main:
                text = "%s: its warm-up takes %d steps, the run %d: it never gets to its value"
                logger.warning(text, name, first, config.steps)
        return {name: schedule.build(length) for name, schedule in schedules.items()}

    def _state(self) -> dict[str, Any]:
        states = {key: callback.state_dict() for key, callback in self._keyed_callbacks()}
        return {
            "step": self.step,
            "samples": self.samples,
            "world_size": self.world.size,
            "stream": self.stream.state_dict(),
            "optimizer": self.config.optimizer.kind.value,
            "guard": self.guard.state_dict(),
            "callbacks": {key: state for key, state in states.items() if state},
            "torch": str(torch.__version__),
            "metadata": self.metadata,
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        self.step = self._saved_step = int(state["step"])
        self.samples = int(state["samples"])
        self.stream.load_state_dict(state["stream"])
        self.guard.load_state_dict(state["guard"])
        for key, callback in self._keyed_callbacks():
            if key in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][key])
        if self.world.is_main:
            logger.info("resumed at step %d of %d", self.step, self.config.steps)

    def _keyed_callbacks(self) -> Iterator[tuple[str, Callback]]:
        """Yield each callback with the name of its state: its key, and a number from the second of a key on."""
        counts: Counter[str] = Counter()
        for callback in self.callbacks:
            counts[callback.key] += 1
            count = counts[callback.key]
            yield callback.key if count == 1 else f"{callback.key} {count}", callback
