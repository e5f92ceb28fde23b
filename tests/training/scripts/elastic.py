"""A rank under `torchrun --max-restarts=1`; the second is killed at step 5 of its first life. Argument: work folder."""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from hjepa_train import (
    Callback,
    CheckpointConfig,
    MetricsLog,
    ParallelConfig,
    Trainer,
    TrainerConfig,
    init_world,
    leave_world,
)
from hjepa_train.testing import ArithmeticStream, ToyModule


class Die(Callback):
    def on_step_end(self, trainer, result):
        first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if first_life and trainer.step == 5 and trainer.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    config = TrainerConfig(steps=8, log_every=1, parallel=ParallelConfig(kind="ddp", device="cpu"))
    world = init_world(config.parallel)
    trainer = Trainer(
        ToyModule(),
        ArithmeticStream(rank=world.rank, size=world.size),
        config,
        world=world,
        run_dir=folder,
        callbacks=[MetricsLog(folder / "metrics.jsonl"), Die()],
        checkpoint=CheckpointConfig(every_steps=2, every_minutes=None),
    )
    trainer.restore()
    life = {"restart": int(os.environ["TORCHELASTIC_RESTART_COUNT"]), "from step": trainer.step}
    if world.is_main:
        with (folder / "lives.jsonl").open("a") as file:
            file.write(json.dumps(life) + "\n")
    trainer.fit()
    leave_world()


if __name__ == "__main__":
    main()
