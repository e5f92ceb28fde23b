"""The whole configuration of a run, typed: what `conf/` fills, the command line overrides and `config.yaml` keeps."""

import math
import sys
from dataclasses import dataclass, field

from hjepa_data.masks import MaskConfig
from hjepa_data.stream import Decode, EvalConfig, StreamConfig, UnreadablePolicy, WorkerConfig
from hjepa_data.transforms import IMAGENET_MEAN, IMAGENET_STD, ColorConfig, ViewGroup
from hjepa_models import HJEPAConfig, Prediction
from hjepa_models.encoder import check_image_size
from hjepa_pretrain.baselines.config import BaselineConfig, BaselineKind
from hjepa_pretrain.duration import seconds
from hjepa_train import (
    CheckpointConfig,
    EarlyStopConfig,
    LoggerConfig,
    LoggerKind,
    MonitorConfig,
    ParallelKind,
    ProfilerConfig,
    TrainerConfig,
)
from hjepa_train.plan import MachineConfig
from hjepa_train.precision import Precision

# More than any machine has cores; thousands end the process in which they start.
_MAX_THREADS = 1024


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Where a run lives and how long it goes on."""

    dir: str | None = None
    """Its folder; null makes `runs/<recipe>-<time>`. A folder that holds a run is resumed."""
    steps: int = 100_000
    """Optimizer steps of the whole run."""
    train_time: str | None = None
    """Train for this long, as in 80s, 5m or 8h: how many steps fit is measured first and takes the place of `steps`."""
    seed: int = 0
    """Of weights, order, crops, colours and masks."""
    time_limit: str | None = None
    """Stop, save and exit with code 75 at the first end of a step after 90s, 30m or 11h30m, say, or before an
    evaluation on the way that would last longer; null is no limit."""
    device: str = "auto"
    """`auto` takes a GPU if there is one; `cpu`, `cuda`."""
    threads: int | None = None
    """CPU threads of torch; null leaves torch's own choice, one a core."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.dir is not None and self.dir.encode(errors="replace").decode() != self.dir:
            raise ValueError(
                f"run.dir={self.dir}: no text in the encoding of file names, {sys.getfilesystemencoding()}; allowed: a "
                "name that is; PYTHONUTF8=1 makes it UTF-8"
            )
        if self.steps < 1:
            raise ValueError(f"run.steps={self.steps}: nothing to train; allowed: 1 and more")
        if abs(self.seed) >= 2**32:
            raise ValueError(f"run.seed={self.seed}: too large; allowed: below 2^32")
        if self.threads is not None and not 1 <= self.threads <= _MAX_THREADS:
            raise ValueError(
                f"run.threads={self.threads}: too few or too many; allowed: 1 to {_MAX_THREADS}, or null; a core keeps "
                "one busy"
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"run.device={self.device}: unknown; allowed: auto, cpu, cuda")
        for name in ("train_time", "time_limit"):
            text = getattr(self, name)
            if text is not None:
                setattr(self, name, str(text))
                seconds(str(text), f"run.{name}")

    @property
    def train_time_seconds(self) -> float | None:
        """The time to train in seconds, or None."""
        return None if self.train_time is None else seconds(self.train_time, "run.train_time")

    @property
    def time_limit_seconds(self) -> float | None:
        """The time limit in seconds, or None."""
        return None if self.time_limit is None else seconds(self.time_limit, "run.time_limit")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which images, in which batches and crops."""

    train: str | None = None
    """What to learn from: shards (braces, a glob, a directory, a list file or one tar, here or at http, s3 or gs URLs),
    a folder of images, `hf:NAME:SPLIT` or `torchvision:CLASS:ROOT`; several with ` + ` between them."""
    weights: tuple[float, ...] = ()
    """Share of each of several in a batch; none shows every image once an epoch."""
    eval: str | None = None
    """Images to measure on, named likewise; null measures nothing but the ranks."""
    cache: str | None = None
    """Where the demo's shards are kept; null is `~/.cache/hjepa`."""
    image_size: tuple[int, ...] = (224, 224)
    """Height and width of a view, pixels."""
    batch_size: int = 256
    """Images of an optimizer step, over all processes and accumulated micro-batches."""
    views: int = 1
    """Views cut out of each image; the `global` level needs two and more."""
    crop_scale: tuple[float, ...] = (0.3, 1.0)
    """Area of a view as a part of the image's."""
    crop_ratio: tuple[float, ...] = (0.75, 4 / 3)
    """Width over height of a view on the image."""
    local_views: int = 0
    """Smaller views beside those, for the global level (multi-crop): each has to agree with those, not with another."""
    local_size: tuple[int, ...] = (96, 96)
    """Height and width of a local view, pixels."""
    local_scale: tuple[float, ...] = (0.05, 0.3)
    """Area of a local view as a part of the image's."""
    flip: float = 0.5
    """Probability of a mirror image."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Of each channel, pixels from 0 to 1."""
    std: tuple[float, ...] = IMAGENET_STD
    """Likewise."""
    workers: int = 2
    """Processes that load and crop; 0 does it in the training process."""
    window_shards: int = 16
    """Shards that are shuffled together."""
    cache_mib: int = 0
    """Memory in which each worker keeps small decoded images, MiB; the batches do not change."""
    max_skipped_fraction: float = 0.01
    """Share of images left out above which the run stops; ten are always allowed."""
    unreadable: str = "stop"
    """What a shard that vanishes or cannot be fetched does to the run: `stop`, or `skip` its images and count them."""
    decode: str = "cpu"
    """Where training JPEGs become pixels: `cpu`, in the workers, or `gpu`, by nvJPEG; order, boxes and flips are the
    same."""
    eval_crop_fraction: float = 0.875
    """Part of the largest centred square that evaluation sees."""

    def __post_init__(self) -> None:
        """Take lists, and refuse what the parts would refuse later."""
        for name in ("image_size", "crop_scale", "crop_ratio", "local_size", "local_scale", "mean", "std", "weights"):
            setattr(self, name, tuple(getattr(self, name)))
        self._check_pixels()
        if not 0 < self.eval_crop_fraction <= 1:
            raise ValueError(
                f"data.eval_crop_fraction={self.eval_crop_fraction}: no part of an image; allowed: above 0, up to 1"
            )
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size={self.batch_size}: a batch holds images; allowed: 1 and more")
        if self.workers < 0:
            raise ValueError(f"data.workers={self.workers}: no number of processes; allowed: 0 and more")
        if self.views < 1 or self.local_views < 0:
            raise ValueError(
                f"data.views={self.views}, local_views={self.local_views}: allowed: 1 and more, and 0 and more"
            )
        if self.unreadable not in set(UnreadablePolicy):
            raise ValueError(f"data.unreadable={self.unreadable}: unknown; allowed: {', '.join(UnreadablePolicy)}")
        if self.decode not in set(Decode):
            raise ValueError(f"data.decode={self.decode}: unknown; allowed: {', '.join(Decode)}")
        if self.cache_mib and self.decode == Decode.GPU:
            raise ValueError(
                f"data.cache_mib={self.cache_mib}: data.decode=gpu leaves no decoded image to keep; allowed: 0"
            )
        if self.cache_mib < 0:
            raise ValueError(f"data.cache_mib={self.cache_mib}: no amount of memory; allowed: 0 (none) and more")
        # What the parts refuse is refused now, and not when the shards have been opened.
        self.stream(1)
        self.evaluation()

    def _check_pixels(self) -> None:
        for name in ("image_size", "local_size"):
            size = getattr(self, name)
            if len(size) != 2 or min(size) < 1:
                raise ValueError(f"data.{name}={size}: no size; allowed: a height and a width, pixels")
        positive = all(0.0 < one < math.inf for one in self.std)
        if len(self.mean) != 3 or len(self.std) != 3 or not positive or not all(map(math.isfinite, self.mean)):
            raise ValueError(
                f"data.mean={self.mean}, std={self.std}: allowed: a number for each of the 3 channels, above 0 for std"
            )

    def stream(self, accumulate: int, ranks: int = 1) -> StreamConfig:
        """The training stream of micro-batches, which the ranks share."""
        parts = accumulate * ranks
        if self.batch_size % parts:
            raise ValueError(
                f"data.batch_size={self.batch_size}: {ranks} processes with trainer.accumulate={accumulate} cannot "
                f"share it equally; allowed: multiples of {parts}"
            )
        views = [
            ViewGroup(count=count, size=size, scale=scale, ratio=self.crop_ratio, flip=self.flip)
            for count, size, scale in (
                (self.views, self.image_size, self.crop_scale),
                (self.local_views, self.local_size, self.local_scale),
            )
            if count
        ]
        return StreamConfig(
            global_batch_size=self.batch_size // accumulate,
            window_shards=self.window_shards,
            views=tuple(views),
            workers=WorkerConfig(count=self.workers, pin_memory=True),
            cache_bytes=self.cache_mib << 20,
            max_skipped_fraction=self.max_skipped_fraction,
            unreadable=UnreadablePolicy(self.unreadable),
            decode=Decode(self.decode),
        )

    def evaluation(self) -> EvalConfig:
        """The finite stream of centre crops."""
        return EvalConfig(
            size=self.image_size,
            crop_fraction=self.eval_crop_fraction,
            workers=WorkerConfig(count=self.workers),
            max_skipped_fraction=self.max_skipped_fraction,
            unreadable=UnreadablePolicy(self.unreadable),
        )


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """What is measured, and how often."""

    every_steps: int | None = 1000
    """Optimizer steps between measurements of every level (kNN, RankMe); null never measures before the end."""
    train_samples: int = 10_000
    """Training images that make the bank of the kNN and fit the linear probe."""
    eval_samples: int = 10_000
    """Held-out images that are classified."""
    online_samples: int = 2_000
    """Images of each kind for the measurements on the way."""
    k: int = 20
    """Neighbours that vote."""
    precision: Precision = Precision.fp32
    """Arithmetic of the encoder while it is measured; `bf16` takes a fraction of the time."""
    at_end: bool = True
    """Measure every level at the end, beside the untrained encoder and raw pixels."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        for name in ("train_samples", "eval_samples", "online_samples", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"eval.{name}={getattr(self, name)}: too few; allowed: 1 and more")
        if self.train_samples < 2:
            raise ValueError(f"eval.train_samples={self.train_samples}: one image has no spread; allowed: 2 and more")
        banks = {"train_samples": self.train_samples}
        if self.every_steps is not None:
            banks["online_samples"] = self.online_samples
        for name, size in banks.items():
            if self.k > size:
                raise ValueError(f"eval.k={self.k}: more neighbours than eval.{name}={size}; allowed: up to {size}")
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(f"eval.every_steps={self.every_steps}: too small; allowed: 1 and more, or null")


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """What to look at before a run; the program then stops, and leaves no run behind."""

    show: bool = False
    """Draw learning rate, weight decay, EMA momentum, level weights and patch sizes over the run."""
    find_lr: bool = False
    """Train for `find_lr_steps` while the learning rate rises by equal factors, draw the loss and suggest a rate."""
    find_lr_low: float = 1e-6
    """First learning rate of the sweep."""
    find_lr_high: float = 1.0
    """Last one."""
    find_lr_steps: int = 100
    """Optimizer steps of the sweep."""
    dir: str = "plan"
    """Where the pictures go."""
    dry: bool = False
    """Print memory, bytes sent and time of a step on `world_size` ranks, none of which has to be there."""
    world_size: int = 1
    """Ranks of the dry run."""
    machine: MachineConfig = field(default_factory=MachineConfig)
    """What a rank of the dry run is made of."""
    models: tuple[str, ...] = ()
    """Models that the dry run compares; empty takes `model`, or ViT-L, H and g where none is named."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if not 0.0 < self.find_lr_low < self.find_lr_high < math.inf:
            raise ValueError(
                f"plan.find_lr_low={self.find_lr_low}, find_lr_high={self.find_lr_high}: no range of rates; allowed: "
                "0 < low < high"
            )
        self.models = tuple(self.models)
        if self.world_size < 1:
            raise ValueError(f"plan.world_size={self.world_size}: no number of ranks; allowed: 1 and more")
        if self.find_lr_steps < 10:
            raise ValueError(f"plan.find_lr_steps={self.find_lr_steps}: too few to see a curve; allowed: 10 and more")


