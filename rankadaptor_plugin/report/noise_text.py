"""Shows the noise floor on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.core.scores import metric_meanings
from rankadaptor_plugin.report import report_noise_tables as tables
from rankadaptor_plugin.report.console import printed, rich_table

if TYPE_CHECKING:
    from rich.table import Table as RichTable


def noise_text(noise: dict[str, Any], width: int) -> str:
    """Returns the conclusion, the tables and the forecast.

    Args:
        noise: What `rankadaptor_plugin.verdict.noise.Noise.to_json` returned.
        width: Characters in a line.
    """
    parts: list[RichTable | str] = [noise["sentence"], ""]
    for table in (tables.scores(noise), tables.needed(noise)):
        if table.rows:
            parts += [table.caption, rich_table(table), ""]
    parts += [metric_meanings(noise["scores"]), "", tables.forecast(noise)]
    return printed(parts, width)
