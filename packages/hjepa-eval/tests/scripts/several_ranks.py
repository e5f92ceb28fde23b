"""One of several processes that extract, classify and segment their own part; rank 0 writes what all of them found."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed as dist
from torch import nn

from hjepa_eval import (
    CacheKey,
    Classifier,
    FeatureCache,
    FeatureName,
    HeadTraining,
    SegmentationProbe,
    classify,
    extract,
)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        with torch.no_grad():
            self.layer.weight.copy_(torch.arange(12.0).view(4, 3) / 10)
            self.layer.bias.zero_()

    def forward(self, x):
        return self.layer(x)


def samples(count):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, generator=generator), torch.arange(count) % 3


def part(rank, world, *, count=11, numbered, pad=False):
    """The samples rank, rank + world, ... in ragged batches; padded to equal lengths as samplers do, if asked for."""
    images, labels = samples(count)
    mine = torch.arange(count)[rank::world]
    numbers = mine.clone()
    if pad:
        longest = -(-count // world)
        extra = longest - len(mine)
        mine, numbers = torch.cat((mine, mine[:extra])), torch.cat((numbers, mine[:extra]))
        mine, numbers = torch.cat((mine, mine[:1])), torch.cat((numbers, torch.tensor([-1])))
    for start in range(0, len(mine), 4):
        chosen, number = mine[start : start + 4], numbers[start : start + 4]
        yield (images[chosen], labels[chosen], number) if numbered else (images[chosen], labels[chosen])


def both(encoder):
    def features(images):
        out = encoder(images)
        return {FeatureName(level="a", pooling="mean"): out, FeatureName(level="b", pooling="mean"): out[:, :2] * 2}

    features.module = encoder
    return features


def main(rank, world, store, folder):
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    encoder = Encoder()
    found = {}
    for name, numbered, pad in (("numbered", True, False), ("padded", True, True), ("plain", False, False)):
        sets = extract(both(encoder), part(rank, world, numbered=numbered, pad=pad), gather=True)
        found |= {f"{name}/{key}": one.values for key, one in sets.items()}
        found[f"{name}/labels"] = sets["a/mean"].labels
    # One sample for several ranks: some have none at all.
    lonely = extract(both(encoder), part(rank, world, count=1, numbered=True), gather=True)
    assert lonely["b/mean"].name == FeatureName(level="b", pooling="mean")
    found["lonely"] = lonely["b/mean"].values
    cache = FeatureCache(Path(folder) / "cache")
    key = CacheKey(weights=f"w{world}", data="d", transform="t", features="f")
    calls = []
    for _ in range(2):
        cached = cache.get(
            key, lambda: calls.append(0) or extract(both(encoder), part(rank, world, numbered=True), gather=True)
        )
        if world > 1:
            dist.barrier()
    assert len(calls) == 1, calls
    found["cached"] = cached["a/mean"].values
    classifier = Classifier(encoder, 4, 3)
    right, labels = classify(classifier, part(rank, world, numbered=True, pad=True))
    found |= {"right": right, "right/labels": labels}
    tokens = torch.randn(12, 4, 5, generator=torch.Generator().manual_seed(1))
    masks = (tokens[:, :, 0] > 0).long().view(12, 2, 2)
    probe = SegmentationProbe()
    # Fitted on the same images everywhere, without a group's metrics in between; measured on each rank's own.
    fitted = torch.nn.Linear(5, 2)
    with torch.no_grad():
        fitted.weight.copy_(torch.tensor([[0.0] * 5, [1.0, 1.0, 0, 0, 0]]))
        fitted.bias.zero_()
    probe._head, probe._classes, probe._grid = fitted, 2, (2, 2)
    probe._mean, probe._scale = torch.zeros(5), torch.ones(5)
    found["iou"] = torch.tensor([probe.mean_iou(tokens[rank::world], masks[rank::world])])
    # A class that one rank alone has.
    masks[0, 0, 0] = 3
    found["iou of four"] = torch.tensor([probe.mean_iou(tokens[rank::world], masks[rank::world])])
    # All images lie on one rank, none on the others.
    mine = slice(None) if rank == 0 else slice(0, 0)
    found["iou of one rank"] = torch.tensor([probe.mean_iou(tokens[mine], masks[mine])])
    if rank == 0:
        # A fit is of its own process: no other takes part.
        quick = HeadTraining(learning_rates=(1e-2,), weight_decays=(0.0,), epochs=1, optimizer="adamw")
        fit = SegmentationProbe(quick).fit(tokens, masks, (2, 2))
        found["fitted alone"] = torch.tensor([one.held_out for one in fit.candidates])
    if rank == 0:
        save_file({key: value.contiguous() for key, value in found.items()}, Path(folder) / f"{world}.safetensors")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
    # All is written. Threads of gloo may abort a process that ends the long way (pytorch/pytorch#179291).
    os._exit(0)
