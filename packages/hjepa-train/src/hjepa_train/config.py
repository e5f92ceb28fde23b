"""What a run is told before it begins: steps, rates, precision, parallelism."""

from dataclasses import dataclass, field

from hjepa_train.errors import choice
from hjepa_train.graph import CompileMode
from hjepa_train.guard import GuardConfig
from hjepa_train.optim import OptimizerConfig, OptimizerKind
from hjepa_train.parallel import ParallelConfig, ParallelKind
from hjepa_train.precision import Precision
from hjepa_train.schedules import RunLength, ScheduleConfig, ScheduleKind


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
    samples_per_step: int | None = None
    """Samples of an optimizer step over all ranks; schedules with `unit=samples` or `epochs` need it."""
    samples_per_epoch: int | None = None
    """Samples of the training set; schedules with `unit=epochs` need it."""
    recompute: tuple[str, ...] = ()
    """Classes of blocks that run again in the backward pass instead of keeping their activations, e.g. `[Block]`."""
    compile: bool = False
    """Compile the step, or under FSDP each block; the first step then takes up to a minute, on a few CPU cores more."""
    compile_backend: str = "inductor"
    """Of `torch.compile`, read with `compile=true`; `aot_eager` compiles without generating code."""
    compile_mode: CompileMode = CompileMode.default
    """Likewise: `reduce_overhead` replays CUDA graphs (one process, no accumulation), `max_autotune` more kernels."""
    fp8: bool = False
    """Linear maps of blocks multiply in 8-bit floats, by torchao; Ada, Hopper and newer GPUs, to be compiled."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """One process, DDP or FSDP."""
    log_every: int = 10
    """Steps between rows of training metrics; the first and the last step are always logged."""
    check_every: int = 10
    """CUDA only: steps between the questions whether too many steps were bad; a CPU asks at each step."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What happens to steps whose loss or gradient is not finite, or spikes."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        self.precision = choice(Precision, "precision", self.precision)
        self.compile_mode = choice(CompileMode, "compile_mode", self.compile_mode)
        self.recompute = tuple(self.recompute)
        for name in ("steps", "accumulate", "log_every", "check_every", "samples_per_step", "samples_per_epoch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: too small; allowed: 1 and more")
        graphs = self.compile_mode is not CompileMode.default
        if graphs and (self.accumulate > 1 or self.parallel.kind is not ParallelKind.single):
            raise ValueError(
                f"compile_mode={self.compile_mode}: CUDA graphs write each gradient to one place; allowed: "
                "default, or accumulate=1 and parallel=single"
            )
        for name in ("learning_rate", "weight_decay"):
            schedule: ScheduleConfig = getattr(self, name)
            schedule.check_range(name)
            if schedule.horizon is not None:
                raise ValueError(f"{name}.horizon={schedule.horizon}: makes a momentum; use value, and horizon=null")
        self.ema_momentum.check_range("ema_momentum", most=1.0)
        whole_matrices = (OptimizerKind.muon, OptimizerKind.lars)
        if self.optimizer.kind in whole_matrices and self.parallel.kind is ParallelKind.fsdp:
            raise ValueError(
                f"optimizer.kind={self.optimizer.kind}: needs whole matrices, which fsdp shards; use adamw or lion, or "
                "parallel=ddp"
            )
        if self.clip_norm is not None and not self.clip_norm > 0.0:
            raise ValueError(f"clip_norm={self.clip_norm}: not positive; allowed: above 0, or null for no clipping")

    @property
    def length(self) -> RunLength:
        """The length of the run in every unit that a schedule may count."""
        return RunLength(
            steps=self.steps, samples_per_step=self.samples_per_step, samples_per_epoch=self.samples_per_epoch
        )
