"""One rank of two: batch norm under DDP or FSDP, stopped and resumed; each prints which tensors end as undisturbed.

Arguments: work folder, kind. Environment: RANK, WORLD_SIZE, as torchrun sets them.
"""

import json
import logging
import math
import sys
from pathlib import Path

import torch
from torch import nn

from hjepa_train import (
    Callback,
    CheckpointConfig,
    ParallelConfig,
    StepOutput,
    Trainer,
    TrainerConfig,
    init_world,
    leave_world,
)
from hjepa_train.testing import ArithmeticStream


class Normalised(nn.Module):
    """Its running statistics are those of the rank's own samples, until DDP gives it the main rank's; step 2 is bad."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def forward(self, batch, step):
        values = batch.values * (math.nan if step == 1 else 1.0)
        return StepOutput(loss=(self.layers(values) - 1.0).square().mean())


class StopAtThree(Callback):
    def on_step_end(self, trainer, result):
        if trainer.step == 3:
            trainer.request_stop("a test")


def train(world, parallel, folder, callbacks=()):
    config = TrainerConfig(steps=6, precision="fp32", parallel=parallel)
    stream = ArithmeticStream(rank=world.rank, size=world.size)
    saving = CheckpointConfig(every_steps=None, every_minutes=None)
    trainer = Trainer(Normalised(), stream, config, world=world, run_dir=folder, callbacks=callbacks, checkpoint=saving)
    trainer.fit()
    return trainer


def main():
    logging.basicConfig(level=logging.INFO)
    root = Path(sys.argv[1])
    parallel = ParallelConfig(kind=sys.argv[2], device="cpu")
    world = init_world(parallel, init_method=f"file://{root}/store")
    whole = train(world, parallel, root / "whole")
    train(world, parallel, root / "parts", [StopAtThree()])
    resumed = train(world, parallel, root / "parts")
    saved = [trainer.store.at(6).tensors() for trainer in (whole, resumed)]
    equal = {name: torch.equal(tensor, saved[1][name]) for name, tensor in saved[0].items()}
    states = [dict(trainer.module.named_buffers()) for trainer in (whole, resumed)]
    equal |= {f"rank/{name}": torch.equal(tensor, states[1][name]) for name, tensor in states[0].items()}
    print(json.dumps(equal))
    leave_world()


if __name__ == "__main__":
    main()
