"""One rank of a step over gloo: arguments are rank, world size, the store's path and the folder of the results."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from hjepa_models import EncoderConfig, GlobalConfig, HJEPAConfig, PredictorConfig, PyramidConfig, StateConfig

BATCH = 8


def config(objective: str, prediction: str = "hidden") -> HJEPAConfig:
    """Return a model with a global level."""
    return HJEPAConfig(
        encoder=EncoderConfig(image_size=(16, 16), patch_size=(4, 4), embed_dim=24, depth=1, num_heads=2),
        predictor=PredictorConfig(depth=1, embed_dim=16, num_heads=2),
        pyramid=PyramidConfig(levels=3, fpn="concat", fpn_dim=16),
        global_level=GlobalConfig(hidden_dim=16, out_dim=8, num_directions=32, objective=objective),
        targets="detached",
        prediction=prediction,
        center_targets=prediction == "view",
        vicreg_weight=0.1,
    )


def drawn() -> HJEPAConfig:
    """Return a model with everything that is drawn by row, of two views."""
    state = StateConfig(hidden_dim=16, num_groups=4, num_classes=4, overshooting=2)
    return HJEPAConfig(
        encoder=EncoderConfig(
            image_size=(16, 16), patch_size=(4, 4), embed_dim=24, depth=1, num_heads=2, output_patch_size=(1, 1)
        ),
        predictor=PredictorConfig(depth=1, embed_dim=16, num_heads=2, state=state),
        pyramid=PyramidConfig(levels=3, fpn="concat", fpn_dim=16),
        targets="projection",
        output_tokens=2,
        masked_views=2,
    )


STEPS = {
    "sigreg": config("sigreg"),
    "vicreg": config("vicreg"),
    "nt_xent": config("nt_xent"),
    "view": config("vicreg", "view"),
    "drawn": drawn(),
}


def step(config: HJEPAConfig, rows: slice) -> tuple[torch.Tensor, torch.nn.Module]:
    """Return the loss of these rows of a fixed batch and the model with its gradients."""
    model = config.build(seed=1)
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(BATCH, 3, 16, 16, generator=generator)[rows] for _ in range(2)]
    order = torch.stack([torch.randperm(16, generator=generator) for _ in range(BATCH)])[rows]
    # Overlapping blocks: the number of hidden cells then differs between images, and so between ranks.
    targets = torch.stack([order[:, 4:10], order[:, 8:14]], dim=1)
    # Of some images nothing or little of one view lies in the other.
    crops = [torch.rand(BATCH, 5, generator=generator)[rows].round(decimals=1).clamp(min=0.1) for _ in range(2)]
    output = model(views, order[:, :4], targets, step=5, crops=crops)
    output.loss.backward()
    return output.loss.detach(), model


def main(rank: int, world: int, store: str, folder: str) -> None:
    """Run the step of this rank and let rank 0 write what the mean over ranks is."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    share = BATCH // world
    for name, model_config in STEPS.items():
        loss, model = step(model_config, slice(rank * share, (rank + 1) * share))
        results = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        results |= {key: buffer * 1.0 for key, buffer in model.named_buffers()} | {"loss": loss}
        if world > 1:
            for value in results.values():
                dist.all_reduce(value)
                value.div_(world)
        if rank == 0:
            save_file({k: v.contiguous() for k, v in results.items()}, Path(folder) / f"{name}_{world}.safetensors")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
    # All is written. Threads of gloo may abort a process that ends the long way (pytorch/pytorch#179291).
    os._exit(0)
