"""Shows what `rankadaptor_plugin.models.inspection` found, as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from rankadaptor_plugin.models.footprint import TOKENS
from rankadaptor_plugin.report.console import printed
from rankadaptor_plugin.report.numbers import size

if TYPE_CHECKING:
    from rankadaptor_plugin.models.inspection import Inspection

_STATISTICS = {
    "parameters": "parameters",
    "macs": f"MACs for {TOKENS} tokens",
    "kv_cache_bytes": "KV cache per token",
    "checkpoint_bytes": "checkpoint",
    "hidden_size": "hidden size",
    "layers": "layers",
}


def text(found: Inspection, width: int) -> str:
    """Returns the tables.

    Args:
        found: What was found.
        width: Characters in a line; a table that needs more gets more.
    """
    title = f"{found.folder}: {found.architecture}, {found.dtype}"
    parts: list[Table | str] = [title, "", _layers(found), "", _statistics(found)]
    if found.removed_layers:
        gone = ", ".join(map(str, found.removed_layers))
        parts += ["", f"Removed layers, by their number before: {gone}"]
    return printed(parts, width)


def _layers(found: Inspection) -> Table:
    moved, widths = bool(found.removed_layers), [layer.widths for layer in found.layers]
    total, (other_before, other) = found.after["parameters"], found.other
    columns = {
        "layer": "all",
        **({"before": ""} if moved else {}),
        "heads": _count(sum(w.heads for w in widths)),
        "KV heads": _count(sum(w.kv_heads for w in widths)),
        "channels": _count(sum(w.channels for w in widths)),
        "parameters": _count(total),
        "kept": _percent(total / found.before["parameters"]),
    }
    table = Table(box=None, padding=(0, 2, 0, 0), show_footer=True)
    for name, footer in columns.items():
        table.add_column(name, footer, justify="right", no_wrap=True)
    for layer in found.layers:
        table.add_row(
            str(layer.layer),
            *([str(layer.before)] if moved else []),
            _count(layer.widths.heads),
            _count(layer.widths.kv_heads),
            _count(layer.widths.channels),
            _count(layer.parameters),
            _percent(layer.kept),
        )
    blanks = [""] * (len(columns) - 3)
    table.add_row("other", *blanks, _count(other), _percent(other / other_before))
    return table


def _statistics(found: Inspection) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for name in ("before", "after", "kept"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, label in _STATISTICS.items():
        before, after = found.before[key], found.after[key]
        show = size if key.endswith("_bytes") else _count
        table.add_row(label, show(before), show(after), _percent(after / before))
    return table


def _count(number: int) -> str:
    return f"{number:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
