"""`hjepa-benchmark suite|compare|sweep|probes|quantize|throughput|loader ...`."""

import argparse
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from hjepa_benchmark.runs import Measured

OTHER_ERROR, USAGE_ERROR, DIVERGED, INTERRUPTED = 1, 2, 3, 130
SUITES = ("quick", "full")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a benchmark and returns the exit code.

    0 done, 2 wrong input, 3 a model that has diverged, 1 a file that cannot be written or read or a loader's process
    that is gone, 130 interrupted.

    Raises:
        SystemExit: 75, where a signal stopped a run that `sweep` trains, which is saved.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files and classes hold letters that not every terminal has.
        sys.stdout.reconfigure(errors="backslashreplace")
    if words and words[0].startswith("suite="):
        words = ["suite", *words[1:], "--suite", words[0].removeprefix("suite=")]
    try:
        options, others = _parser().parse_known_args(words)
        # argparse takes settings from one place only; options may stand between them.
        if others and (not hasattr(options, "settings") or any(word.startswith("-") for word in others)):
            raise ValueError(f"{others[0]}: unknown; hjepa-benchmark {words[0]} --help lists what there is")
        if others:
            options.settings += others
        _check_outputs({option: path for option in ("json", "out", "turn") if (path := getattr(options, option, None))})
        options.run(options)
    except (ValueError, OSError, RuntimeError) as error:
        code = _code(error)
        if code is None:
            raise
        print(f"hjepa-benchmark: {' '.join(str(error).split())}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        print("hjepa-benchmark: interrupted; what it had written stands", file=sys.stderr)
        return INTERRUPTED
    return 0


def _code(error: Exception) -> int | None:
    """Return the exit code of an error that is one line; None for one of the program, whose traceback is needed."""
    if isinstance(error, ValueError | OSError):
        return USAGE_ERROR if isinstance(error, ValueError) else OTHER_ERROR
    from hjepa_data import WorkerError
    from hjepa_train import UnstableError

    if isinstance(error, UnstableError):
        return DIVERGED
    return OTHER_ERROR if isinstance(error, WorkerError) else None


def _check_outputs(paths: Mapping[str, Path]) -> None:
    """Refuse places that cannot be written, or are one, before hours are spent on what should go there."""
    for option, path in paths.items():
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(
                f"--{option}={path}: no file can be written there; give the name of a file in a folder that is there "
                "and may be written"
            )
    if len({path.resolve() for path in paths.values()}) < len(paths):
        given = ", ".join(f"--{option}={path}" for option, path in paths.items())
        raise ValueError(f"{given}: one file, of which the last would be left; give each a file of its own")


class _Parser(argparse.ArgumentParser):
    """One line for what is wrong, and no usage before it."""

    def error(self, message: str) -> NoReturn:
        """Raise the message."""
        raise ValueError(f"{message}; {self.prog} --help says more")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hjepa-benchmark", description="Measure what a run learned and how fast it ran.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    suite = commands.add_parser(
        "suite", help="all measures of a run in one page: hjepa-benchmark suite=quick|full RUN_DIR"
    )
    suite.add_argument("run_dir", type=Path, help="folder of a finished hjepa-pretrain run")
    suite.add_argument("--suite", choices=SUITES, default="quick", help="how much (default quick)")
    _data(suite)
    suite.add_argument("--corruption-images", type=int, metavar="N", help="held-out images that are changed")
    suite.add_argument(
        "--folder", action="append", default=[], metavar="NAME=PATH",
        help="also classify a folder of other images, one folder a class (ImageNet-A, -R, -Sketch); needs --classes",
    )  # fmt: skip
    suite.add_argument(
        "--classes", type=Path, help="text file: class folders of the training set, one a line, in order"
    )
    suite.set_defaults(run=_suite)

    compare = commands.add_parser("compare", help="runs side by side; what is not measured yet is measured first")
    compare.add_argument(
        "run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="folders of finished runs, 2 and more"
    )
    compare.add_argument("--suite", choices=SUITES, default="quick", help="for runs without results (default quick)")
    compare.add_argument("--out", type=Path, help="also write a page, one HTML file that opens offline")
    compare.add_argument("--json", type=Path, help="also write the numbers to this file")
    compare.set_defaults(run=_compare)

    sweep = commands.add_parser("sweep", help="train every combination of settings, then compare them over seeds")
    sweep.add_argument("settings", nargs="+", metavar="key=a,b", help="as hjepa-pretrain --multirun takes them")
    sweep.add_argument("--suite", choices=SUITES, default="quick", help="how much is measured (default quick)")
    sweep.add_argument("--out", type=Path, help="also write a page, one HTML file that opens offline")
    sweep.add_argument("--json", type=Path, help="also write the numbers to this file")
    sweep.set_defaults(run=_sweep)

    probes = commands.add_parser("probes", help="kNN, linear probe and ranks of every level of a run; of a timm model")
    probes.add_argument(
        "source", help="folder of a finished hjepa-pretrain run; or name of a timm model, with --train and --eval"
    )
    _data(probes)
    probes.add_argument("--pretrained", action="store_true", help="of a timm model: its published weights (a download)")
    probes.add_argument("--json", type=Path, help="also write the rows to this file")
    probes.set_defaults(run=_probes)

    quantize = commands.add_parser("quantize", help="kNN of every level of a run with its weights in 8 bits, and bytes")
    quantize.add_argument("run_dir", type=Path, help="folder of a finished hjepa-pretrain run")
    _data(quantize)
    quantize.add_argument("--json", type=Path, help="also write the rows to this file")
    quantize.set_defaults(run=_quantize)

    throughput = commands.add_parser("throughput", help="training steps a second on synthetic images on the device")
    throughput.add_argument("--steps", type=int, default=30, help="timed steps (default 30)")
    throughput.add_argument("--reference", action="store_true", help="also a plain I-JEPA step, in turn with ours")
    throughput.add_argument(
        "--no-parts", dest="parts", action="store_false", help="the whole step alone: less to compile, a GPU's time"
    )
    throughput.add_argument("--json", type=Path, help="also write the numbers to this file")
    throughput.add_argument(
        "--turn", type=Path, help="a file: of the programs that name it, which compile side by side, one is timed"
    )
    throughput.add_argument("settings", nargs="*", metavar="key=value", help="any setting of hjepa-pretrain")
    throughput.set_defaults(run=_throughput)

    loader = commands.add_parser(
        "loader", help="the loader beside plain loops, ImageFolder, webdataset and litdata, same images and cores"
    )
    loader.add_argument("shards", help="tar, glob, braces or directory")
    loader.add_argument("--size", type=int, default=224, help="side of a crop, pixels (default 224)")
    loader.add_argument("--workers", type=int, default=1, help="processes, the same number for each (default 1)")
    loader.add_argument("--images", type=int, default=2_000, help="images a measurement (default 2000)")
    loader.add_argument("--repeats", type=int, default=5, help="measurements of each, in turn (default 5)")
    loader.add_argument("--json", type=Path, help="also write the numbers to this file")
    loader.set_defaults(run=_loader)
    return parser


def _data(command: argparse.ArgumentParser) -> None:
    command.add_argument("--train", help="shards that are learned from; default: those of the run")
    command.add_argument("--eval", help="held-out shards; default: those of the run")
    command.add_argument("--train-samples", type=int, help="at most so many of the first; default: as the run has it")
    command.add_argument("--eval-samples", type=int, help="at most so many of the second; default: as the run has it")


def _measured(options: argparse.Namespace) -> "Measured":
    from hjepa_benchmark.runs import Measured

    return Measured(
        train=options.train,
        held_out=options.eval,
        train_samples=options.train_samples,
        eval_samples=options.eval_samples,
    )


# Each command imports what it needs: torch takes seconds, and --help should not.


def _suite(options: argparse.Namespace) -> None:
    from hjepa_benchmark.suite.run import run_suite

    run_suite(
        options.run_dir,
        _measured(options),
        suite=options.suite,
        corruption_images=options.corruption_images,
        folders=options.folder,
        classes=options.classes,
    )


def _compare(options: argparse.Namespace) -> None:
    from hjepa_benchmark.comparison.run import compare_runs

    compare_runs(options.run_dirs, suite=options.suite, page=options.out, output=options.json)


def _sweep(options: argparse.Namespace) -> None:
    from hjepa_benchmark.comparison.sweep import sweep

    sweep(options.settings, suite=options.suite, page=options.out, output=options.json)


def _probes(options: argparse.Namespace) -> None:
    measured, output = _measured(options), options.json
    if Path(options.source).exists():
        from hjepa_benchmark.probes import probe_run

        if options.pretrained:
            raise ValueError(f"--pretrained: {options.source} is a folder, which has its own weights; leave it out")
        probe_run(Path(options.source), measured, output=output)
    else:
        from hjepa_benchmark.backbone import probe_backbone

        probe_backbone(options.source, measured, pretrained=options.pretrained, output=output)


def _quantize(options: argparse.Namespace) -> None:
    from hjepa_benchmark.quantize import quantize_run

    quantize_run(options.run_dir, _measured(options), output=options.json)


def _throughput(options: argparse.Namespace) -> None:
    from hjepa_benchmark.throughput.measure import print_throughput

    print_throughput(
        options.settings,
        steps=options.steps,
        reference=options.reference,
        output=options.json,
        parts=options.parts,
        turn=options.turn,
    )


def _loader(options: argparse.Namespace) -> None:
    from hjepa_benchmark.loader import print_loader

    print_loader(
        options.shards,
        size=options.size,
        workers=options.workers,
        images=options.images,
        repeats=options.repeats,
        output=options.json,
    )
