"""Tables of a report on a terminal."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable

if TYPE_CHECKING:
    from rankadaptor_plugin.report_tables import Table

_ENDLESS = 10_000  # characters, more than any table has


def table_text(table: Table, width: int) -> str:
    """Returns a table with its caption above it.

    Args:
        table: The table.
        width: Characters in a line. A table that needs more gets more: a line that wraps is better
            than a number that is cut.
    """
    drawn = RichTable(box=None, padding=(0, 2, 0, 0))
    for number, name in enumerate(table.header):
        drawn.add_column(name, justify="left" if number in table.left else "right", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*row)
    endless = Console(file=StringIO(), width=_ENDLESS)
    needed = Measurement.get(endless, endless.options, drawn).maximum
    console = Console(file=StringIO(), width=max(width, needed), highlight=False)
    with console.capture() as lines:
        console.print(table.caption, markup=False)
        console.print(drawn, markup=False)
    return "\n".join(line.rstrip() for line in lines.get().splitlines())
