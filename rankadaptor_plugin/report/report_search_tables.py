"""The tables of a report about the search and the race of its finalists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.core.scores import unit_of_difference
from rankadaptor_plugin.report.numbers import UNKNOWN, interval, number, scored
from rankadaptor_plugin.report.tables import Table
from rankadaptor_plugin.report.words import objective_label

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rankadaptor_plugin.report.schema import ReportData


def trials(data: ReportData) -> Table:
    """Tabulates the trials in the order of the search."""
    metric = data["objective"]["metric"]
    rows = []
    held_out = any(trial.get("validation_loss") is not None for trial in data["trials"])
    for trial in data["trials"]:
        measured, predicted = trial.get("objective"), trial.get("predicted")
        off = None if measured is None or predicted is None else measured - predicted
        seconds = trial.get("seconds")
        state = trial["state"] + (f": {trial['reason']}" if trial.get("reason") else "")
        rows.append(
            (
                str(trial["position"] + 1),
                trial["phase"],
                scored(measured, metric),
                scored(predicted, metric),
                scored(off, metric),
                number(trial.get("train_loss")),
                *([number(trial.get("validation_loss"))] if held_out else []),
                number(sum(seconds.values()) if seconds else None, 1),
                state,
                ranks_text(trial),
            )
        )
    return Table(
        f"objective: {objective_label(data)}, on the search documents; error: measured minus "
        f"predicted; training loss{' and loss on held-out rows' if held_out else ''} in nats per "
        "token",
        (
            "trial",
            "phase",
            "measured",
            "predicted",
            "error",
            "training loss",
            *(["held-out loss"] if held_out else []),
            "seconds",
            "state",
            "ranks, layer 0 first",
        ),
        tuple(rows),
        (1, 8, 9) if held_out else (1, 7, 8),
    )


def front(data: ReportData) -> Table | None:
    """Tabulates the front of score against parameters, smallest first; None without one."""
    if not data["front"]:
        return None
    metric = data["objective"]["metric"]
    rows = tuple(
        (
            str(trial["parameters"]),
            scored(trial["objective"], metric),
            str(trial["position"] + 1),
            ranks_text(trial),
        )
        for trial in data["front"]
    )
    return Table(
        "front of score against trainable parameters: no trial has a higher score with as few; "
        f"{objective_label(data)}, on the search documents, one fine-tune each",
        ("parameters", "measured", "trial", "ranks, layer 0 first"),
        rows,
        (3,),
    )


def knowledge(data: ReportData) -> Table | None:
    """Tabulates what was known beforehand and what it was worth; None without any."""
    if not data["knowledge"]:
        return None
    rows = tuple(
        (
            entry["name"],
            number(entry["correlation"], 2),
            number(entry["weight"], 2),
            number(entry["gain"], 3),
        )
        for entry in data["knowledge"]
    )
    return Table(
        "known before the search: rank correlation of what it alone expects with what was "
        "measured; weight that the measurements give it, from 0 to 1; what it adds to the log "
        "evidence, in nats per trial (0 or less: it did not help)",
        ("source", "correlation", "weight", "evidence"),
        rows,
    )


def race_line(data: ReportData) -> str:
    """Says how the race was run."""
    found = data["confirm"]
    if not found["competitors"]:
        seeds = len(found["seeds"])
        return "No race was run." + (f" Uniform LoRA ran alone, {seeds} seeds." if seeds else "")
    count, methods = len(found["competitors"]), data.get("methods")
    # Methods differ in what they train; the table of parameters has the numbers.
    equal = "" if methods else " at equal parameters"
    return (
        f"{count} {'competitor' if count == 1 else 'competitors'} against LoRA{equal}, "
        f"on the report documents; {len(found['seeds'])} fresh seeds each; "
        f"{found['fine_tunes']} fine-tunes. Rate of false gains {100 * found['error_rate']:g} %, "
        "of all competitors together."
    )


def race(data: ReportData) -> Table | None:
    """Tabulates the competitors of the race; None if there was none."""
    found = data["confirm"]
    metric = found["metric"]
    rows = []
    for entry in found["competitors"]:
        compared = entry["comparison"]
        rows.append(
            (
                entry["label"] + (", verdict" if entry["chosen"] else ""),
                UNKNOWN
                if compared is None
                else interval(compared["estimate"], compared["half_width"], metric),
                UNKNOWN if compared is None else f"{100 * compared['confidence']:g} %",
                ", ".join(scored(value, metric) for value in entry["per_seed"]),
                ": ".join(filter(None, (entry["reason"], entry["detail"]))) or "ran to the end",
                ranks_text(entry),
                "-".join(map(str, entry["baseline"])),
            )
        )
    return Table(
        f"difference to uniform LoRA in {metric} ({unit_of_difference(metric) or metric}), paired "
        "by seed and document",
        ("competitor", "difference", "confidence", "by seed", "end", "ranks", "uniform ranks"),
        tuple(rows),
        (0, 3, 4, 5, 6),
    )


def ranks_text(entry: Mapping[str, Any]) -> str:
    """Writes ranks, and searched settings behind them."""
    if entry.get("method") == "none":
        return "no adapter"
    settings = (f"{name} {value:g}" for name, value in entry.get("settings", {}).items())
    return ", ".join(["-".join(map(str, entry["ranks"])), *settings])
