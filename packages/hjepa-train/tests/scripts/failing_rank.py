"""One rank of two, of which the second fails at step 3. Argument: work folder."""

import logging
import sys
from pathlib import Path

from hjepa_train import Callback, ParallelConfig, Trainer, TrainerConfig, init_world
from hjepa_train.testing import ArithmeticStream, ToyModule


class Fail(Callback):
    def on_step_end(self, trainer, result):
        if trainer.step == 3 and trainer.world.rank == 1:
            raise RuntimeError("the disk of this machine is gone")


def main():
    logging.basicConfig(level=logging.INFO)
    parallel = ParallelConfig(kind="ddp", device="cpu")
    world = init_world(parallel, init_method=f"file://{Path(sys.argv[1])}/store")
    stream = ArithmeticStream(rank=world.rank, size=world.size)
    Trainer(ToyModule(), stream, TrainerConfig(steps=1000, parallel=parallel), world=world, callbacks=[Fail()]).fit()


if __name__ == "__main__":
    main()
