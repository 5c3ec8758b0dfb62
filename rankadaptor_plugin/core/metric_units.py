"""Units of the metrics."""

from __future__ import annotations

METRIC_UNITS = {
    "accuracy": "%",
    "clp": "nats",
    "margin": "nats",
    "gold_ll": "nats per byte",
    "log_likelihood": "nats per token",
}


def unit_of_difference(metric: str) -> str:
    """Names the unit of a difference in a metric; accuracy differs in points."""
    return "points" if metric == "accuracy" else METRIC_UNITS.get(metric, "")
