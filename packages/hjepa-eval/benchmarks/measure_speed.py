"""Time exact kNN and extraction.

    python packages/hjepa-eval/benchmarks/measure_speed.py knn --bank 1281167 --queries 50000 --width 768 --device cuda
    python packages/hjepa-eval/benchmarks/measure_speed.py extraction --model vit_tiny_patch16_224 --device cpu

`knn` classifies random features with the structure of real ones (1000 classes, a decaying spectrum) with k of 10, 20,
100 and 200 in one pass. `extraction` compares a pass of `extract` over four blocks with the encoder alone on the same
batches, on a CPU by the processor time of both.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable

import torch

from hjepa_eval import BlockFeatures, extract, knn_predict, open_encoder


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Time of a call: of the processor on a CPU, else by the clock, with everything that it started on the device."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def features(count: int, width: int, device: torch.device, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes in features whose spectrum decays."""
    scale = torch.arange(1, width + 1, device=device) ** -0.5
    means = torch.randn(1000, width, device=device, generator=torch.Generator(device).manual_seed(99))
    generator = torch.Generator(device).manual_seed(seed)
    labels = torch.randint(0, 1000, (count,), device=device, generator=generator)
    noise = torch.randn(count, width, device=device, generator=generator)
    return (means[labels] + 1.5 * noise) * scale, labels


def knn(given: argparse.Namespace) -> None:
    """Time knn_predict."""
    device = torch.device(given.device)
    bank, labels = features(given.bank, given.width, device, 0)
    queries, truth = features(given.queries, given.width, device, 1)
    knn_predict(bank[:5000], labels[:5000], queries[:100], ks=(20,))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    found: dict[int, torch.Tensor] = {}
    took = seconds(lambda: found.update(knn_predict(bank, labels, queries, ks=(10, 20, 100, 200))), device)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() - held
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    accuracy = ", ".join(f"k={k} {float((p == truth).double().mean()):.4f}" for k, p in found.items())
    print(f"{given.bank} x {given.width} against {given.queries} on {device}: {took:.2f} s; {accuracy}")
    kind = "beside the features, at its peak" if device.type == "cuda" else "of the process, at its peak"
    print(f"memory {kind}: {memory / 2**30:.2f} GiB")


def extraction(given: argparse.Namespace) -> None:
    """Time extract against the encoder alone, in turns."""
    device = torch.device(given.device)
    encoder = open_encoder(given.model).to(device).eval()
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(given.batch, 3, given.size, given.size, generator=generator) for _ in range(given.batches)]
    batches = [(batch, torch.zeros(len(batch), dtype=torch.int64)) for batch in images]
    wanted = BlockFeatures(encoder, blocks=(-4, -3, -2, -1, "output"), poolings=("mean", "concat"))

    def alone() -> None:
        with torch.inference_mode():
            for batch in images:
                encoder(batch.to(device))

    alone()
    extract(wanted, batches[:1])
    pairs = [(seconds(alone, device), seconds(lambda: extract(wanted, batches), device)) for _ in range(given.rounds)]
    encoder_time, extract_time = (min(times) for times in zip(*pairs, strict=True))
    count = given.batch * given.batches
    print(f"{given.model}, {count} images of {given.size} on {device}, best of {given.rounds} rounds in turns")
    print(f"encoder alone {count / encoder_time:.1f} images/s, extract {count / extract_time:.1f} images/s: "
          f"{encoder_time / extract_time:.1%} of its speed")  # fmt: skip


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("knn", help="exact kNN")
    part.add_argument("--bank", type=int, default=1_281_167)
    part.add_argument("--queries", type=int, default=50_000)
    part.add_argument("--width", type=int, default=768)
    part.set_defaults(run=knn)
    other = parts.add_parser("extraction", help="extract beside the encoder alone")
    other.add_argument("--model", default="vit_tiny_patch16_224", help="a timm name")
    other.add_argument("--size", type=int, default=224)
    other.add_argument("--batch", type=int, default=32)
    other.add_argument("--batches", type=int, default=4)
    other.add_argument("--rounds", type=int, default=5)
    other.set_defaults(run=extraction)
    for each in (part, other):
        each.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    given.run(given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
