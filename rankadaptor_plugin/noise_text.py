"""Shows the noise floor on a terminal."""

from __future__ import annotations

from typing import Any

from rankadaptor_plugin import report_noise_tables as tables
from rankadaptor_plugin.table_text import table_text


def noise_text(noise: dict[str, Any], width: int) -> str:
    """Returns the conclusion, the tables and the forecast.

    Args:
        noise: What `rankadaptor_plugin.noise.Noise.to_json` returned.
        width: Characters in a line.
    """
    shown = [tables.scores(noise), tables.needed(noise)]
    parts = [table_text(table, width) for table in shown if table.rows]
    return "\n\n".join([noise["sentence"], *parts, tables.forecast(noise)])
