"""Train the real model in several layouts, each process a fork of this one, which imports torch once.

Argument: the folder where `<case>/<layout>.safetensors` (weights, target branch and buffers among them) and
`<case>/<layout>.json` (losses, gradient norms) go.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed.fsdp
from safetensors.torch import save_file

from hjepa_data import Batch
from hjepa_models import Block
from hjepa_pretrain import settings
from hjepa_pretrain.task import build_task
from hjepa_train import Callback, Trainer, init_world, leave_world, muon
from hjepa_train.sharded import local, whole

torch.set_num_threads(1)  # threads do not survive a fork

STEPS = 20
COMMON = (
    "preset=none", "model=vit_nano_patch8", "hjepa.encoder.embed_dim=24", "hjepa.encoder.num_heads=2",
    "hjepa.encoder.depth=2", "hjepa.predictor={depth: 1, embed_dim: 16, num_heads: 2}", "hjepa.pyramid.fpn_dim=16",
    "masks.num_targets=2", "data.image_size=[32,32]", "data.batch_size=8", "run.steps=20", "run.seed=3",
    "trainer.log_every=1", "trainer.precision=fp32", "trainer.optimizer.eps=1e-5",
    "trainer.learning_rate={kind: cosine, value: 2e-3, warmup_steps: 2}",
    "trainer.ema_momentum={value: 0.9, final: 0.99}",
)  # fmt: skip
# A bias before a batch norm has no gradient but rounding, which Adam would blow up to a full step: hence the eps.
GLOBAL = (
    "recipe=hjepa_global", "hjepa.predict_every=2", "hjepa.global_level.hidden_dim=16", "hjepa.global_level.out_dim=8",
    "hjepa.global_level.objective=sigreg", "trainer.optimizer.eps=1e-3", "trainer.clip_norm=0.5",
    "hjepa.encoder.stem=overlap", "hjepa.encoder.stem_channels=[8,12]", "hjepa.global_level.stem_maps=1",
)  # fmt: skip
HJEPA = ("recipe=hjepa", "hjepa.targets=ema", "hjepa.pyramid.levels=2", "trainer.clip_norm=5.0")
ADAPTIVE = "hjepa.level_weights={kind: adaptive, weights: [1.0, 0.5], momentum: 0.8}"
MUON = "global SIGReg, EMA, Muon"
# Statistics over a batch are those of a micro-batch where gradients are accumulated: only `levels` is equal there.
CASES = {
    "adaptive levels, VICReg, EMA": (*HJEPA, ADAPTIVE, "hjepa.vicreg_weight=0.1", "hjepa.vicreg_levels=true",
                                     "trainer.optimizer.eps=1e-3"),
    "global SIGReg, EMA, curriculum": (*GLOBAL, "hjepa.targets=ema", "hjepa.center_targets=true"),
    "levels": (*HJEPA, ADAPTIVE),
    MUON: (*GLOBAL, "hjepa.targets=ema", "hjepa.prediction=hidden", "hjepa.level_weights.weights=[1.0,0.5]",
           "trainer.optimizer={kind: muon, muon_names: [blocks., stem.], muon_scale: 4.0}"),
}  # fmt: skip
EVERY, PER_SAMPLE, HYBRID = tuple(CASES), ("levels",), ("adaptive levels, VICReg, EMA",)
SHARDED = tuple(case for case in EVERY if case != MUON)  # Muon needs whole matrices, which FSDP shards
COMPILED = ("trainer.compile=true", "trainer.compile_backend=aot_eager", "trainer.recompute=[Block]")
# Ranks, micro-batches, cases that are trained like by one process, and settings.
LAYOUTS = {
    "single": (1, 1, EVERY, ("parallel=single",)),
    "ddp": (2, 1, EVERY, ("parallel=ddp",)),
    "fsdp": (2, 1, SHARDED, ("parallel=fsdp",)),
    "single, accumulated": (1, 2, PER_SAMPLE, ("parallel=single",)),
    "ddp, accumulated": (2, 2, PER_SAMPLE, ("parallel=ddp",)),
    "fsdp, accumulated": (2, 2, PER_SAMPLE, ("parallel=fsdp",)),
    "ddp, compiled, recomputed": (2, 1, PER_SAMPLE, ("parallel=ddp", *COMPILED)),
    "fsdp, compiled, recomputed": (2, 1, PER_SAMPLE, ("parallel=fsdp", *COMPILED)),
    "hybrid": (4, 1, HYBRID, ("parallel=fsdp", "trainer.parallel.fsdp.shard_size=2")),
}


class PixelStream:
    """Random views of a global batch, of which each rank and each micro-batch takes its own images."""

    def __init__(self, world, accumulate, views, batch_size=8):
        self.world, self.accumulate, self.views, self.batch_size = world, accumulate, views, batch_size
        self.position = 0

    def __iter__(self):
        count = self.batch_size // self.accumulate // self.world.size
        while True:
            step, micro = divmod(self.position, self.accumulate)
            generator = torch.Generator().manual_seed(step)
            whole = [
                torch.randint(256, (self.batch_size, 3, 32, 32), generator=generator, dtype=torch.uint8)
                for _ in range(self.views)
            ]
            # Of some images little or nothing of one view lies in the other.
            crops = [0.1 + 0.9 * torch.rand(self.batch_size, 5, generator=generator) for _ in range(self.views)]
            first = (micro * self.world.size + self.world.rank) * count
            mine = slice(first, first + count)
            sample = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)[mine]
            self.position += 1
            yield Batch(
                views=tuple(view[mine] for view in whole),
                labels=torch.full_like(sample, -1),
                sample=sample,
                epoch=torch.zeros_like(sample),
                crops=tuple(crop[mine] for crop in crops),
            )

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Rows(Callback):
    def __init__(self):
        self.rows = []

    def on_row(self, trainer, row):
        self.rows.append({name: value for name, value in row.items() if "loss" in name or "grad_norm" in name})


def load(case, layout="single"):
    _, accumulate, _, words = LAYOUTS[layout]
    return settings.load([*COMMON, *CASES[case], f"trainer.accumulate={accumulate}", "run.device=cpu", *words])[0]


def orthogonalize(matrices, muons=muon.orthogonalize):
    """Muon's own in float32: its bfloat16 makes half a percent of an update out of a gradient's last digit."""
    with patch.object(torch.Tensor, "bfloat16", torch.Tensor.float):
        return muons(matrices)


def train(case, config, world, path):
    rows = Rows()
    stream = PixelStream(world, config.trainer.accumulate, config.data.views)
    trainer = Trainer(build_task(config), stream, config.trainer, callbacks=[rows], world=world, blocks=(Block,))
    trainer.fit()
    for online, target in trainer.module.ema_pairs():
        for source, copy in zip(online.parameters(), target.parameters(), strict=True):
            assert local(source).shape == local(copy).shape, "the average would not be local"
    state = {name: whole(tensor).contiguous() for name, tensor in trainer.module.state_dict().items()}
    if world.is_main:
        save_file(state, f"{path}.safetensors")
        Path(f"{path}.json").write_text(json.dumps(rows.rows))


def rank(root, layout, number):
    """Train every case as one rank of a layout."""
    size, _, names, _ = LAYOUTS[layout]
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(size))
    world = None
    for case in names:
        config = load(case, layout)
        if world is None:
            world = init_world(config.trainer.parallel, init_method=f"file://{root}/{layout}.store")
        train(case, config, world, root / case / layout)
    leave_world()


def fork(work):
    """Run `work` in a fork of this process; return the process's number."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # makes the pool anew before threads of autograd race to
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def main():
    root = Path(sys.argv[1])
    muon.orthogonalize = orthogonalize
    for case in CASES:
        (root / case).mkdir(parents=True, exist_ok=True)
        build_task(load(case))
    with torch.no_grad():  # threads of autograd do not survive a fork
        torch.compile(torch.nn.Linear(1, 1), backend="aot_eager")(torch.ones(1))  # imports: here, not in every fork
    for layout, (size, *_) in LAYOUTS.items():
        children = [fork(lambda number=number, layout=layout: rank(root, layout, number)) for number in range(size)]
        if any([os.waitpid(child, 0)[1] for child in children]):
            sys.exit(f"{layout}: a rank failed")


if __name__ == "__main__":
    main()
