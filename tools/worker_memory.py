"""Memory of a loader's worker while it gives many samples: ``python tools/worker_memory.py 'shards/train-*.tar'``."""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path

from hjepa_data import ShardSource, StreamConfig, ViewGroup, WorkerConfig

BATCH = 250


def main() -> None:
    """Print the resident memory of the worker at each tenth of the samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", help="tar, glob, braces or directory")
    parser.add_argument("--samples", type=int, default=100_000, help="samples in all (default 100,000)")
    parser.add_argument("--size", type=int, default=32, help="side of a crop, pixels (default 32)")
    parser.add_argument("--start-method", default="auto", help="of the worker: auto, fork, spawn or forkserver")
    options = parser.parse_args()
    config = StreamConfig(
        global_batch_size=BATCH,
        views=(ViewGroup(count=2, size=(options.size, options.size)),),
        workers=WorkerConfig(count=1, start_method=options.start_method),
    )
    stream = config.build(ShardSource(options.shards), seed=0)
    steps = options.samples // BATCH
    for step in range(steps):
        next(stream)
        if (step + 1) % max(1, steps // 10) == 0:
            (worker,) = multiprocessing.active_children()
            print(f"{(step + 1) * BATCH:>9,} samples  {resident(worker.pid or 0):7.1f} MiB")
    stream.close()


def resident(process: int) -> float:
    """MiB that a process holds in memory."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


if __name__ == "__main__":
    main()
