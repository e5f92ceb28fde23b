"""Tables that a narrow terminal does not cut."""

from rich.console import Console
from rich.table import Table


def uncut(table: Table) -> Table:
    """Give a table the width that its cells need: lines that wrap can be read, numbers that are cut cannot.

    Args:
        table: with all its rows; to be printed by a console with `soft_wrap`.
    """
    table.width = Console(width=10_000).measure(table).maximum
    return table
