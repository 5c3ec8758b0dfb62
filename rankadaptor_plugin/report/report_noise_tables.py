"""The tables of the noise floor, for the report and for the command line."""

from __future__ import annotations

from typing import Any

from rankadaptor_plugin.core.scores import METRIC_UNITS, unit_of_difference
from rankadaptor_plugin.report.numbers import UNKNOWN, duration, number, scored
from rankadaptor_plugin.report.tables import Table


def scores(noise: dict[str, Any]) -> Table:
    """Tabulates by score how much of what differs between allocations is more than noise.

    Args:
        noise: What `rankadaptor_plugin.verdict.noise.Noise.to_json` returned.
    """
    rows = []
    for name, found in noise["scores"].items():
        rows.append(
            (
                name,
                number(found["icc"], 2),
                f"{number(found['low'], 2)} to {number(found['high'], 2)}",
                number(found["icc_independent"], 2),
                _sized(found["between_sd"], name),
                _sized(found["seed_sd"], name),
                unit_of_difference(name),
            )
        )
    first = next(iter(noise["scores"].values()))
    return Table(
        f"{first['allocations']} allocations with {first['seeds']} seeds each, on the search "
        "documents. ICC: share of the variance between fine-tunes that is due to the allocation, "
        f"with its {100 * first['confidence']:g} % interval; 0 is nothing but noise",
        (
            "score",
            "ICC, shared seeds",
            "interval",
            "ICC, own seeds",
            "sd between allocations",
            "noise of a fine-tune (sd)",
            "unit",
        ),
        tuple(rows),
        (0, 6),
    )


def needed(noise: dict[str, Any]) -> Table:
    """Tabulates the fine-tunes that it takes to tell a gain from noise, and how long they take."""
    decisive, rows = noise["decisive"], []
    for entry in noise["needed"]:
        count = entry["fine_tunes"]
        seconds = None if count is None else count * noise["seconds_per_fine_tune"]
        rows.append(
            (
                f"{_sized(entry['gain'], decisive)} {unit_of_difference(decisive)}".strip(),
                UNKNOWN if count is None else f"{count:,}",
                duration(seconds),
            )
        )
    return Table(
        f"fine-tunes, of two allocations together, that show a gain in {decisive} with "
        f"probability 0.8; {UNKNOWN}: not with these documents",
        ("gain", "fine-tunes", "time"),
        tuple(rows),
    )


def forecast(noise: dict[str, Any]) -> str:
    """Says how long what is left of the run would take."""
    left, seconds = noise["fine_tunes_left"], noise["seconds_per_fine_tune"]
    return (
        f"A fine-tune with its evaluation takes {duration(seconds)}; the at most {left} that are "
        f"left of this run file would take {duration(left * seconds)}."
    )


def _sized(value: float, name: str) -> str:
    # Spreads are small: a digit more than the score itself.
    if name == "accuracy":
        return number(100 * value, 2)
    return number(value, 4) if name in METRIC_UNITS else scored(value, name)
