"""Report of a run, for people.

`schema` defines report.json, from which `tables` and `words` make the same tables and
sentences for all readers: `report` renders them as Markdown and, with the pictures of `svg`, as one
self-contained HTML page; `console` prints the noise floor, comparisons and the layers of a model
on a terminal. `progress` shows a run while it works.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankadaptor_plugin.core.lazy import lazy_exports

if TYPE_CHECKING:
    from rankadaptor_plugin.report.progress import Progress
    from rankadaptor_plugin.report.report import markdown, page, write_report
    from rankadaptor_plugin.report.schema import ReportData

__all__ = ["Progress", "ReportData", "markdown", "page", "write_report"]

__getattr__ = lazy_exports(
    __name__,
    {
        "Progress": "progress",
        "ReportData": "schema",
        "markdown": "report",
        "page": "report",
        "write_report": "report",
    },
)
