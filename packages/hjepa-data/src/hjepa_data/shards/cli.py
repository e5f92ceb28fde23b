"""The command ``hjepa-shards``: a folder of images becomes webdataset shards."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hjepa_data.errors import one_line
from hjepa_data.shards.folder import FolderConfig, FolderResult, make_shards, plan_folder

__all__ = ["main"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_WRONG_INPUT = 2
_INTERRUPTED = 130

_EXAMPLES = """\
layouts of FOLDER:
  photos/*.jpg                         flat, no labels
  pets/cat/*.jpg, pets/dog/*.jpg       one folder a class; OUT/classes.json lists them
  set/train/cat/*.jpg, set/test/...    the same for each of train, val, test: OUT/train-*.tar, OUT/test-*.tar

examples:
  hjepa-shards ~/photos shards
  hjepa-shards pets shards --val-fraction 0.1 --resize 256 --workers 8
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line.

    Returns:
        Exit code: 0 done, 2 wrong input, 130 interrupted.
    """
    options = _parser().parse_args(arguments)
    out = Console()
    log = Console(stderr=True)
    try:
        _run(options, out, log)
    except (ValueError, OSError) as error:
        log.print(f"[bold red]error:[/] {_escape(one_line(error))}", soft_wrap=True, highlight=False)
        return _WRONG_INPUT
    except KeyboardInterrupt:
        log.print("interrupted; the shards that were complete remain", highlight=False)
        return _INTERRUPTED
    return 0


def _run(options: argparse.Namespace, out: Console, log: Console) -> None:
    config = FolderConfig(
        shard_bytes=options.shard_size,
        samples_per_shard=options.samples_per_shard,
        workers=options.workers,
        resize=options.resize,
        val_fraction=options.val_fraction,
        labels={"auto": None, "folders": True, "none": False}[options.labels],
        check=not options.no_check,
        overwrite=options.overwrite,
    )
    begin = time.monotonic()
    with log.status(f"looking for images in {_escape(str(options.folder))}"):
        plan = plan_folder(options.folder, config)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=log)
    task = bar.add_task("images", total=plan.num_images)

    def progress(count: int) -> None:
        # The bar has a thread, so it starts after the workers are forked.
        bar.start()
        bar.advance(task, count)

    try:
        result = make_shards(plan, options.out, config, progress)
    finally:
        bar.stop()
    _report(result, options.out, time.monotonic() - begin, out)


def _report(result: FolderResult, folder: Path, seconds: float, out: Console) -> None:
    out.print(f"shards in {_escape(str(folder))}", soft_wrap=True, highlight=False)
    table = Table()
    for name in ("split", "shards", "images", "MB"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for split, shards in result.shards.items():
        megabytes = result.num_bytes[split] / 1e6
        table.add_row(split, str(len(shards)), f"{result.images[split]:,}", f"{megabytes:,.1f}")
    out.print(table)
    if result.classes:
        shown = ", ".join(result.classes[:5]) + (", ..." if len(result.classes) > 5 else "")
        count = len(result.classes)
        line = f"{count} class{'es' if count > 1 else ''} ({shown}), listed in {folder / 'classes.json'}"
    else:
        line = "no labels: images do not lie in one folder a class"
    out.print(_escape(line), soft_wrap=True, highlight=False)
    if result.left_out:
        total = result.left_out.total()
        out.print(f"{total:,} file{'' if total == 1 else 's'} left out", highlight=False)
        reasons = Table()
        reasons.add_column("why")
        reasons.add_column("files", justify="right")
        reasons.add_column("for example", overflow="fold")
        for reason, count in result.left_out.most_common():
            reasons.add_row(reason, f"{count:,}", _escape(result.examples.get(reason, "")))
        out.print(reasons)
    else:
        out.print("nothing left out")
    total = result.images.total()
    out.print(f"{total:,} images in {seconds:.1f} s ({total / seconds:,.0f} a second)", highlight=False)
    out.print("next:", style="bold")
    out.print(f"  {_escape(next_command(result))}", soft_wrap=True, highlight=False)


def next_command(result: FolderResult) -> str:
    """Say what to type next.

    Args:
        result: what was written.

    Returns:
        The command that trains on the shards.
    """
    splits = list(result.shards)
    words = ["hjepa-pretrain"]
    for field, split in zip(("data.train", "data.eval"), splits, strict=False):
        shards = [os.path.abspath(path) for path in result.shards[split]]
        # Quoted whatever is in it, since a shell would expand the braces.
        words.append(f"{field}={_quoted(_pattern(shards))}")
    return " ".join(words)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\"'\"'") + "'"


def _pattern(shards: list[str]) -> str:
    numbers = [int(shard[-10:-4]) for shard in shards]
    if len(shards) == 1:
        return shards[0]
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{shards[0][:-10]}{{{numbers[0]:06d}..{numbers[-1]:06d}}}.tar"
    return f"{shards[0][:-10]}*.tar"


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)i?B?", text.strip(), re.IGNORECASE)
    if match is None or float(match.group(1)) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no size; allowed: such as 256M, 1G or 100000")
    return max(1, int(float(match.group(1)) * _UNITS[match.group(2).upper()]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hjepa-shards",
        description="Make webdataset shards, with an index beside each, from a folder of images.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="images: flat, or one folder a class")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the shards; made if missing")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--shard-size", type=_size, default=256 << 20, metavar="BYTES", help="size of a shard (256M)")
    sizes.add_argument("--samples-per-shard", type=int, metavar="N", help="images of a shard, instead of its size")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help=f"processes (all cores: {cores})")
    parser.add_argument("--resize", type=int, metavar="PIXELS", help="shrink images whose shorter side is longer")
    parser.add_argument(
        "--val-fraction", type=float, default=0.0, metavar="F", help="part of the images for val-*.tar, by hash (0)"
    )
    parser.add_argument(
        "--labels", choices=("auto", "folders", "none"), default="auto", help="whether folders name classes (auto)"
    )
    parser.add_argument("--no-check", action="store_true", help="do not decode the images to find damaged ones")
    parser.add_argument("--overwrite", action="store_true", help="replace shards of the same names in OUT")
    return parser


if __name__ == "__main__":
    sys.exit(main())
