"""One rank of two, of which the second has a full disk at step 3 of a run, and fails at step 3 of the next.

Arguments: work folder, kind. Environment: RANK, WORLD_SIZE, as torchrun sets them.
"""

import contextlib
import logging
import resource
import sys
from pathlib import Path

from hjepa_train import Callback, CheckpointConfig, CheckpointError, ParallelConfig, Trainer, TrainerConfig, init_world
from hjepa_train.testing import ArithmeticStream, ToyBlock, ToyModule


class Fail(Callback):
    def on_step_end(self, trainer, result):
        if trainer.step == 3 and trainer.world.rank == 1:
            raise RuntimeError("this machine is gone")


class FullDisk(Callback):
    """The kernel refuses to let a file of the second rank grow: the real writer meets a real error."""

    def on_fit_start(self, trainer):
        self.soft, self.hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if trainer.world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, self.hard))

    def on_fit_end(self, trainer, outcome):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.soft, self.hard))


def train(world, parallel, folder, steps, callbacks=()):
    Trainer(
        ToyModule(),
        ArithmeticStream(rank=world.rank, size=world.size),
        TrainerConfig(steps=steps, parallel=parallel),
        world=world,
        run_dir=folder,
        callbacks=callbacks,
        checkpoint=CheckpointConfig(every_steps=1, every_minutes=None),
        blocks=[ToyBlock],
    ).fit()


def main():
    logging.basicConfig(level=logging.INFO)
    root, parallel = Path(sys.argv[1]), ParallelConfig(kind=sys.argv[2], device="cpu")
    world = init_world(parallel, init_method=f"file://{root}/store")
    train(world, parallel, root / "full", 2)
    with contextlib.suppress(CheckpointError):
        train(world, parallel, root / "full", 1000, [FullDisk()])
    train(world, parallel, root / "failing", 1000, [Fail()])


if __name__ == "__main__":
    main()
