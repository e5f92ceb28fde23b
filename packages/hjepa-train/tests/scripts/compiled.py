"""One rank of two: a step that is one graph for the compiler, under DDP with several buckets of gradients.

Argument: work folder. Environment: RANK, WORLD_SIZE, as torchrun sets them. The main rank prints, for each way to keep
activations, how many graphs the back end got for a step, how many weights have moved, and how far from where they get
without compilation, over how far they have come.
"""

import json
import sys
from pathlib import Path

import torch
from torch._dynamo import lookup_backend, register_backend

from hjepa_train import ParallelConfig, Trainer, TrainerConfig, init_world, leave_world
from hjepa_train.testing import ArithmeticStream, ToyBlock, ToyModule

STEPS = 2
WIDTH = 1024  # 50 MB of gradients: DDP's buckets hold 25
graphs = []


@register_backend
def counting(graph, inputs):
    graphs.append(graph)
    return lookup_backend("aot_eager")(graph, inputs)


class Compiled(ToyModule):
    def compile_step(self, **options):
        self.forward = torch.compile(self.forward, fullgraph=True, dynamic=False, **options)


def train(parallel, world, recompute, compiled):
    torch._dynamo.reset()
    config = TrainerConfig(
        steps=STEPS,
        precision="fp32",
        parallel=parallel,
        recompute=recompute,
        compile=compiled,
        compile_backend="counting",
    )
    stream = ArithmeticStream(width=WIDTH, rank=world.rank, size=world.size)
    trainer = Trainer(Compiled(width=WIDTH), stream, config, world=world, blocks=[ToyBlock])
    before = {name: value.clone() for name, value in trainer.module.state_dict().items()}
    trainer.fit()
    return {name: value - before[name] for name, value in trainer.module.state_dict().items()}


def main():
    parallel = ParallelConfig(kind="ddp", device="cpu")
    world = init_world(parallel, init_method=f"file://{Path(sys.argv[1])}/store")
    outcomes = {}
    for recompute in ((), ("ToyBlock",)):
        graphs.clear()
        plain, compiled = (train(parallel, world, recompute, on) for on in (False, True))
        far = [float((compiled[name] - moved).norm() / moved.norm()) for name, moved in plain.items() if moved.any()]
        outcomes["".join(recompute) or "kept"] = {"graphs": len(graphs) / STEPS, "moved": len(far), "far": max(far)}
    if world.is_main:
        print(json.dumps(outcomes))
    leave_world()


if __name__ == "__main__":
    main()
