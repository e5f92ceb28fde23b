"""The command ``hjepa-shards``: make shards from images, index, check and show shards."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hjepa_data.errors import DataError, one_line
from hjepa_data.shards.check import CheckConfig, check_shards
from hjepa_data.shards.index import IndexState, ShardIndex, refresh_index
from hjepa_data.shards.make import Encoding, MakeConfig, MakePlan, make_shards, plan_folder, plan_sources
from hjepa_data.shards.patterns import expand_shards
from hjepa_data.shards.pool import map_in_order
from hjepa_data.shards.report import plain, report_check, report_index, report_make
from hjepa_data.shards.show import SheetConfig, draw_samples, read_classes, sheet_html, sheet_png
from hjepa_data.sources.open import is_adapter, open_adapter

__all__ = ["main"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_DAMAGE = 1
_WRONG_INPUT = 2
_INTERRUPTED = 130

_COMMANDS = """\
commands:
  make SRC OUT                images become shards, each with its index: a folder, or a data set (hf:, torchvision:)
  index SHARDS                write the index of shards that came without one: offsets, counts, checksums
  check SHARDS                read everything, decode every image, name what is damaged
  show SHARDS --out FILE      a contact sheet of samples with their labels, as PNG or HTML

'hjepa-shards FOLDER OUT' is short for 'hjepa-shards make FOLDER OUT'; a FOLDER with the name of a command is ./NAME.
'hjepa-shards make --help' and so on explain each.

examples:
  hjepa-shards make pets shards --val-fraction 0.1 --resize 256
  hjepa-shards check shards
  hjepa-shards show 'shards/train-*.tar' --out sheet.html

