"""One rank of two: train under DDP and FSDP in many ways, let the main rank print what came out.

Argument: work folder. Environment: RANK, WORLD_SIZE, as torchrun sets them.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch

from hjepa_train import (
    Callback,
    CheckpointConfig,
    CollapseMonitor,
    DivergedError,
    FSDPConfig,
    GuardConfig,
    MetricsLog,
    MonitorConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    Trainer,
    TrainerConfig,
    init_world,
    leave_world,
)
from hjepa_train.testing import ArithmeticStream, ToyBlock, ToyModule

CASES = {
    "plain": {},
    "accumulate": {"accumulate": 2},
    "late": {"late_step": 3},
    "skipped": {"bad_step": 2},
    "undone": {"bad_step": 2, "deferred": True},
}

FSDP_CASES = {
    "freed": {},
    "kept": {"reshard_after_forward": False},
    "half": {"param_dtype": "bf16", "reduce_dtype": "bf16"},
}


class BadOnLastRank(ToyModule):
    """Its loss is infinite at a step on one rank, with a gradient that tells nobody."""

    def __init__(self, bad_step, bad_rank, **fields):
        super().__init__(**fields)
        self.bad_step, self.bad_rank = bad_step, bad_rank

    def forward(self, batch, step):
        output = super().forward(batch, step)
        if self.bad_rank and step == self.bad_step:
            output.loss = output.loss + float("inf")
        return output


class Spoilt(ToyModule):
    """The gradient of its mask token is NaN, and no other."""

    def forward(self, batch, step):
        output = super().forward(batch, step)
        output.loss = output.loss + (self.mask_token * 0).sqrt().sum()
        return output


class StopRankOne(Callback):
    """A signal that reaches one rank only."""

    def on_step_end(self, trainer, result):
        if trainer.step == 2 and trainer.world.rank == 1:
            trainer.request_stop("a signal")


def train(case, parallel, world, folder, callbacks=(), steps=5):
    accumulate = case.get("accumulate", 1)
    config = TrainerConfig(
        steps=steps,
        accumulate=accumulate,
        clip_norm=0.2,
        precision="fp32",
        log_every=1,
        learning_rate=ScheduleConfig(kind="cosine", value=0.01, final=0.0, warmup_steps=2),
        ema_momentum=ScheduleConfig(value=0.9),
        parallel=parallel,
        optimizer=OptimizerConfig(fused=case.get("deferred")),
    )
    trainer = Trainer(
        BadOnLastRank(case.get("bad_step"), world.rank == world.size - 1, late_step=case.get("late_step", 0)),
        ArithmeticStream(batch_size=16 // accumulate, rank=world.rank, size=world.size),
        config,
        world=world,
        run_dir=folder,
        callbacks=[MetricsLog(folder / "metrics.jsonl"), CollapseMonitor(MonitorConfig(every=2)), *callbacks],
        checkpoint=CheckpointConfig(every_steps=None, every_minutes=None),
        blocks=[ToyBlock],
    )
    trainer.guard.on_host = not case.get("deferred", False)
    return trainer.fit()


def sent(parallel, world, kind, accumulate=1):
    """Count what is sent in two steps: to average gradients (and flags), `reduce`, or to gather weights, `gather`."""
    config = TrainerConfig(steps=2, accumulate=accumulate, precision="fp32", parallel=parallel)
    stream = ArithmeticStream(rank=world.rank, size=world.size)
    trainer = Trainer(ToyModule(), stream, config, world=world, blocks=[ToyBlock])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainer.fit()
    counts = {event.key: event.count for event in profile.key_averages() if event.key.startswith("c10d::")}
    return {name: count for name, count in counts.items() if kind in name}


def blamed(parallel, world, folder):
    """Return the parameters that the dump of a run names whose gradient is NaN."""
    config = TrainerConfig(steps=1, precision="fp32", guard=GuardConfig(max_skips=0), parallel=parallel)
    stream = ArithmeticStream(rank=world.rank, size=world.size)
    with contextlib.suppress(DivergedError):
        Trainer(Spoilt(), stream, config, world=world, run_dir=folder, blocks=[ToyBlock]).fit()
    return json.loads((folder / "dumps" / "step_00000001" / f"rank{world.rank}.json").read_text())[
        "gradients_not_finite"
    ]


def main():
    root = Path(sys.argv[1])
    outcomes = {}
    for kind in ("ddp", "fsdp"):
        parallel = ParallelConfig(kind=kind, device="cpu")
        world = init_world(parallel, init_method=f"file://{root}/store")
        for name, case in CASES.items():
            train(case, parallel, world, root / kind / name)
        stopped = train({}, parallel, world, root / kind / "stopped", [StopRankOne()])
        resumed = train({}, parallel, world, root / kind / "stopped")
        outcomes[kind] = [stopped, resumed]
        outcomes[f"{kind} blamed"] = blamed(parallel, world, root / kind / "spoilt")
        outcomes[f"{kind} reductions"] = [sent(parallel, world, "reduce", count) for count in (1, 4)]
    for name, fields in FSDP_CASES.items():
        parallel = ParallelConfig(kind="fsdp", device="cpu", fsdp=FSDPConfig(**fields))
        train({}, parallel, world, root / "fsdp" / name)
        outcomes[f"{name} gathers"] = sum(sent(parallel, world, "gather").values())
    if world.is_main:
        print(json.dumps(outcomes))
    leave_world()


if __name__ == "__main__":
    main()
