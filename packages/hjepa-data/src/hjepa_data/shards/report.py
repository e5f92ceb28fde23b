"""What ``hjepa-shards`` prints: tables, counts, and the command to type next."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hjepa_data.shards.check import ShardReport
from hjepa_data.shards.index import IndexState, ShardIndex
from hjepa_data.shards.make import MakeResult

__all__ = ["next_command", "plain", "report_check", "report_index", "report_make"]


def plain(text: object) -> Text:
    """Keep the console from reading brackets as markup, and words between colons as pictures."""
    return Text(str(text))


def report_index(done: Sequence[tuple[Path, ShardIndex, IndexState]], failed: int, out: Console) -> None:
    """Print what ``index`` did.

    Args:
        done: shard, index, and what became of it.
        failed: shards that have none now.
        out: where to.
    """
    states = Counter(state for _, _, state in done)
    columns = {
        "shards": len(done) + failed,
        "samples": sum(len(index) for _, index, _ in done),
        "labelled": sum(int((index.labels >= 0).sum()) for _, index, _ in done),
        "MB": sum(shard.stat().st_size for shard, _, _ in done) / 1e6,
        **{str(state): states[state] for state in IndexState},
        "failed": failed,
    }
    out.print(_row(columns))


def report_check(reports: Sequence[ShardReport], seconds: float, out: Console) -> None:
    """Print what ``check`` found.

    Args:
        reports: one a shard.
        seconds: that it took.
        out: where to.
    """
    images = sum(report.images for report in reports)
    columns = {
        "shards": len(reports),
        "members": sum(report.members for report in reports),
        "images": images,
        "labelled": sum(report.labelled for report in reports),
        "MB": sum(report.num_bytes for report in reports) / 1e6,
        "damaged members": sum(report.damaged_members for report in reports),
    }
    out.print(_row(columns))
    kinds = Counter(damage.kind.replace("_", " ") for report in reports for damage in report.damage)
    if kinds:
        table = Table()
        table.add_column("damage")
        table.add_column("count", justify="right")
        for kind, count in kinds.most_common():
            table.add_row(kind, f"{count:,}")
        out.print(table)
    without = sum(report.index != "damaged" and not report.checksums for report in reports)
    notes = {
        "without checksums, so only decoding tells damage: hjepa-shards index": without,
        "with an index of another time or size, which streams do not use: hjepa-shards index": sum(
            report.index == "stale" and not report.damage for report in reports
        ),
    }
    for what, count in notes.items():
        if count:
            out.print(f"{count:,} shard{'' if count == 1 else 's'} {what}", soft_wrap=True, highlight=False)
    pickles = sum(report.pickles for report in reports)
    if pickles:
        out.print(f"{pickles:,} member{'' if pickles == 1 else 's'} may be pickles; never opened", highlight=False)
    damaged = sum(bool(report.damage) for report in reports)
    found = f"[bold red]damage in {damaged:,} of {len(reports):,} shards[/]"
    verdict = found if damaged else "[bold green]nothing damaged[/]"
    out.print(f"{verdict}, {seconds:.1f} s ({images / max(seconds, 1e-9):,.0f} images a second)", highlight=False)


def _row(columns: dict[str, int | float]) -> Table:
    table = Table()
    for name in columns:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" for value in columns.values()))
    return table


def report_make(result: MakeResult, folder: Path, seconds: float, out: Console) -> None:
    """Print what ``make`` wrote, what it left out, and what to do next.

    Args:
        result: what was written.
        folder: where.
        seconds: that it took.
        out: where to.
    """
    out.print(plain(f"shards in {folder}"), soft_wrap=True, highlight=False)
    table = Table()
    for name in ("split", "shards", "images", "MB"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for split, shards in result.shards.items():
        megabytes = result.num_bytes[split] / 1e6
        table.add_row(plain(split), str(len(shards)), f"{result.images[split]:,}", f"{megabytes:,.1f}")
    out.print(table)
    if result.classes:
        shown = ", ".join(result.classes[:5]) + (", ..." if len(result.classes) > 5 else "")
        count = len(result.classes)
        line = f"{count} class{'es' if count > 1 else ''} ({shown}), listed in {folder / 'classes.json'}"
    else:
        line = "no labels: images do not lie in one folder a class"
    out.print(plain(line), soft_wrap=True, highlight=False)
    if result.left_out:
        total = result.left_out.total()
        out.print(f"{total:,} file{'' if total == 1 else 's'} left out", highlight=False)
        reasons = Table()
        reasons.add_column("why")
        reasons.add_column("files", justify="right")
        reasons.add_column("for example", overflow="fold")
        for reason, count in result.left_out.most_common():
            reasons.add_row(reason, f"{count:,}", plain(result.examples.get(reason, "")))
        out.print(reasons)
    else:
        out.print("nothing left out")
    total = result.images.total()
    out.print(f"{total:,} images in {seconds:.1f} s ({total / seconds:,.0f} a second)", highlight=False)
    out.print("next:", style="bold")
    out.print(plain(f"  {next_command(result)}"), soft_wrap=True, highlight=False)


def next_command(result: MakeResult) -> str:
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