@dataclass(kw_only=True, slots=True)
class PretrainConfig:
    """A run: `recipe` says how it learns, `model` what learns, `data` from what."""

    recipe: str = "hjepa_global"
    """`ijepa`, `hjepa`, `hjepa_global`, `hjepa_contrast` or a baseline: a file of conf/recipe."""
    preset: str = "none"
    """`demo` fits a recipe to the embedded demo, and is taken where no `data.train` is given; `small_images` to
    photos of 32x32 on one GPU."""
    model: str = "vit_small_patch16"
    """Size and patch of the encoder by name; `hjepa.encoder` has its other fields."""
    parallel: ParallelKind = ParallelKind.single
    """`single`, `ddp` or `fsdp`; under torchrun `ddp` unless said otherwise."""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    color: ColorConfig | None = None
    """Colour augmentation on the device; null leaves colours as they are."""
    mask_law: str = "multiblock"
    """Which class `masks` is of, a key of `hjepa_data.masks.MASK_LAWS`; chosen by `masks=NAME`."""
    masks: MaskConfig
    """`masks=multiblock|released|block|random|hierarchical` chooses the law, `masks.*` sets its fields."""
    hjepa: HJEPAConfig = field(default_factory=HJEPAConfig)
    baseline: BaselineConfig | None = None
    """Trains `hjepa.encoder` by another method, to compare with; null trains the H-JEPA."""
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(steps=100_000))
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    profile: bool = False
    """Trace some steps into `<run.dir>/profile`; `profiler` says which."""
    profiler: ProfilerConfig = field(default_factory=ProfilerConfig)
    eval: EvaluationConfig = field(default_factory=EvaluationConfig)
    loggers: tuple[LoggerKind, ...] = (LoggerKind.tensorboard, LoggerKind.jsonl)
    """Where rows go: `tensorboard`, `jsonl` (the report's curves need it), `wandb`, `mlflow`."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    early_stop: EarlyStopConfig | None = None
    """`{metric: eval/encoder/knn_20, patience: 5}` ends a run that no longer gets better; null runs to the end."""
    plan: PlanConfig = field(default_factory=PlanConfig)

    @property
    def hides_patches(self) -> bool:
        """Whether the loss hides patches, so that masks are drawn."""
        if self.baseline is not None:
            return self.baseline.kind is BaselineKind.mae
        return self.hjepa.predicts is Prediction.hidden

    def __post_init__(self) -> None:
        """Refuse parts that do not fit one another."""
        self.loggers = tuple(self.loggers)
        if self.plan.dry and self.plan.world_size > 1 and self.parallel is ParallelKind.single:
            raise ValueError(
                f"plan.world_size={self.plan.world_size}: parallel=single is one process; allowed: 1, or "
                "parallel=ddp or fsdp"
            )
        measured = self.eval.every_steps is not None and (self.data.train is None or self.data.eval is not None)
        if self.early_stop is not None and self.early_stop.metric.startswith("eval/") and not measured:
            raise ValueError(
                f"early_stop.metric={self.early_stop.metric}: nothing is measured on the way; give data.eval and "
                "eval.every_steps, or leave early_stop out"
            )
        channels = self.hjepa.encoder.in_channels
        if channels != 3:
            raise ValueError(f"hjepa.encoder.in_channels={channels}: images of shards are decoded to 3; allowed: 3")
        if self.hjepa.encodes_views and self.data.views < 2:
            raise ValueError(
                f"data.views={self.data.views}: the global level and hjepa.prediction=view take views of one image; "
                "allowed: 2 and more, or hjepa.global_level=null and hjepa.prediction=hidden"
            )
        if self.data.local_views:
            check_image_size("data.local_size", self.data.local_size, self.hjepa.encoder.processing_patch)
            if tuple(self.data.local_size) == tuple(self.data.image_size):
                raise ValueError(
                    f"data.local_size={self.data.local_size}: a local view as large as data.image_size is none; "
                    "allowed: another size; give a smaller one, or raise data.views"
                )
        if self.data.views < self.hjepa.masked_views:
            raise ValueError(
                f"data.views={self.data.views}: hjepa.masked_views={self.hjepa.masked_views} of them are to be masked; "
                "raise data.views"
            )
