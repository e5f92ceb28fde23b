"""Train step by step, each step by another layout that goes on from the checkpoint of the one before.

Every rank is a fork of this process, which imports torch once. Argument: work folder. Prints JSON: what differs.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed.fsdp  # imported once: here, not in every fork

from hjepa_train import (
    CheckpointConfig,
    CheckpointStore,
    ParallelConfig,
    ScheduleConfig,
    Trainer,
    TrainerConfig,
    init_world,
    leave_world,
)
from hjepa_train.parallel import FSDPConfig
from hjepa_train.testing import ArithmeticStream, ToyBlock, ToyModule

torch.set_num_threads(1)  # threads do not survive a fork

WIDTH = 6  # no multiple of 4: with 4 ranks some shards are shorter, and some are empty
CHAIN = [
    ("single", 1, None),
    ("fsdp", 4, None),
    ("ddp", 2, None),
    ("fsdp", 2, None),
    ("fsdp", 4, 2),
    ("single", 1, None),
    ("fsdp", 1, None),
    ("ddp", 4, None),
    ("fsdp", 4, 2),
    ("ddp", 2, None),
]


def train(folder, steps, kind="single", shard_size=None):
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    config = TrainerConfig(
        steps=steps,
        precision="fp32",
        learning_rate=ScheduleConfig(value=0.01),
        ema_momentum=ScheduleConfig(value=0.9),
        parallel=ParallelConfig(kind=kind, device="cpu", fsdp=FSDPConfig(shard_size=shard_size)),
    )
    world = init_world(config.parallel, init_method=f"file://{folder}/store-{steps}")
    trainer = Trainer(
        ToyModule(width=WIDTH),
        ArithmeticStream(batch_size=16, width=WIDTH, rank=world.rank, size=world.size),
        config,
        world=world,
        run_dir=folder,
        checkpoint=CheckpointConfig(every_steps=1, every_minutes=None, keep=None),
        blocks=[ToyBlock],
    )
    trainer.fit()
    leave_world()


def fork(work, rank, size):
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # makes the pool anew before threads of autograd race to
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def main():
    root = Path(sys.argv[1])
    for name in ("alone", "chain"):
        (root / name).mkdir()
    train(root / "alone", len(CHAIN))
    for steps, (kind, size, shard_size) in enumerate(CHAIN, start=1):
        children = [
            fork(lambda a=(root / "chain", steps, kind, shard_size): train(*a), rank, size) for rank in range(size)
        ]
        if any([os.waitpid(child, 0)[1] for child in children]):
            sys.exit(f"step {steps}, {kind} {size}: a rank failed")
    report = {"files": {}, "different": {}}
    for step, (kind, size, _) in enumerate(CHAIN, start=1):
        chain, alone = (CheckpointStore(root / name / "checkpoints").at(step) for name in ("chain", "alone"))
        report["files"][f"{step}: {kind} {size}"] = len(chain.files)
        mine, theirs = chain.tensors(), alone.tensors()
        for name in theirs:
            if not name.startswith("generator") and not torch.allclose(mine[name], theirs[name], atol=2e-6):
                report["different"][f"{step}: {name}"] = float((mine[name] - theirs[name]).abs().max())
    print(json.dumps(report))


if __name__ == "__main__":
    main()
