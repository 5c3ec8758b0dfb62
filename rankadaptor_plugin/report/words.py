"""Words and numbers of a report: percent, nats, points, times, and the sentences around the tables.

Everything below this works on the fractions and seconds of report.json, everything above on text.
"""

from __future__ import annotations

import json
import math
import unicodedata
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.core.scores import (
    KNOWN_METRICS,
    described,
    metric_meanings,
    unit_of_difference,
)
from rankadaptor_plugin.verdict.race import baseline_label

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rankadaptor_plugin.report.schema import ReportData
    from rankadaptor_plugin.verdict.statistics import Difference

UNKNOWN = "n/a"
MODELS = {
    "base": "base",
    "pruned": "pruned",
    "lora": "LoRA of the default rank",
    "uniform": "uniform LoRA",
    "searched": "searched LoRA",
}
"""Names of the models in the order of the tables; `ReportData.labels` knows the ranks of LoRA."""

METHODS_ALONE = "recovery methods"
"""The reason to stop of a run that only fine-tunes given recovery methods."""

SEARCHED, METHODS = "the searched allocation", "the recovery methods"
EQUAL = "at equal parameters"

MOST_DECIMALS = 6

READING = (
    (
        "How sure",
        "a +- b is a value and the half width of its interval; where that would reach past what "
        "is possible, the ends of the interval are given instead. Base and pruned model: over "
        "documents. Recovered models: over seeds and documents, counted so that the interval is "
        "too wide rather than too narrow.",
    ),
    (
        "What decides",
        "the paired comparison in the first metric: the searched allocation, or another recovery "
        "method, minus LoRA of the same size, with the same seeds on the same documents. Two "
        "intervals in the score table may overlap although the paired one excludes zero. Unless "
        "the paired one lies above zero, LoRA is delivered.",
    ),
    (
        "Search documents",
        "the only ones that the search saw. The best of many trials looks better on them than it "
        "is.",
    ),
    (
        "Report documents",
        "kept from the search. The score table and the verdict come from these, with seeds that "
        "the search did not use.",
    ),
    (
        "Metrics",
        f"{metric_meanings(KNOWN_METRICS)} Higher is better for all. The noise floor says how "
        "noisy each of them is.",
    ),
    (
        "Ranks",
        "the LoRA rank of each decoder layer; layer 0 is at the bottom. Equal parameters: the "
        "even allocation has as many trainable parameters as the searched one, as nearly as whole "
        "ranks allow.",
    ),
)


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


def interval(cell: Mapping[str, Any] | None, metric: str, name: str = "mean") -> str:
    """Writes a value and the half width of its interval; the ends where they were clipped.

    Args:
        cell: The value under `name`, and ``half_width``, ``low`` and ``high``; earlier reports have
            no ends. None for a value that is not known.
        metric: The metric.
        name: Name of the value.
    """
    if cell is None:
        return UNKNOWN
    value, half = cell[name], cell["half_width"]
    low, high = cell.get("low"), cell.get("high")
    if None not in (value, half, low, high):
        cut = max(low - (value - half), value + half - high)
        if cut > 1e-9 * max(1.0, half):
            return f"{scored(value, metric)} ({scored(low, metric)} to {scored(high, metric)})"
    return f"{scored(value, metric)} +- {scored(half, metric)}"


def metric_label(metric: str) -> str:
    """Names a metric and its unit."""
    unit = described(metric).unit
    return f"{metric} in {unit}" if unit else metric


def metric_title(metric: str) -> str:
    """Names a metric, its unit and, in plain words, what it is."""
    meaning = described(metric).meaning
    return metric_label(metric) + (f" ({meaning})" if meaning else "")


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


def visible(text: str) -> str:
    """Shows by name the characters that are invisible, reorder the line or cannot be written."""
    return "".join(map(_named, text.replace("\r\n", "\n")))


def _named(character: str) -> str:
    joiners = "\u200c\u200d"  # some scripts and emoji need them
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    if not hidden or character in "\n\t" or character in joiners:
        return character
    return f"⟨U+{ord(character):04X}⟩"


def alone_sentence(uniform: Sequence[int]) -> str:
    """Says that LoRA of even ranks was all there was."""
    return f"nothing was compared: {baseline_label(uniform)} ran alone and is delivered"


