"""Text and tables on a terminal."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rankadaptor_plugin.report.tables import Table

_ENDLESS = 10_000  # characters, more than any table has


def printed(parts: Sequence[RichTable | str], width: int) -> str:
    """Returns lines and tables, one below the other.

    Args:
        parts: Lines, which the terminal wraps, and tables.
        width: Characters in a line. A table that needs more gets more: a line that wraps is better
            than a number that is cut.
    """
    tables = [part for part in parts if isinstance(part, RichTable)]
    endless = Console(file=StringIO(), width=_ENDLESS)
    needed = [Measurement.get(endless, endless.options, table).maximum for table in tables]
    # A folder's name may hold brackets or colons, which are markup and emoji to rich.
    console = Console(
        file=StringIO(), width=max([width, *needed]), highlight=False, markup=False, emoji=False
    )
    with console.capture() as lines:
        for part in parts:
            console.print(part, soft_wrap=True)
    return "\n".join(line.rstrip() for line in lines.get().splitlines())


def rich_table(table: Table) -> RichTable:
    """Returns a table of the report, without its caption."""
    drawn = RichTable(box=None, padding=(0, 2, 0, 0))
    for number, name in enumerate(table.header):
        drawn.add_column(name, justify="left" if number in table.left else "right", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*row)
    return drawn
