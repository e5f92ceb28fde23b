"""One rank of two: train under DDP and FSDP in many ways, let the main rank print what came out.

Argument: work folder. Environment: RANK, WORLD_SIZE, as torchrun sets them.
"""

import json
import sys
from pathlib import Path

from hjepa_train import (
    Callback,
    CheckpointConfig,
    CollapseMonitor,
    MetricsLog,
    MonitorConfig,
    ParallelConfig,
    ScheduleConfig,
    Trainer,
    TrainerConfig,
    init_world,
    leave_world,
)
from hjepa_train.testing import ArithmeticStream, ToyBlock, ToyModule

CASES = {"plain": {}, "accumulate": {"accumulate": 2}, "late": {"late_step": 3}}


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
    )
    trainer = Trainer(
        ToyModule(late_step=case.get("late_step", 0)),
        ArithmeticStream(batch_size=16 // accumulate, rank=world.rank, size=world.size),
        config,
        world=world,
        run_dir=folder,
        callbacks=[MetricsLog(folder / "metrics.jsonl"), CollapseMonitor(MonitorConfig(every=2)), *callbacks],
        checkpoint=CheckpointConfig(every_steps=None, every_minutes=None),
        blocks=[ToyBlock],
    )
    return trainer.fit()


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
    if world.is_main:
        print(json.dumps(outcomes))
    leave_world()


if __name__ == "__main__":
    main()
