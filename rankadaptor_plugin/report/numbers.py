"""Numbers as people read them: percent, nats, points, times.

Everything below this works on the fractions and seconds of report.json, everything above on text.
"""

from __future__ import annotations

import math

from rankadaptor_plugin.core.scores import METRIC_UNITS

UNKNOWN = "n/a"
MODELS = {
    "base": "base",
    "pruned": "pruned",
    "uniform": "uniform LoRA",
    "searched": "searched LoRA",
    "recovered": "recovered",
}


def metric_label(metric: str) -> str:
    """Names a metric and its unit."""
    unit = METRIC_UNITS.get(metric)
    return f"{metric} in {unit}" if unit else metric


def number(value: float | None, digits: int = 3) -> str:
    """Writes a number with fixed digits, without negative zero."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def scored(value: float | None, metric: str) -> str:
    """Writes a value of a metric: accuracy in percent with one decimal, nats with three."""
    if metric == "accuracy":
        return number(None if value is None else 100 * value, 1)
    return number(value)


def interval(mean: float | None, half_width: float | None, metric: str) -> str:
    """Writes a mean and the half width of its interval."""
    return f"{scored(mean, metric)} +- {scored(half_width, metric)}"


def size(count: int) -> str:
    """Writes a number of bytes."""
    if count < 2**10:
        return f"{count} B"
    for power, unit in ((10, "KiB"), (20, "MiB")):
        if round(count / 2**power, 1) < 2**10:
            return f"{count / 2**power:.1f} {unit}"
    return f"{count / 2**30:,.1f} GiB"


def duration(seconds: float | None) -> str:
    """Writes seconds, from a minute on with hours, minutes and seconds."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 60:  # noqa: PLR2004  (a minute)
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
