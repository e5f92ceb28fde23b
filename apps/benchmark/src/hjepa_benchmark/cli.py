"""`hjepa-benchmark probes|quantize|throughput|loader ...`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a benchmark and returns the exit code: 0 done, 2 wrong input."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        print(f"hjepa-benchmark: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hjepa-benchmark", description="Measure what a run learned and how fast it ran."
    )
    commands = parser.add_subparsers(required=True, metavar="probes|quantize|throughput|loader")

    probes = commands.add_parser("probes", help="kNN, linear probe and ranks of every level of a run")
    probes.add_argument("run_dir", type=Path, help="folder of a finished hjepa-pretrain run")
    probes.add_argument("--train", help="shards for the kNN bank and the probe; default: those of the run")
    probes.add_argument("--eval", help="held-out shards; default: those of the run")
    probes.add_argument("--json", type=Path, help="also write the rows to this file")
    probes.set_defaults(run=_probes)

    quantize = commands.add_parser("quantize", help="kNN of every level of a run with its weights in 8 bits, and bytes")
    quantize.add_argument("run_dir", type=Path, help="folder of a finished hjepa-pretrain run")
    quantize.add_argument("--train", help="shards for the kNN bank; default: those of the run")
    quantize.add_argument("--eval", help="held-out shards; default: those of the run")
    quantize.add_argument("--json", type=Path, help="also write the rows to this file")
    quantize.set_defaults(run=_quantize)

    throughput = commands.add_parser("throughput", help="training steps a second on synthetic images on the device")
    throughput.add_argument("--steps", type=int, default=30, help="timed steps (default 30)")
    throughput.add_argument("settings", nargs="*", metavar="key=value", help="any setting of hjepa-pretrain")
    throughput.set_defaults(run=_throughput)

    loader = commands.add_parser(
        "loader", help="the loader beside a plain loop of decode and crop, same images and cores"
    )
    loader.add_argument("shards", help="tar, glob, braces or directory")
    loader.add_argument("--size", type=int, default=224, help="side of a crop, pixels (default 224)")
    loader.add_argument("--workers", type=int, default=1, help="processes, the same number for both (default 1)")
    loader.add_argument("--images", type=int, default=2_000, help="images a measurement (default 2000)")
    loader.add_argument("--repeats", type=int, default=5, help="measurements of each, in turn (default 5)")
    loader.set_defaults(run=_loader)
    return parser


# Each command imports what it needs: torch takes seconds, and --help should not.


def _probes(options: argparse.Namespace) -> None:
    from hjepa_benchmark.probes import probe_run

    probe_run(options.run_dir, train=options.train, held_out=options.eval, output=options.json)


def _quantize(options: argparse.Namespace) -> None:
    from hjepa_benchmark.quantize import quantize_run

    quantize_run(options.run_dir, train=options.train, held_out=options.eval, output=options.json)


def _throughput(options: argparse.Namespace) -> None:
    from hjepa_benchmark.throughput import print_throughput

    print_throughput(options.settings, steps=options.steps)


def _loader(options: argparse.Namespace) -> None:
    from hjepa_benchmark.loader import print_loader

    print_loader(
        options.shards, size=options.size, workers=options.workers, images=options.images, repeats=options.repeats
    )


if __name__ == "__main__":
    sys.exit(main())
