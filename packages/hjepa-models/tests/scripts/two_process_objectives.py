"""One rank of every objective over gloo: arguments are rank, world size, the store's path and the folder of results."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from hjepa_models.canvas import dense_canvas
from hjepa_models.distributed import all_gather_rows
from hjepa_models.objectives import (
    LevelAverages,
    adaptive_weights,
    cjepa_loss,
    disentanglement,
    info_nce,
    patch_discrimination,
    sigreg,
    vicreg_loss,
    vicreg_terms,
)

IMAGES, TOKENS, WIDTH = 8, 4, 6


def gathered(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """A loss of one process's rows against the rows of all, whose value differs between ranks."""
    everyone = all_gather_rows(b.mean(1))
    assert len(everyone) == IMAGES
    return (a.mean(1) @ everyone.T).tanh().square().sum(1).mean()


def weighted_vicreg(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """VICReg's terms on weighted tokens; the share of known tokens differs between ranks."""
    terms = vicreg_terms(0.3 * a.flatten(0, 1), weight=weight.flatten())
    return terms.variance + terms.covariance


def levels(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Disentanglement of a level of four cells, of which some are unknown, from one of one cell."""
    fine = dense_canvas(a, (2, 2))
    fine = type(fine)(fine.values * weight.unsqueeze(-1), weight, fine.grid)
    return disentanglement([fine, dense_canvas(b[:, :1, :3], (1, 1)), dense_canvas(b, (2, 2))])


def adapted(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Two losses under weights that follow their average over all processes."""
    losses = torch.stack([a.square().mean(), (b - 1).abs().mean()])
    averages = LevelAverages(2, 0.9).to(a.dtype)
    averages.init_weights()
    averages.observe(torch.tensor(0), losses)
    return (adaptive_weights(averages(torch.tensor(1)), torch.tensor((1.0, 0.5))) * losses).sum()


OBJECTIVES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "gathered": gathered,
    "info_nce": lambda a, b, weight: info_nce(a.mean(1), b.mean(1), 0.5),
    "patches_image": lambda a, b, weight: patch_discrimination(a, b, 0.5, "image", weight),
    "patches_batch": lambda a, b, weight: patch_discrimination(a, b, 0.5, "batch"),
    "patches_batch_weighted": lambda a, b, weight: patch_discrimination(a, b, 0.5, "batch", weight),
    "disentanglement": levels,
    "vicreg": lambda a, b, weight: vicreg_loss(0.3 * a.mean(1), 0.3 * b.mean(1)),
    "vicreg_wide": lambda a, b, weight: vicreg_loss(0.3 * a.flatten(1), 0.3 * b.flatten(1)),
    "vicreg_weighted": weighted_vicreg,
    "cjepa": lambda a, b, weight: cjepa_loss(a, b, weight, vicreg_weight=0.5),
    "sigreg": lambda a, b, weight: sigreg(torch.stack([a.mean(1), b.mean(1)]), 7, 32),
    "adaptive": adapted,
}
# Compiled too: all that speak to the other processes but this, which changes the state of a module built within.
COMPILED = OBJECTIVES.keys() - {"adaptive"}


def main(rank: int, world: int, store: str, folder: str) -> None:
    """Run all objectives on this rank's images and let rank 0 write the means over ranks of losses and gradients."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    generator = torch.Generator().manual_seed(0)
    share = IMAGES // world
    mine = slice(rank * share, (rank + 1) * share)
    pixels = torch.randn(IMAGES, TOKENS, WIDTH, generator=generator, dtype=torch.float64)[mine]
    weight = (torch.rand(IMAGES, TOKENS, generator=generator) < 0.6).double()
    weight[:, 0] = 1
    results = {}
    for name, objective in OBJECTIVES.items():

        def step(first: Tensor, second: Tensor, objective: Callable[..., Tensor] = objective) -> Tensor:
            return objective(pixels @ first, (pixels @ second).tanh(), weight[mine])

        for compiled in (False, True) if name in COMPILED else (False,):
            maps = [torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)]
            maps = [m.requires_grad_() for m in maps]
            torch.compiler.reset()
            loss = (torch.compile(step, fullgraph=True, backend="eager") if compiled else step)(*maps)
            loss.backward()
            kind = f"{name}_compiled" if compiled else name
            results[f"{kind}_loss"] = loss.detach()
            results |= {f"{kind}_{i}": m.grad for i, m in enumerate(maps) if m.grad is not None}
    if world > 1:
        for value in results.values():
            dist.all_reduce(value)
            value.div_(world)
        dist.destroy_process_group()
    if rank == 0:
        save_file({k: v.contiguous() for k, v in results.items()}, Path(folder) / f"objectives_{world}.safetensors")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
    # All is written. Threads of gloo may abort a process that ends the long way (pytorch/pytorch#179291).
    os._exit(0)
