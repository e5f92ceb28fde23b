"""Merge results files into one table: python -m hjepa_eval.results A.json B.json [--markdown]."""

import argparse
import io
import sys
from typing import NoReturn

from hjepa_eval.results.measurement import read_results
from hjepa_eval.results.table import MergedTable, merge


class _Parser(argparse.ArgumentParser):
    """One line for what is wrong, and no usage before it."""

    def error(self, message: str) -> NoReturn:
        """Raise the message."""
        raise ValueError(f"{message}; {self.prog} --help says more")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files and classes hold letters that not every terminal has.
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = _Parser(prog="python -m hjepa_eval.results", description="Merge results into one table.")
    parser.add_argument("files", nargs="+", help="results files that hjepa-eval wrote")
    parser.add_argument("--metrics", nargs="+", default=(), help="columns, in this order; all without it")
    parser.add_argument("--markdown", action="store_true", help="print Markdown instead of a terminal's table")
    try:
        given = parser.parse_args(arguments)
        _show(merge([read_results(path) for path in given.files], metrics=given.metrics), markdown=given.markdown)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _show(table: MergedTable, *, markdown: bool) -> None:
    from rich.console import Console

    console = Console()
    if markdown:
        console.out(table.markdown(), highlight=False)
        return
    wide, narrow = (
        console.measure(one.rich(), options=console.options.update(max_width=10**6)).maximum
        for one in (table, table.turned())
    )
    if narrow <= console.width < wide:
        table = table.turned()
    elif wide > console.width:
        # Of a table that is too wide either way, rich would leave a letter a cell, or none.
        console = Console(width=wide)
    console.print(table.rich())


if __name__ == "__main__":
    sys.exit(main())