exit codes: 0 done, 1 damage found (index, check), 2 wrong input, 130 interrupted
"""

_MAKE = """\
layouts of SRC:
  photos/*.jpg                         flat, no labels
  pets/cat/*.jpg, pets/dog/*.jpg       one folder a class; OUT/classes.json lists them
  set/train/cat/*.jpg, set/test/...    the same for each of train, val, test: OUT/train-*.tar, OUT/test-*.tar
data sets as SRC:
  hf:NAME[:SPLIT]                      of Hugging Face datasets (pip install 'hjepa-data[datasets]'): a folder that
                                       save_to_disk wrote, a folder of parquet files, or a name on the Hub. All splits
                                       without SPLIT. No code that comes with it is run.
  torchvision:CLASS:ROOT[:SPLIT]       a class of torchvision.datasets that lies in ROOT already; nothing is downloaded

The same source and options give the same bytes, whatever the number of workers. Images are mixed, and train and val
are told apart, by the hash of their path (of their number in a data set): a file that is added moves no other file from
train to val.

examples:
  hjepa-shards make ~/photos shards
  hjepa-shards make pets shards --val-fraction 0.1 --resize 256 --workers 8
  hjepa-shards make pets shards --encode webp --quality 90
  hjepa-shards make hf:beans shards
  hjepa-shards make torchvision:CIFAR10:/data:test shards
"""

_SHARDS = """\
SHARDS is one or more of
  shards                               a directory: its *.tar
  'shards/train-{000000..000099}.tar'  braces; quoted, so that the shell leaves them alone
  'shards/*.tar'                       a glob
  all.txt                              a text file with one of these a line
Local files only. Nothing is run to read them: 'pipe:' and other commands are refused, and nothing is unpickled.
"""

_INDEX = (
    _SHARDS
    + """
Beside each shard lies SHARD.index.json then: key, offset, size, label and crc32 of each sample, their number, and the
sha256 of the shard. An index that fits is kept, so that a second run writes nothing. A shard that differs from the
checksum that it has is an error (exit code 1) unless --overwrite is given.

examples:
  hjepa-shards index shards
  hjepa-shards index 'shards/val-*.tar' --overwrite
"""
)

_CHECK = (
    _SHARDS
    + """
Each line of damage is 'shard: member: what'. What is damage: a tar that is cut off or overwritten, an image that is
empty, cut off, too large, a link or cannot be decoded, bytes that differ from the checksums of the index, samples that
the index lacks or misplaces. JPEG and WebP have no checksums of their own: only an index tells of flipped bytes.

examples:
  hjepa-shards check shards --workers 8
  hjepa-shards check shards > damage.txt || echo "do not train on this"
"""
)

_SHOW = (
    _SHARDS
    + """
Samples are drawn uniformly from all shards; the same seed draws the same. Class names come from classes.json beside
the first shard. The HTML is one file with the pictures inside, and runs no script.

examples:
  hjepa-shards show shards --out sheet.png
  hjepa-shards show 'shards/train-*.tar' --out sheet.html --count 200 --seed 1
"""
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line.

    Returns:
        Exit code: 0 done, 1 damage found, 2 wrong input, 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files and classes hold letters that not every terminal has.
        sys.stdout.reconfigure(errors="backslashreplace")
    out = Console()
    log = Console(stderr=True)
    try:
        if words and words[0] not in {*_RUN, "-h", "--help"}:
            _check_no_command(words[0])
            # FOLDER OUT
            words.insert(0, "make")
        options = _parser().parse_args(words)
        return _RUN[options.command](options, out, log)
    except (ValueError, OSError) as error:
        log.print("[bold red]hjepa-shards:[/]", plain(one_line(error)), soft_wrap=True, highlight=False)
        return _WRONG_INPUT
    except KeyboardInterrupt:
        done = "; the shards that were complete remain" if words[0] in {"make", "index"} else ""
        log.print(f"interrupted{done}", highlight=False)
        return _INTERRUPTED


def _check_no_command(word: str) -> None:
    """Refuse a first word that is nearly a command, and no folder."""
    close = [] if Path(word).exists() else difflib.get_close_matches(word, _RUN, 1, 0.7)
    if close:
        raise ValueError(f"no such folder or command '{word}'; did you mean '{close[0]}'?")


def _make(options: argparse.Namespace, out: Console, log: Console) -> int:
    config = MakeConfig(
        shard_bytes=options.shard_size,
        samples_per_shard=options.samples_per_shard,
        workers=options.workers,
        resize=options.resize,
        encoding=Encoding(options.encode),
        quality=options.quality,
        val_fraction=options.val_fraction,
        labels={"auto": None, "folders": True, "none": False}[options.labels],
        check=not options.no_check,
        overwrite=options.overwrite,
    )
    begin = time.monotonic()
    with log.status(plain(f"looking for images in {options.source}")):
        plan = _plan(options.source, config)
    bar = _progress(log)
    task = bar.add_task("images", total=plan.num_images)

    def progress(count: int) -> None:
        # The bar has a thread, so it starts after the workers are forked.
        bar.start()
        bar.advance(task, count)

    try:
        result = make_shards(plan, options.out, config, progress)
    finally:
        bar.stop()
    report_make(result, options.out, time.monotonic() - begin, out)
    return 0


def _plan(text: str, config: MakeConfig) -> MakePlan:
    if is_adapter(text):
        sources = open_adapter(text)
        return plan_sources(sources, next(iter(sources.values())).classes, config)
    return plan_folder(Path(text), config)


def _index(options: argparse.Namespace, out: Console, log: Console) -> int:
    _check_workers(options.workers)
    shards = expand_shards(options.shards)
    console, bar = _bar(out, log)
    task = bar.add_task("shards", total=len(shards))
    done: list[tuple[Path, ShardIndex, IndexState]] = []
    failed = 0
    try:
        index = partial(_index_one, overwrite=options.overwrite)
        for shard, result in map_in_order(index, shards, workers=options.workers, started=bar.start):
            if isinstance(result, str):
                failed += 1
                console.print(plain(one_line(result)), soft_wrap=True, highlight=False)
            else:
                done.append((shard, *result))
            bar.advance(task)
    finally:
        bar.stop()
    report_index(done, failed, out)
    return _DAMAGE if failed else 0


def _index_one(shard: Path, *, overwrite: bool) -> tuple[Path, str | tuple[ShardIndex, IndexState]]:
    try:
        return shard, refresh_index(shard, overwrite=overwrite)
    except DataError as error:
        return shard, str(error)


def _check(options: argparse.Namespace, out: Console, log: Console) -> int:
    config = CheckConfig(workers=options.workers, max_pixels=options.max_pixels)
    shards = expand_shards(options.shards)
    console, bar = _bar(out, log)
    task = bar.add_task("shards", total=len(shards))
    begin = time.monotonic()
    reports = []
    try:
        for report in check_shards(shards, config, started=bar.start):
            reports.append(report)
            for damage in report.damage:
                console.print(plain(damage), soft_wrap=True, highlight=False)
            bar.advance(task)
    finally:
        bar.stop()
    report_check(reports, time.monotonic() - begin, out)
    return _DAMAGE if any(report.damage for report in reports) else 0


def _show(options: argparse.Namespace, out: Console, log: Console) -> int:
    config = SheetConfig(count=options.count, seed=options.seed, tile=options.tile)
    writers = {".png": sheet_png, ".html": sheet_html, ".htm": sheet_html}
    write = writers.get(options.out.suffix.lower())
    if write is None:
        raise DataError(f"'{options.out}' is no file of a contact sheet; allowed: a name that ends in .png or .html")
    if not options.out.absolute().parent.is_dir():
        raise DataError(f"'{options.out}' cannot be written: there is no folder '{options.out.parent}'")
    shards = expand_shards(options.shards)
    classes = read_classes(shards, options.classes)
    with log.status("drawing samples"):
        samples, total = draw_samples(shards, classes, config)
        count = f"{len(shards):,} shard{'' if len(shards) == 1 else 's'}"
        names = " ".join(options.shards)
        title = f"{names}: {len(samples):,} of {total:,} samples in {count}, drawn by seed {config.seed}"
        options.out.write_bytes(write(samples, title, config))
    damaged = sum(sample.image is None for sample in samples)
    found = f", {damaged} damaged: hjepa-shards check" if damaged else ""
    line = f"{options.out}: {len(samples):,} of {total:,} samples in {count}, seed {config.seed}{found}"
    out.print(plain(line), soft_wrap=True, highlight=False)
    return 0


_RUN: dict[str, Callable[[argparse.Namespace, Console, Console], int]] = {
    "make": _make,
    "index": _index,
    "check": _check,
    "show": _show,
}


def _progress(console: Console, *, disable: bool = False) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Before rich 14.3 even a bar that is switched off ends with an empty line.
    return Progress(*columns, console=Console(quiet=True) if disable else console, disable=disable)


def _bar(out: Console, log: Console) -> tuple[Console, Progress]:
    """Give the console for lines of results, and a bar that does not break them."""
    # Two consoles on one terminal would write into each other; a bar that is piped away is noise.
    console = out if out.is_terminal else log
    return out, _progress(console, disable=not console.is_terminal)


def _check_workers(workers: int) -> None:
    CheckConfig(workers=workers)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)i?B?", text.strip(), re.IGNORECASE)
    if match is None or float(match.group(1)) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no size; allowed: such as 256M, 1G or 100000")
    return max(1, int(float(match.group(1)) * _UNITS[match.group(2).upper()]))


class _Parser(argparse.ArgumentParser):
    """One line for what is wrong, and no usage before it."""

    def error(self, message: str) -> NoReturn:
        """Raise the message."""
        raise ValueError(f"{message}; {self.prog} --help says more")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hjepa-shards",
        usage="hjepa-shards [-h] {make,index,check,show} ...",
        description="Make webdataset shards from images, index, check and show them.",
        epilog=_COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", help=argparse.SUPPRESS)

    def command(name: str, description: str, epilog: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            prog=f"hjepa-shards {name}",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    _add_make(command("make", "Make shards, with an index beside each, from a folder of images or a data set.", _MAKE))
    index = command("index", "Write the index of shards: where each sample lies, counts and checksums.", _INDEX)
    _add_shards(index)
    _add_workers(index)
    index.add_argument("--overwrite", action="store_true", help="index shards as they are now, whatever was there")
    check = command("check", "Read all of the shards and name what is damaged; exit code 1 if anything is.", _CHECK)
    _add_shards(check)
    _add_workers(check)
    limit = CheckConfig().max_pixels
    check.add_argument(
        "--max-pixels", type=int, default=limit, metavar="N", help=f"larger images are damage ({limit:,})"
    )
    show = command("show", "Make a contact sheet of samples with their labels, as one PNG or HTML file.", _SHOW)
    _add_shards(show)
    show.add_argument("--out", type=Path, required=True, metavar="FILE", help="ends in .png or .html")
    show.add_argument("--count", type=int, default=64, metavar="N", help="samples (64)")
    show.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw (0)")
    show.add_argument("--tile", type=int, default=144, metavar="PIXELS", help="longest side of a picture (144)")
    show.add_argument("--classes", type=Path, metavar="FILE", help="JSON list of class names (classes.json)")
    return parser


def _add_shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="directory, braces, glob, tar or list file")


def _add_workers(parser: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help=f"processes (all cores: {cores})")


def _add_make(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SRC", help="folder of images, hf:NAME[:SPLIT] or torchvision:CLASS:ROOT[:SPLIT]"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the shards; made if missing")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--shard-size", type=_size, default=256 << 20, metavar="BYTES", help="size of a shard (256M)")
    sizes.add_argument("--samples-per-shard", type=int, metavar="N", help="images of a shard, instead of its size")
    _add_workers(parser)
    parser.add_argument("--resize", type=int, metavar="PIXELS", help="shrink images whose shorter side is longer")
    parser.add_argument(
        "--encode",
        choices=[str(encoding) for encoding in Encoding],
        default="keep",
        help="format of every image (keep: its own bytes, unless it is resized)",
    )
    parser.add_argument("--quality", type=int, default=92, metavar="1..100", help="of re-encoded JPEG and WebP (92)")
    parser.add_argument(
        "--val-fraction", type=float, default=0.0, metavar="F", help="part of the images for val-*.tar, by hash (0)"
    )
    parser.add_argument(
        "--labels", choices=("auto", "folders", "none"), default="auto", help="whether folders name classes (auto)"
    )
    parser.add_argument("--no-check", action="store_true", help="do not decode the images to find damaged ones")
    parser.add_argument("--overwrite", action="store_true", help="replace shards of the same names in OUT")


if __name__ == "__main__":
    sys.exit(main())
