"""Losses of the public package lightly on drawn embeddings, for test_baselines.py.

pip install --no-deps lightly==1.6.0 lightly-utils
python tests/pretrain/scripts/make_lightly.py > tests/pretrain/lightly.json
"""

import importlib
import json
from collections.abc import Callable

import torch
from torch import Tensor

from hjepa_models.objectives import random_directions

ROWS, TEMPERATURES = (8, 256), (0.05, 0.2, 1.0)


def embeddings(rows: int) -> Tensor:
    """Two views of `rows` images and two small ones [4, rows, 128]."""
    return 2 * torch.randn(4, rows, 128, generator=torch.Generator().manual_seed(rows))


def describe(loss: Callable[[Tensor], Tensor], rows: int) -> list[float]:
    """A loss, and its gradient along eight drawn directions."""
    z = embeddings(rows).requires_grad_()
    value = loss(z)
    value.backward()
    directions = torch.randn(z.numel(), 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [float(value.detach()), *(z.grad.flatten().double() @ directions).tolist()]


def their_losses() -> dict[str, Callable[[Tensor], Tensor]]:
    """Those of lightly, by the names of the test; SIGReg's directions, which are random, are ours of step 0."""
    lightly = importlib.import_module("lightly.loss")
    invariance = importlib.import_module("lightly.loss.lejepa_loss").lejepa_invariance_loss
    lightly.SIGReg._generate_unit_vectors = lambda _, device, dtype, width: random_directions(0, width, 1024)
    vicreg, sigreg = lightly.VICRegLoss(), lightly.SIGReg()
    contrast = {f"NT-Xent {temperature}": lightly.NTXentLoss(temperature=temperature) for temperature in TEMPERATURES}
    return {
        "VICReg": lambda z: vicreg(z[0], z[1]),
        "LeJEPA": lambda z: 0.05 * sigreg(z[:2]) + 0.95 * invariance(all_proj=z[:2], global_proj=z[:2]),
        "LeJEPA, two small views": lambda z: 0.05 * sigreg(z) + 0.95 * invariance(all_proj=z, global_proj=z[:2]),
        **{name: lambda z, loss=loss: loss(z[0], z[1]) for name, loss in contrast.items()},
    }


if __name__ == "__main__":
    found = {name: {str(rows): describe(loss, rows) for rows in ROWS} for name, loss in their_losses().items()}
    print(json.dumps(found, indent=1))