def verdict_sentence(
    comparison: Difference | None,
    uniform: Sequence[int],
    task: str = "",
    metric: str = "accuracy",
    *,
    searched: bool = True,
    subject: str = SEARCHED,
    parameters: str = EQUAL,
) -> str:
    """Says in one sentence what the search, or another recovery method, gained.

    Differences of accuracy are in points, with one decimal; more only where rounding would hide
    that an interval excludes zero.

    Args:
        comparison: Searched minus even allocation in the metric; None where no finalist differs
            from the even one.
        uniform: Ranks of the baseline, one per layer.
        task: The one task that was compared; empty for the mean of all.
        metric: What was compared.
        searched: False if noise left no reason to search.
        subject: What was compared with the baseline.
        parameters: How their numbers of trainable parameters compare.
    """
    label = baseline_label(uniform)
    if not searched:
        return f"no search: no plausible gain rises above the noise; {label} is delivered"
    if comparison is None:
        nothing = {
            SEARCHED: "the search found nothing",
            METHODS: "no recovery method is shown to be",
        }
        return f"{nothing.get(subject, f'{subject} is no')} better than {label}, which is delivered"
    factor, digits = (100, 1) if metric == "accuracy" else (1, 3)
    unit = unit_of_difference(metric) or metric
    place = f" on {task}" if task else ""
    where = f"{parameters}{place}{'' if subject == SEARCHED else f', by {subject}'}"
    estimate, half = factor * comparison.estimate, factor * comparison.half_width
    if comparison.is_gain:
        return f"gain of {_points(estimate, half, digits)} {unit} over {label} {where}"
    if comparison.is_loss:
        return (
            f"no gain: {subject} is worse than {label} by "
            f"{_points(-estimate, half, digits)} {unit}{place}; {label} is delivered"
        )
    difference = f"{number(estimate, digits)} +- {number(half, digits)} {unit}"
    why = "no gain beyond noise" if comparison.has_verdict else "no verdict from so few seeds"
    return f"{why}: {label} is delivered ({difference} over it {where})"


def _points(estimate: float, half: float, least: int) -> str:
    """Writes an estimate whose interval excludes zero so that it still does when rounded."""
    for digits in range(least, MOST_DECIMALS):
        if float(f"{estimate:.{digits}f}") > float(f"{half:.{digits}f}"):
            break
    return f"{number(estimate, digits)} +- {number(half, digits)}"


def search_line(data: ReportData) -> str:
    """Says in one line how the search went."""
    search = data["search"]
    if search["stop_reason"] == METHODS_ALONE:
        return "No search: the run file names only other recovery methods."
    begun = sum(trial["phase"] == "initialization" for trial in data["trials"])
    initial = max(search["n_startup_trials"], begun)
    return (
        f"Method {search['method']}: {search['complete']} trials complete, "
        f"{search['failed']} failed, {search['interrupted']} interrupted; the first {initial} were "
        f"planned as initialization phase. Stopped: {search['stop_reason']}. "
        f"Objective: {objective_label(data)}, on the search documents. "
        f"{metric_meanings([data['objective']['metric']])}"
    ).rstrip()


def cuts_line(data: ReportData) -> str:
    """Says what was left out to keep within the time of the run; empty if nothing was."""
    cuts = data.get("cuts")
    if not cuts:
        return ""
    search = data["config"]["search"]
    keys = ("max_hours", "max_gpu_hours")
    limits = " and ".join(f"{key} {search[key]:g}" for key in keys if search.get(key))
    return f"Cut to fit {limits}: {'; '.join(cuts)}."


def race_line(data: ReportData) -> str:
    """Says how the race was run."""
    race = data["confirm"]
    count, seeds = len(race["competitors"]), len(race["seeds"])
    if not count:
        return "No race was run." + (f" LoRA ran alone, with {seeds} seeds." if seeds else "")
    # Methods differ in what they train; the table of parameters has the numbers.
    equal = "" if data.get("methods") else " of equal size"
    return (
        f"{'1 competitor' if count == 1 else f'{count} competitors, each'} against LoRA{equal}, on "
        f"the report documents; {seeds} fresh seeds each; {race['fine_tunes']} fine-tunes. Rate of "
        f"false gains: {100 * race['error_rate']:g} %, all competitors together."
    )


def objective_label(data: ReportData) -> str:
    """Names what the search maximized, such as ``choice_logprob, mean of the tasks (nats)``."""
    metric, target = data["objective"]["metric"], data["objective"]["target"]
    place = "mean of the tasks" if target in ("", "mean") else f"task {target}"
    unit = described(metric).unit
    return f"{metric}, {place}{f' ({unit})' if unit else ''}"


def config_text(config: Mapping[str, Any]) -> str:
    """Writes the run file's values in the format of a run file."""
    plain = [(k, v) for k, v in config.items() if not isinstance(v, dict)]
    blocks = [_block("", plain)] if plain else []
    blocks += [_block(k, list(v.items())) for k, v in config.items() if isinstance(v, dict)]
    return "\n\n".join(blocks)


def _block(name: str, values: Sequence[tuple[str, Any]]) -> str:
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values]
    return "\n".join(([f"[{name}]"] if name else []) + lines)
