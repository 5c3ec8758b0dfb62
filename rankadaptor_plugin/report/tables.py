"""The tables of a report as plain text, the same for Markdown and HTML.

A table is built once from report.json and rendered twice, so the two cannot differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.core.scores import unit_of_difference
from rankadaptor_plugin.report.numbers import (
    MODELS,
    UNKNOWN,
    duration,
    interval,
    metric_label,
    number,
    scored,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rankadaptor_plugin.report.schema import ReportData


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        caption: What it shows, with the unit.
        header: Column names.
        rows: Cells.
        left: Columns that hold words and not numbers.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: tuple[int, ...] = (0,)


def total_time(data: ReportData) -> str:
    """Writes the time of the whole run."""
    return duration(sum(seconds for _, seconds, _ in shares(data)))


def models(data: ReportData) -> dict[str, str]:
    """Returns the label of each model in the order of the tables, the recovered one last."""
    methods = {method: method for method in data.get("methods", [])}
    recovered = {"recovered": MODELS["recovered"]}
    plain = {n: label for n, label in MODELS.items() if n not in recovered}
    return plain | methods | data.get("labels", {}) | recovered


def delivered(data: ReportData) -> str:
    """Names what was delivered."""
    name = data["verdict"]["delivered"]
    return name if name in data.get("methods", []) else f"{name} allocation"


def scores(data: ReportData, metric: str) -> Table | None:
    """Tabulates a metric by task and model; None where no model has it."""
    named, best = models(data), data["verdict"]["delivered"]
    shown = [m for m in named if any(metric in row for row in data["scores"].get(m, {}).values())]
    if best != "uniform" and "recovered" in shown:
        # The recovered model is the searched one then, or a method's; one column is enough.
        shown = [model for model in shown if model != best]
    if not shown:
        return None
    rows = []
    for task in (*data["tasks"], "mean"):
        cells = [data["scores"][model].get(task, {}).get(metric) for model in shown]
        rows.append(
            (task, *(interval(c["mean"], c["half_width"], metric) if c else UNKNOWN for c in cells))
        )
    names = [named[m] for m in shown]
    if names[-1] == "recovered":
        names[-1] = f"recovered ({best})"
    confidence = f"{100 * data['confirm']['confidence']:g} %"
    return Table(
        f"{metric_label(metric)} on the report documents, "
        f"+- half width of the {confidence} interval",
        ("task", *names),
        tuple(rows),
    )


def allocations(data: ReportData) -> dict[str, list[int]]:
    """Returns the ranks to show by layer: of uniform LoRA, and of what it is compared with.

    That is the searched allocation, or the delivered method where it gives the ranks by layer; of
    a foreign stage only what it delivers.
    """
    found = data["allocations"]
    if not {"uniform", "searched"} & {*found}:
        return {"recovered": found.get("recovered", [])}
    uniform, best = found.get("uniform", []), data["verdict"]["delivered"]
    if best in data.get("methods", []) and found.get("recovered") != uniform:
        return {"uniform": uniform, best: found["recovered"]}
    if "searched" not in found and data.get("methods"):
        return {"uniform": uniform}
    return {"uniform": uniform, "searched": found.get("searched", [])}


def compared(data: ReportData) -> str:
    """Names what the decisive comparison is about: ``searched``, or a recovery method."""
    chosen = (entry["label"] for entry in data["confirm"]["competitors"] if entry["chosen"])
    return next((label for label in chosen if label in data.get("methods", [])), "searched")


def comparisons(data: ReportData) -> Table:
    """Tabulates the paired differences by metric."""
    target = data["verdict"].get("target")
    place = f", task {target} alone" if target else ""
    rows = []
    for metric, found in data["verdict"]["comparisons"].items():
        unit = unit_of_difference(metric)
        ends = f"{scored(found['low'], metric)} to {scored(found['high'], metric)}"
        rows.append(
            (
                metric,
                unit,
                interval(found["estimate"], found["half_width"], metric),
                ends,
                f"{100 * found['confidence']:g} %",
                str(found["seeds"]["first"]),
                str(found["documents"]),
            )
        )
    return Table(
        f"{compared(data)} minus {data['verdict']['baseline']}, paired by seed and document{place}",
        ("metric", "unit", "difference", "interval", "confidence", "seeds", "documents"),
        tuple(rows),
        (0, 1),
    )


def shares(data: ReportData) -> list[tuple[str, float, float]]:
    """Returns (name, seconds, share in [0, 1]) of what the time was spent on."""
    cost = data["cost"]
    parts = (
        ("fine-tuning", cost["fine_tuning"]),
        ("evaluation", cost["evaluation"]),
        ("everything else", cost["other"]),
    )
    total = sum(seconds for _, seconds in parts)
    return [(name, seconds, seconds / total if total > 0 else 0.0) for name, seconds in parts]


def costs(data: ReportData) -> list[Table]:
    """Tabulates time by stage, the longest first, and what the time was spent on."""
    cost = data["cost"]
    stages = sorted(cost["stages"].items(), key=lambda item: (-item[1], item[0]))
    memory = cost["peak_memory_bytes"]
    rows = [(n, duration(s), number(100 * share, 1) + " %") for n, s, share in shares(data)]
    rows.append(("mean of a complete trial", duration(cost["per_trial"]), ""))
    rows.append(("peak memory", UNKNOWN if memory is None else f"{memory / 2**30:.2f} GiB", ""))
    return [
        Table(
            "time by stage",
            ("stage", "time", "seconds"),
            tuple((name, duration(s), number(s, 1)) for name, s in stages),
        ),
        Table("what it was spent on", ("part", "amount", "share"), tuple(rows)),
    ]


def documents(data: ReportData) -> Table:
    """Tabulates numbers of documents, and the weight of each task in the mean."""
    found, weights = data["documents"], data.get("weights") or dict.fromkeys(data["tasks"], 1.0)
    rows = (
        (
            task,
            str(found["search"].get(task, UNKNOWN)),
            str(found["report"].get(task, UNKNOWN)),
            f"{weights.get(task, 0.0):g}",
        )
        for task in dict.fromkeys((*data["tasks"], *found["search"]))
    )
    return Table(
        "documents by task", ("task", "search", "report", "weight in the mean"), tuple(rows)
    )


def pairs(caption: str, values: Mapping[str, Any]) -> Table:
    """Tabulates names and values, such as versions and seeds."""
    rows = tuple(
        (name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for name, value in sorted(values.items())
    )
    return Table(caption, ("name", "value"), rows, (0, 1))
